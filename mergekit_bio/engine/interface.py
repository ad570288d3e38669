"""What every engine takes and gives: prompts with audio, decoding settings, generations, label scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from mergekit_bio.audio.clip import Clip
from mergekit_bio.errors import EngineError, MissingPackageError
from mergekit_bio.outside_data import nearest

if TYPE_CHECKING:
    from mergekit_bio.engine.prefix_cache import PrefixCache

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Prompt:
    """What the user says, and the audios that are heard with it.

    The model's prompt template is put around it by the engine: see :meth:`Engine.render`.

    Attributes:
        text: The user's words, with ``<AudioHere>`` where an audio is heard. One audio and no slot: NatureLM-audio's
            lead, ``<Audio><AudioHere></Audio>``, is put in front.
        audios: A clip for every slot, in order.
    """

    text: str
    audios: Sequence[Clip] = ()


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
class Generation:
    """What came out for one prompt.

    Attributes:
        text: Without special tokens.
        token_ids: All that was generated, the end token included.
        logprobs: Natural log-probability of each token; for a choice, among the tokens that the list allows.
        finish_reason: ``"stop"`` (an end token, or a whole choice) or ``"length"``.
        prompt_tokens: Length of the prompt, audio included.
        seconds: From handing over the prompts to the answer; those of one call wait for each other.
        score: The beam's score (beam search only).
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    seconds: float
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a user says about an engine, and what a run needs of it.

    Attributes:
        options: The engine's own options, such as ``dtype`` or vLLM's ``tensor_parallel_size``.
        servers: Addresses, for an engine that asks servers.
        api_key: The servers' key.
        max_audios: Most audios in a prompt.
        prefixes: Folder that keeps audio prefixes; None keeps them in memory only.
        quiet: Whether the engine logs errors only.
        heard_once: Whether every audio is asked about once, so that nothing need be kept of it.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    servers: tuple[str, ...] = ()
    api_key: str | None = None
    max_audios: int = 1
    prefixes: Path | None = None
    quiet: bool = False
    heard_once: bool = False


def check_options(engine: str, options: Iterable[str], *, known: Sequence[str]) -> None:
    """Raise EngineError for an option that an engine of this name does not know."""
    for option in options:
        if option not in known:
            raise EngineError(
                f"--engine-option {option}: the {engine} engine has no such option{nearest(option, sorted(known))}"
            )


class Engine(Protocol):
    """Answers prompts with a merged checkpoint.

    An engine is a module with such a class, and a line in :data:`mergekit_bio.engine.choice.ENGINES`. Its module must
    be quick to import: what takes long is imported when the engine starts.

    Attributes:
        name: What a user calls it.
        remote: Whether servers hold the checkpoints. Then nothing is merged or fetched here, a checkpoint is known by
            its directory's name, and ``--server`` names the servers.
        baseline: Whether it asks other people's models, which a sweep is compared with: they are asked by the name that
            ``--model-name`` says, greedily, and drawn beside the sweep.
        packages: Distributions whose versions a run records.
        advice: What a user is told where another engine answers because this one is not installed.
    """

    name: ClassVar[str]
    remote: ClassVar[bool]
    baseline: ClassVar[bool]
    packages: ClassVar[tuple[str, ...]]
    advice: ClassVar[str]

    @property
    def prefixes(self) -> "PrefixCache | None":
        """Where audio prefixes come from; None where the engine makes its own."""

    @classmethod
    def missing(cls) -> MissingPackageError | None:
        """The error that says what to install, where a package that it needs is not."""

    @classmethod
    def set_environment(cls, *, quiet: bool) -> None:
        """Set the environment variables that its libraries read when they are imported; the user's own win."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that it does not have.

        Raises:
            EngineError: It has no such option.
        """

    @classmethod
    def prompts_at_once(cls, settings: EngineSettings) -> int:
        """How many prompts a run hands to it at once; their answers are written when all of them are there."""

    @classmethod
    def gpus(cls, options: Mapping[str, Any]) -> int:
        """How many GPUs one of them takes on a machine that has them; 0 if it computes elsewhere all the same."""

    @classmethod
    def start(cls, checkpoint: str, settings: EngineSettings) -> "Engine":
        """Start it on a checkpoint.

        Args:
            checkpoint: A directory, a hub id, or for a remote engine the name that the servers know it by.
            settings: What the user and the run say.

        Raises:
            EngineError: It cannot run the checkpoint, or not with these settings.
            MissingPackageError: A package that it needs is not installed.
        """

    def render(self, prompt: Prompt) -> str:
        """The whole text that the model is asked, its template included, with ``<AudioHere>`` for every audio.

        An engine whose servers do not tell their template gives the user's words alone.

        Raises:
            PromptError: The prompt is empty, or has another number of slots than it has audios.
        """

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """Answer prompts.

        Raises:
            PromptError: A prompt is longer than the model takes, is empty, or has another number of slots than it has
                audios.
        """

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """Answer each prompt with one of the labels: the likeliest allowed token at every step."""

    def loglikelihood(
        self, prompts: Sequence[Prompt], labels: Sequence[str], *, negligible: float = 0.0
    ) -> list[dict[str, float]]:
        """For each prompt label -> how likely it is as the whole answer.

        That is the sum of its tokens' natural log-probabilities and of the log-probability that the answer ends there,
        with whichever end token.

        Args:
            prompts: What is asked.
            labels: The answers to score.
            negligible: Above 0, unlikely labels that all together have less than this share of the probability of all
                labels may be left out: they get minus infinity.
        """

    def load(self, checkpoint: str | Path) -> str:
        """Move to another checkpoint of the same sweep by replacing the tensors in which the two differ.

        Returns:
            A fingerprint of what was loaded: sha256 over the names and sha256 digests of the tensors, as they were
            handed to the model, all equal to what merge.json records. Of servers, what they call their revision.

        Raises:
            EngineError: The checkpoint is not of the same sweep, or its tensors cannot be read or are not what its
                manifest says. The engine is on its old checkpoint, or closed if that cannot be read again.
        """

    def close(self) -> None:
        """Free the model's memory; nothing where that is done."""
