"""Where the audio models run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergekit_bio.errors import EngineError


def pick_device(name: str) -> str:
    """The torch device that a ``--device`` stands for.

    Args:
        name: ``"auto"`` for a GPU if there is one, else a torch device such as ``"cpu"`` or ``"cuda:1"``.

    Raises:
        EngineError: There is no such device here.
    """
    import torch

    if not isinstance(name, str) or name.startswith("meta"):  # a value of YAML's; a device that computes nothing
        raise EngineError(f"--device {name}: no such device; try --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise EngineError(f"--device {name}: not usable here ({reason}); try --device cpu") from error
    return name


def gpus_on(device: str) -> int:
    """How many GPUs a model on a torch device takes, on a machine that has them."""
    return 0 if device.startswith("cpu") else 1


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep a GPU from computing float32 products and convolutions in TF32, which has 10 of float32's 23 bits.

    By default PyTorch does so for convolutions, and vLLM can be told to do so for products. What was set before is
    set again when the block ends.
    """
    import torch

    settings: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
