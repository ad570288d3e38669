"""What is asked about every window of a recording, and how."""

from dataclasses import asdict, dataclass
from typing import Any

from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.engine.decoding.choices import with_choices
from mergekit_bio.engine.interface import Decoding


@dataclass(frozen=True, kw_only=True)
class Question:
    """Everything that decides an answer beside the model and the recording.

    Attributes:
        prompt: The user's words.
        window: Seconds that are heard at a time, 0.5 to 10.
        hop: Seconds from one window's start to the next.
        channel: The channel that is heard, from 1; None for the mean of all.
        num_beams: Beams; 1 is greedy.
        max_new_tokens: Tokens an answer may have.
        choices: The answer is one of these, the likeliest; none: it is free text.
        skip_quiet: Windows of which nothing is as loud as so many dB of full scale are not asked about.
        selected: Whether the windows are those that tables name, instead of the whole recordings'.
    """

    prompt: str
    window: float = CLIP_SECONDS
    hop: float = CLIP_SECONDS
    channel: int | None = None
    num_beams: int = 2
    max_new_tokens: int = 300
    choices: tuple[str, ...] = ()
    skip_quiet: float | None = None
    selected: bool = False

    @property
    def text(self) -> str:
        """What the model is asked: the prompt, with the choices where it wants them."""
        return with_choices(self.prompt, self.choices)

    @property
    def decoding(self) -> Decoding:
        """How an engine generates the answer."""
        return Decoding(max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)

    def identity(self) -> dict[str, Any]:
        """All of it, as values of JSON: answers of one journal are answers to one identity."""
        return asdict(self)
