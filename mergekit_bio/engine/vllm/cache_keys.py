"""What vLLM's caches know an audio by: what is heard, and a secret of this process.

Nobody else can choose such a key, or tell what it will be: an audio is never taken for another one.
"""

import hashlib
import secrets

_SECRET = secrets.token_bytes(32)


class ContentKey(str):
    """A digest of what is heard, made by this package. A text that a client sends is a plain ``str``."""

    __slots__ = ()


def cache_key(digest: str) -> str:
    """The key for a digest of what is heard."""
    return hashlib.blake2b(digest.encode(), key=_SECRET, digest_size=32).hexdigest()
