"""What the server's parts need to know, handed to every process of vLLM's through the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from mergekit_bio.engine.vllm.dial import Dial

VARIABLE = "MERGEKIT_BIO_SERVE"
#: What vLLM knows this package's routes and its way to audio by (``pyproject.toml``).
PLUGIN = "mergekit_bio"

#: Answered without a key, and not logged: nothing here tells or does more than "the server is up".
OPEN_PATHS = frozenset({"/health", "/ping", "/version"})
#: Where the page for browsers is, if there is one.
PAGE = "/page"

#: 10 s at 48 kHz of 16 bits in base64, and a little for the rest of an item.
_BYTES_OF_A_CLIP = 10 * 48_000 * 2 * 4 / 3 + 10_000


@dataclass(frozen=True)
class DialSettings:
    """A dial: its arguments, and what ``/info`` says of it.

    Attributes:
        folder: With the adapter that strengths are made of.
        default: The strength, in thousandths, of a name without one.
        aliases: More names -> the strength that each stands for, in thousandths.
        revision: The same for the same weights of base and adapter.
        weights: What is served, in words.
    """

    folder: str
    default: int
    aliases: Mapping[str, int]
    revision: str
    weights: str


@dataclass(frozen=True)
class ServeSettings:
    """Everything beyond vLLM's own flags.

    Attributes:
        directory: The checkpoint that vLLM loads.
        names: What the model is called.
        dial: How every strength is served; None for one merged checkpoint.
        api_keys: A file with more keys than vLLM's own.
        request_log: Where a line is written for each request; ``-`` for standard output.
        max_body_bytes: Larger requests are refused before they are read.
        max_batch: Items in one ``/predict`` request, if their recordings fit into one.
        max_audio_seconds: Longer recordings are refused before they are decoded.
        num_beams: Of ``/predict`` where a request neither says it nor samples.
        max_new_tokens: What ``/predict`` generates where the request does not say.
        system_turns: Whether ``/predict`` keeps them.
        prompt_template: What the chat template makes of one user's turn, with ``{}`` for it; None where a user gave a
            chat template of their own.
        page: The folder for what visitors of ``/page`` upload; None where there is no page.
        fetch_seconds: Time for one ``file_url``.
        allowed_local_media_path: The only folder that files are read from; None for none.
        allowed_media_domains: The only hosts that files are fetched from.
    """

    directory: str = ""
    names: tuple[str, ...] = ()
    dial: DialSettings | None = None
    api_keys: Path | None = None
    request_log: Path | None = None
    max_body_bytes: int = 64 << 20
    max_batch: int = 8
    max_audio_seconds: float = 600.0
    max_audio_bytes: int = 25 << 20
    num_beams: int = 2
    max_new_tokens: int = 300
    system_turns: Literal["drop", "keep"] = "drop"
    prompt_template: str | None = None
    page: str | None = None
    fetch_seconds: float = 20.0
    allowed_local_media_path: str | None = None
    allowed_media_domains: tuple[str, ...] = ()

    @property
    def max_batch_that_fits(self) -> int:
        """``max_batch``, or as many clips of 10 s at 48 kHz as a request holds."""
        return max(1, min(self.max_batch, int(self.max_body_bytes / _BYTES_OF_A_CLIP)))

    def make_dial(self) -> Dial | None:
        """The dial that is served, if one is."""
        if self.dial is None:
            return None
        folder = Path(self.dial.folder)
        return Dial(self.names, folder, default=self.dial.default, aliases=self.dial.aliases)

    def to_environment(self) -> dict[str, str]:
        """As environment variables for vLLM's processes."""
        return {VARIABLE: _SETTINGS.dump_json(self).decode()}

    @classmethod
    def from_environment(cls) -> "ServeSettings":
        """What :meth:`to_environment` wrote."""
        return _SETTINGS.validate_json(os.environ[VARIABLE])


_SETTINGS = TypeAdapter(ServeSettings)
