"""Where the audio models run."""

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
