"""What every engine takes and gives: prompts with audio, decoding settings, generations, label scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mergekit_bio.audio.clip import Clip
from mergekit_bio.errors import EngineError, PromptError
from mergekit_bio.model.layout import AUDIO_SLOT

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Prompt:
    """What the user says: text pieces with an audio between each two of them.

    The model's prompt template is put around it by the engine.

    Attributes:
        pieces: One more than there are audios; may be empty.
        audios: The clips between the pieces.
    """

    pieces: tuple[str, ...]
    audios: tuple[Clip, ...] = ()

    def __post_init__(self) -> None:
        if len(self.pieces) != len(self.audios) + 1:
            raise PromptError(
                f"a prompt with {len(self.audios)} audios has {len(self.audios) + 1} pieces of text around them, "
                f"not {len(self.pieces)}"
            )

    @classmethod
    def from_text(cls, text: str, audios: Sequence[Clip] = ()) -> "Prompt":
        """Split a text at every ``<AudioHere>``. One audio and no slot: NatureLM-audio's lead is put in front.

        Raises:
            PromptError: The text is empty, or has another number of slots than there are audios.
        """
        from mergekit_bio.model.prompt import render_prompt

        return cls(tuple(render_prompt(text, template="{}", num_audios=len(audios)).split(AUDIO_SLOT)), tuple(audios))

    @property
    def text(self) -> str:
        """The whole text, with ``<AudioHere>`` for every audio."""
        return AUDIO_SLOT.join(self.pieces)


@dataclass(frozen=True)
class Decoding:
    """How to generate. The defaults are greedy.

    Attributes:
        max_new_tokens: Tokens at most, the end token included.
        num_beams: 1, or the width of a beam search with Transformers' semantics.
        length_penalty: A beam's score is the sum of its log-probabilities over (generated length ** this).
        early_stopping: Of the beam search; as Transformers: stop with ``num_beams`` finished (True), when the
            running beams are unlikely to get better (False), or when they cannot (``"never"``).
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        top_p: Sample from the likeliest tokens that together have this probability.
        top_k: Sample from this many likeliest tokens; 0 for all.
        seed: Of the sampling; the n-th prompt of a call draws with ``seed + n``.
        eos_token_ids: What ends a generation; by default the checkpoint's own end tokens.
    """

    max_new_tokens: int = 100
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise EngineError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.num_beams < 1:
            raise EngineError(f"num_beams must be at least 1, not {self.num_beams}")
        if self.temperature < 0:
            raise EngineError(f"temperature must not be negative, not {self.temperature}")
        if self.num_beams > 1 and self.temperature > 0:
            raise EngineError("beam search does not sample; set temperature to 0 or num_beams to 1")


@dataclass(frozen=True)
class Timings:
    """Seconds.

    Attributes:
        total: From handing the prompt to the engine to its last token. Prompts of one call wait for each other.
        first_token: To the first token, where the engine tells.
    """

    total: float
    first_token: float | None = None


@dataclass(frozen=True)
class Generation:
    """What came out for one prompt.

    Attributes:
        text: Without special tokens.
        token_ids: All that was generated, the end token included.
        logprobs: Natural log-probability of each token; for a choice, among the tokens that the list allows.
        finish_reason: ``"stop"`` (an end token, or a whole choice) or ``"length"``.
        prompt_tokens: Length of the prompt, audio included.
        timings: How long it took.
        score: The beam's score (beam search only).
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    timings: Timings
    score: float | None = None


@dataclass(frozen=True)
class LabelScore:
    """How likely a label is as the answer.

    Attributes:
        label: The label.
        logprob: Sum of the natural log-probabilities of its tokens (no end token).
        tokens: How many they are.
    """

    label: str
    logprob: float
    tokens: int

    @property
    def normalized(self) -> float:
        """Log-probability a token."""
        return self.logprob / self.tokens


@dataclass(frozen=True)
class Loaded:
    """Proof of what an engine now runs.

    Attributes:
        checkpoint: The directory.
        tensors: Tensors that were replaced.
        nbytes: Their bytes.
        seconds: How long it took.
        fingerprint: sha256 over the names and sha256 digests of the tensors, as they were handed to the model, all
            equal to what merge.json records.
    """

    checkpoint: Path
    tensors: int
    nbytes: int
    seconds: float
    fingerprint: str


class Engine(Protocol):
    """Runs a merged checkpoint with ears."""

    @property
    def name(self) -> str:
        """``"vllm"``, ``"transformers"`` or ``"http"``."""

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """Answer prompts.

        Raises:
            PromptError: A prompt is longer than the model takes, or empty.
        """

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """Answer each prompt with one of the labels: the likeliest allowed token at every step."""

    def loglikelihood(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[list[LabelScore]]:
        """Score every label as the answer to each prompt, in the labels' order."""

    def load(self, checkpoint: str | Path) -> Loaded:
        """Move to another checkpoint of the same sweep by replacing the tensors in which the two differ.

        Raises:
            EngineError: The checkpoint is not of the same sweep, or its tensors are not what its manifest says.
        """

    def close(self) -> None:
        """Free the model's memory."""
