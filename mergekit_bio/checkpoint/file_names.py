"""File names that every file system takes."""

import hashlib

#: Bytes of a name, by nearly every file system.
LONGEST = 255
_DIGEST = 9


def fitting(stem: str, ending: str = "") -> str:
    """``stem + ending``; where that is too long for a file name, with the end of the stem replaced by a digest of it.

    Example::

        fitting("owls", "-LICENSE")      # "owls-LICENSE"
        fitting("o" * 300, "-LICENSE")   # "ooo...ooo-1f2e3d4c-LICENSE", 255 bytes
    """
    if len((stem + ending).encode()) <= LONGEST:
        return stem + ending
    room = LONGEST - len(ending.encode()) - _DIGEST
    if room < 1:  # the ending is a long name itself
        return fitting(stem + ending)
    kept = stem.encode()[:room].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(stem.encode()).hexdigest()[: _DIGEST - 1]}{ending}"
