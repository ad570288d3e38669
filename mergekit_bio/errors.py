"""Every error a user can cause, each one line: what happened, where, and what to do."""

from collections.abc import Sequence


class MergekitBioError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback."""


class SourceError(MergekitBioError):
    """A base or adapter cannot be found or fetched (missing directory, unknown hub id, gated repository)."""


class CheckpointError(MergekitBioError):
    """A checkpoint on disk is damaged, incomplete or not what its index says."""


class AdapterError(MergekitBioError):
    """An adapter is damaged, does not fit its base, or cannot be folded exactly."""


class AlphaError(MergekitBioError):
    """A merge strength that cannot be read or makes no sense."""


class OutputError(MergekitBioError):
    """An output that exists, is busy, does not fit on the disk or cannot be written."""


class VerificationError(MergekitBioError):
    """A merged checkpoint is not what its manifest says."""


class HubError(MergekitBioError):
    """The Hugging Face Hub refused, or cannot be reached."""


class AudioError(MergekitBioError):
    """A recording cannot be decoded or is of no use (too short, not finite, no audio stream)."""


class PromptError(MergekitBioError):
    """A prompt and its audios do not fit together."""


class RecipeError(MergekitBioError):
    """A recipe cannot be read, or asks for what does not exist."""


class DatasetError(MergekitBioError):
    """Evaluation data is missing, damaged or not of the expected schema."""


class RunError(MergekitBioError):
    """A run directory cannot be resumed, read or reported on."""


class EngineError(MergekitBioError):
    """An inference engine cannot be started, or failed."""


class FlagError(MergekitBioError):
    """A flag that an engine does not have, or a value that it cannot read.

    Args:
        message: What is wrong, in the words of who reads the flags.
        known: The flags that there are.
    """

    def __init__(self, message: str, known: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.known = known


class MissingPackageError(MergekitBioError):
    """An optional package is not installed; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str, *, without_gpu: str | None = None) -> None:
        other = f" (without a GPU: 'mergekit-bio[{without_gpu}]')" if without_gpu else ""
        super().__init__(f"{purpose} needs {package}; install it with: pip install 'mergekit-bio[{extra}]'{other}")
