"""Merging from start to end: resolve, plan, check, write, record, publish."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from mergekit_bio.adapter.adapter import Adapter, Base
from mergekit_bio.adapter.load import load_adapter
from mergekit_bio.checkpoint.checkpoint import Checkpoint
from mergekit_bio.checkpoint.publish import staged
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import MergekitBioError, OutputError
from mergekit_bio.merging.alpha import Alpha, one_alpha, parse_alphas
from mergekit_bio.merging.directory import Companions, companions
from mergekit_bio.merging.plan import MergePlan, Output
from mergekit_bio.merging.planning import build_plan

if TYPE_CHECKING:
    from mergekit_bio.merging.fold import Folded
    from mergekit_bio.merging.record import Settings
    from mergekit_bio.merging.rounding_loss import RoundingLoss

Rounding: TypeAlias = Literal["stochastic", "nearest"]
DType: TypeAlias = Literal["keep", "bfloat16", "float16", "float32"]
#: A directory or hub id, alone or with a strength of its own.
AdapterSource: TypeAlias = str | Path | tuple[str | Path, float | str | Alpha]

_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True)
class MergedCheckpoint:
    """A checkpoint that a merge has written.

    Attributes:
        path: Its directory.
        alpha: The strength, as it was asked for.
        rounding_loss: What rounding cost, per module type and in total.
        unchanged: Whether its weights are the base's own bytes (a strength of 0).
    """

    path: Path
    alpha: Alpha
    rounding_loss: "tuple[RoundingLoss, ...]"
    unchanged: bool


def plan_merge(
    *,
    base: str | Path,
    adapter: AdapterSource | Sequence[AdapterSource],
    alphas: Sequence[float | str | Alpha],
    dtype: DType = "keep",
    text_only: bool = False,
    base_from_adapter: bool = False,
    share: bool = True,
) -> MergePlan:
    """Find the sources, read their headers and decide what to do; see :func:`merge` for the arguments.

    Raises:
        MergekitBioError: As :func:`merge`, for everything that can be known before a byte is written.
    """
    strengths = parse_alphas(alphas)
    sources = [adapter] if isinstance(adapter, (str, Path, tuple)) else list(adapter)
    if not sources:
        raise MergekitBioError("no adapter given; name one with --adapter")
    found = resolve(base)
    model = Base(found, Checkpoint.open(found.path))
    adapters: list[Adapter] = []
    fixed: list[Alpha | None] = []
    for source in sources:
        name, own = source if isinstance(source, tuple) else (source, None)
        adapters.append(load_adapter(resolve(name), model))
        fixed.append(None if own is None else one_alpha(own))
    return build_plan(
        base=model,
        adapters=adapters,
        fixed=fixed,
        alphas=strengths,
        dtype=dtype,
        text_only=text_only,
        base_from_adapter=base_from_adapter,
        share=share,
    )


def merge(
    *,
    base: str | Path,
    adapter: AdapterSource | Sequence[AdapterSource],
    alphas: Sequence[float | str | Alpha],
    out: str | Path,
    dtype: DType = "keep",
    rounding: Rounding = "stochastic",
    seed: int = 0,
    device: str = "auto",
    text_only: bool = False,
    base_from_adapter: bool = False,
    share: bool = True,
    fsync: bool = True,
    overwrite: bool = False,
) -> tuple[MergedCheckpoint, ...]:
    """Fold adapters into a base at one or several strengths, W(alpha) = W0 + alpha * d; write standalone checkpoints.

    Args:
        base: A directory, or a hub id with an optional ``@revision``.
        adapter: Likewise; one, or several whose deltas are summed. A pair gives an adapter a strength of its own.
        alphas: The strengths: numbers, sweeps ``"0:1:0.1"``, or lists ``"q_proj=0.3,o_proj=0.6"``.
        out: The directory to make. With several strengths it holds one directory for each, ``alpha-0.50``.
        dtype: Of all weights; ``"keep"`` leaves each as the base has it.
        rounding: How results of 16 bits are rounded.
        seed: Of the stochastic rounding.
        device: ``"auto"`` (GPUs if there are any), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        text_only: Leave an adapter's audio tower out.
        base_from_adapter: Where an adapter repeats a tensor of the base with other values, take the adapter's at every
            strength, 0 included, as NatureLM-audio's original code does; otherwise that is an error.
        share: Store what several strengths have in common once, hard-linked and read-only.
        fsync: Have everything on the disk before the directory appears.
        overwrite: Replace a directory that a merge has written before.

    Returns:
        One checkpoint for each strength, in their order.

    Raises:
        MergekitBioError: With one line that says what is wrong, where, and what to do. Nothing is left behind.
    """
    plan = plan_merge(
        base=base,
        adapter=adapter,
        alphas=alphas,
        dtype=dtype,
        text_only=text_only,
        base_from_adapter=base_from_adapter,
        share=share,
    )
    return carry_out(plan, out=out, rounding=rounding, seed=seed, device=device, fsync=fsync, overwrite=overwrite)


def carry_out(
    plan: MergePlan,
    *,
    out: str | Path,
    rounding: Rounding = "stochastic",
    seed: int = 0,
    device: str = "auto",
    fsync: bool = True,
    overwrite: bool = False,
    command: str = "mergekit_bio.merge(...)",
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[MergedCheckpoint, ...]:
    """Do what ``plan`` says; see :func:`merge` for the other arguments.

    Args:
        plan: From :func:`plan_merge`.
        command: What the user typed, for the record.
        progress: Called with numbers of bytes that sum up to ``plan.bytes_on_disk``.
    """
    from mergekit_bio.merging.manifest import MANIFEST, stranger
    from mergekit_bio.merging.record import Settings
    from mergekit_bio.merging.write import execute

    target = Path(out)
    _check_place(target, plan)
    beside = companions(plan)
    with staged(target, mark=MANIFEST, stranger=stranger, overwrite=overwrite, fsync=fsync) as folder:
        _check_space(folder, plan.bytes_on_disk + len(plan.outputs) * beside.nbytes)
        stochastic = rounding == "stochastic"
        folded = execute(
            plan,
            folder,
            devices=lambda: _devices(device),
            stochastic=stochastic,
            seed=seed,
            meanwhile=_import_recorders,
            progress=progress,
        )
        settings = Settings(rounding, seed, _device_name(device), command)
        return tuple(_finish(plan, output, beside, folder, folded, settings, target) for output in plan.outputs)


def _finish(
    plan: MergePlan,
    output: Output,
    beside: Companions,
    root: Path,
    folded: "tuple[Folded, ...]",
    settings: "Settings",
    target: Path,
) -> MergedCheckpoint:
    """Write what stands beside the weights of one output."""
    from mergekit_bio.checkpoint.digest import file_sha256
    from mergekit_bio.hub.card import model_card
    from mergekit_bio.merging.directory import write_companions
    from mergekit_bio.merging.manifest import CARD, MANIFEST
    from mergekit_bio.merging.record import describe
    from mergekit_bio.merging.rounding_loss import summarise

    folder, files = root / output.folder, plan.files_of(output)
    hashed = {name: file_sha256(folder / name) for name in write_companions(beside, plan, output, folder)}
    stored_in = {shard.file for shard in files.values()}
    hashes, errors = {}, []
    for fold, result in zip(plan.folds, folded, strict=True):
        for place, sha256, error in zip(fold.targets, result.sha256, result.errors, strict=True):
            if place.file in stored_in:
                hashes[fold.name] = sha256
                errors += [(fold.name, math.prod(fold.shape), error)] if fold.deltas else []
    losses = summarise(errors)
    manifest = describe(plan, output, settings, hashes, hashed, losses)
    (folder / CARD).write_text(model_card(manifest.document()), encoding="utf-8")
    for name, shard in files.items():
        if shard.links:
            (folder / name).chmod(0o444)
    # Last, because it is what makes a directory a checkpoint that verify accepts.
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return MergedCheckpoint(
        target / output.folder, output.alpha, losses, unchanged=not hashes and not plan.base.overrides
    )


def _import_recorders() -> None:
    """Import what the record of a merge is written with; it takes a fifth of a second."""
    from huggingface_hub import ModelCardData  # noqa: F401

    import mergekit_bio.merging.record  # noqa: F401


def _check_place(out: Path, plan: MergePlan) -> None:
    """Refuse an output that is inside a source, or that a source is inside of."""
    place = out.resolve()
    for source in (plan.base.source, *(adapter.source for adapter in plan.adapters)):
        home = source.path.resolve()
        if place == home or place.is_relative_to(home):
            raise OutputError(f"{out}: is inside the source {source.given}; choose an --out elsewhere")
        if home.is_relative_to(place):
            raise OutputError(f"{out}: the source {source.given} is inside it; choose another --out")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _MARGIN_BYTES > free:
        raise OutputError(
            f"{folder.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make "
            "room, or choose an --out on another disk"
        )


def _devices(device: str) -> list[str]:
    """The torch devices that a ``--device`` stands for.

    Raises:
        MergekitBioError: There is no such device here.
    """
    import torch

    count = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return ["cpu"]
    if device in ("auto", "cuda") and count:
        found = [f"cuda:{number}" for number in range(count)]
    elif device in {f"cuda:{number}" for number in range(count)}:
        found = [device]
    else:
        raise MergekitBioError(
            f"--device {device}: this machine has {count} CUDA devices that torch {torch.__version__} can use; try "
            "--device cpu"
        )
    # float32 products in float32: TF32 would keep 10 of a delta's 23 bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def _device_name(device: str) -> str:
    import torch

    first = _devices(device)[0]
    return "cpu" if first == "cpu" else f"cuda ({torch.cuda.get_device_name(first)})"
