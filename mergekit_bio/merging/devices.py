"""Where folding is computed; the place where a merge imports torch."""

import gc
import sys
from typing import TYPE_CHECKING

from mergekit_bio.audio.device import pick_device

if TYPE_CHECKING:
    import torch


def import_torch() -> None:
    """Import torch in half the time, and let the process end in half the time.

    The import makes a million objects that stay. The garbage collector would look through them again and again while
    they are made, and once more at the exit of the process: 0.4 s of a merge that takes 2 s.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def compute_devices(name: str) -> "list[torch.device]":
    """The devices that a ``--device`` stands for; each takes a share of the tensors.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        EngineError: There is no such device here.
    """
    import_torch()
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        devices = [torch.device(pick_device(name))]
    # Folding takes products in float64, which Apple's GPUs do not have. What is none of NVIDIA's or AMD's leaves it to
    # the CPU.
    return devices if devices[0].type in ("cpu", "cuda") else [torch.device("cpu")]


def device_name(name: str) -> str:
    """The devices of a ``--device`` in words, for the record: ``"cpu"`` or ``"cuda (NVIDIA H100)"``."""
    import torch

    first = compute_devices(name)[0]
    return "cpu" if first.type == "cpu" else f"cuda ({torch.cuda.get_device_name(first)})"
