"""Merging from start to end: :func:`plan_merge` decides everything, :func:`carry_out` does it."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mergekit_bio.adapter.interface import Base
from mergekit_bio.adapter.load import load_adapter
from mergekit_bio.checkpoint.digest import file_sha256
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.manifest import CARD, MANIFEST, Manifest, RoundingLoss, foreign_file
from mergekit_bio.checkpoint.publish import bytes_in, staged
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import OutputError
from mergekit_bio.merging.alpha import Alpha
from mergekit_bio.merging.card import model_card
from mergekit_bio.merging.directory import Companions, companions, write_companions
from mergekit_bio.merging.journal import JOURNAL, Journal, plan_digest
from mergekit_bio.merging.plan import MergePlan, Output
from mergekit_bio.merging.planning import build_plan
from mergekit_bio.merging.record import Made, Recorder
from mergekit_bio.merging.request import AdapterEntry, DType, Hash, MergeRequest, Rounding, Strength, Tokenizer
from mergekit_bio.merging.rounding_loss import summarise
from mergekit_bio.merging.write import cores, execute

if TYPE_CHECKING:
    from mergekit_bio.merging.fold import Folded

#: A directory or hub id, alone or with a strength of its own.
AdapterSource: TypeAlias = str | Path | tuple[str | Path, Strength] | AdapterEntry

#: What is left free on the disk, for the small files.
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
    rounding_loss: tuple[RoundingLoss, ...]
    unchanged: bool


def merge(
    *,
    alphas: Strength | Sequence[Strength],
    base: str | Path = MergeRequest.base,
    adapter: AdapterSource | Sequence[AdapterSource] = MergeRequest.adapter,
    out: str | Path | None = MergeRequest.out,
    dtype: DType = MergeRequest.dtype,
    rounding: Rounding = MergeRequest.rounding,
    seed: int = MergeRequest.seed,
    device: str = MergeRequest.device,
    text_only: bool = MergeRequest.text_only,
    base_from_adapter: bool = MergeRequest.base_from_adapter,
    tokenizer: Tokenizer = MergeRequest.tokenizer,
    share: bool = MergeRequest.share,
    hash: Hash = MergeRequest.hash,
    fsync: bool = MergeRequest.fsync,
    overwrite: bool = MergeRequest.overwrite,
) -> tuple[MergedCheckpoint, ...]:
    """Fold adapters into a base at one or several strengths, W(alpha) = W0 + alpha * d; write standalone checkpoints.

    The keywords are the fields of :class:`~mergekit_bio.merging.request.MergeRequest`, which says what each means and
    holds the defaults; an adapter may also be a pair, ``(source, strength of its own)``. This is short for::

        carry_out(plan_merge(MergeRequest(base="llama/", adapter="lora/", alphas=[0.5])))

    Example::

        (half,) = mergekit_bio.merge(base="llama/", adapter="lora/", alphas=[0.5], out="merged/half")
        half.path  # merged/half

    Returns:
        One checkpoint for each strength, in their order.

    Raises:
        MergekitBioError: With one line that says what is wrong, where, and what to do. Nothing is left behind.
    """
    adapters = [adapter] if isinstance(adapter, str | Path | tuple | AdapterEntry) else adapter
    request = MergeRequest(
        base=base,
        adapter=[AdapterEntry(*source) if isinstance(source, tuple) else source for source in adapters],
        alphas=alphas,
        out=out,
        dtype=dtype,
        rounding=rounding,
        seed=seed,
        device=device,
        text_only=text_only,
        base_from_adapter=base_from_adapter,
        tokenizer=tokenizer,
        share=share,
        hash=hash,
        fsync=fsync,
        overwrite=overwrite,
    )
    return carry_out(plan_merge(request))


def plan_merge(request: MergeRequest) -> MergePlan:
    """Find the sources, read their headers, and decide what happens to every tensor.

    Of the weights only those are read that have to be compared (see :func:`~mergekit_bio.adapter.load.load_adapter`),
    and nothing is written.

    Raises:
        MergekitBioError: For everything that can be known before a byte is written.
    """
    # 1. Read what the request says in text, before anything is fetched for it.
    entries, _ = request.adapters, request.strengths
    for entry in entries:
        _ = entry.fixed_alpha
    # 2. Find the base and read its headers.
    source = resolve(request.base)
    base = Base(source, Checkpoint.open(source.path))
    # 3. Find the adapters and read them as deltas on tensors of the base.
    adapters = [load_adapter(resolve(entry.source), base) for entry in entries]
    # 4. Give every tensor of the result a file, an offset and its strengths.
    return build_plan(request, base, adapters)


def carry_out(
    plan: MergePlan,
    *,
    command: str = "mergekit_bio.merge(...)",
    progress: Callable[[int], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[MergedCheckpoint, ...]:
    """Write the checkpoints that ``plan`` describes, or go on with what a process that was killed has written of them.

    Args:
        plan: From :func:`plan_merge`.
        command: What the user typed, for the record.
        progress: Called with numbers of bytes that sum up to ``plan.bytes_on_disk``.
        note: Called with a line about work that was cut off: what of it this merge goes on with, or leaves alone.

    Returns:
        One checkpoint for each strength, in their order.

    Raises:
        MergekitBioError: As :func:`merge`. Nothing is left behind.
    """
    return write_outputs(plan, companions(plan), Recorder(plan, command).describe, progress, note)


def write_outputs(
    plan: MergePlan,
    beside: Companions,
    record: Callable[[Output, Made], Manifest],
    progress: Callable[[int], None],
    note: Callable[[str], None],
) -> tuple[MergedCheckpoint, ...]:
    """Write the outputs of a plan, all of them or none.

    Args:
        plan: What to do.
        beside: What stands beside the weights. It was collected before: what is missing there stops the merge early.
        record: Gives the manifest of an output from what came of it, or refuses that.
        progress: As of :func:`carry_out`.
        note: Likewise.

    Returns:
        One checkpoint for each output.

    Raises:
        MergekitBioError: As :func:`merge`. Nothing is left behind.
    """
    # 1. Check the place.
    request, out = plan.request, plan.request.destination
    _check_place(out, plan)
    # 2. Work in a scratch directory that becomes the output only if all goes well. The journal is in it to the last.
    parts = {name for shard in plan.shards for name in (shard.file, *shard.links)}
    with (
        staged(
            out,
            mark=MANIFEST,
            foreign_file=foreign_file,
            overwrite=request.overwrite,
            fsync=request.fsync,
            key=plan_digest(plan),
            journal=JOURNAL,
            note=note,
        ) as scratch,
        closing(Journal(scratch, parts)) as journal,
    ):
        there = bytes_in(scratch) if journal.goes_on else 0
        if there:
            note(f"{out}: goes on with a merge that was cut off; {there / 1e9:.3g} GB of it are there")
        copied = sum(content.stat().st_size for content in beside.values() if isinstance(content, Path))
        _check_space(scratch, plan.bytes_on_disk + len(plan.outputs) * copied - there)
        # 3. Write the shards: copy what is copied, fold what is folded.
        folded = execute(plan, scratch, journal, progress)
        # 4. Write what stands beside them, for each output.
        hashes = _hash_files(plan, scratch) if request.hash == "full" else {}
        return tuple(_finish(plan, output, beside, scratch, folded, hashes, record) for output in plan.outputs)


def _finish(
    plan: MergePlan,
    output: Output,
    beside: Companions,
    scratch: Path,
    folded: "tuple[Folded, ...]",
    file_hashes: Mapping[str, str],
    record: Callable[[Output, Made], Manifest],
) -> MergedCheckpoint:
    """Write what stands beside the weights of one output."""
    folder, files = scratch / output.folder, output.files
    # 1. Configuration, index, tokenizer, licences.
    companion_hashes = {name: file_sha256(folder / name) for name in write_companions(beside, output, folder)}
    # 2. Pick this output's share of the folds' results.
    stored_in = {shard.file for shard in files.values()}
    tensor_hashes, measured = {}, []
    for fold, result in zip(plan.folds, folded, strict=True):
        for target, sha256, products in zip(fold.targets, result.sha256, result.products, strict=True):
            if target.file in stored_in:
                tensor_hashes[fold.name] = sha256
                measured += [(fold.name, math.prod(fold.shape), products)] if fold.deltas else []
    losses = summarise(measured)
    # 3. The record and the card. The record comes last: it makes a directory a checkpoint that verify accepts.
    whole_files = {name: file_hashes[shard.file] for name, shard in files.items() if shard.file in file_hashes}
    manifest = record(output, Made(tensor_hashes, companion_hashes, whole_files, losses))
    (folder / CARD).write_text(model_card(asdict(manifest)), encoding="utf-8")
    for name, shard in files.items():
        if shard.links:
            (folder / name).chmod(0o444)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    unchanged = not tensor_hashes and not plan.base.overrides
    return MergedCheckpoint(plan.request.destination / output.folder, output.alpha, losses, unchanged)


def _hash_files(plan: MergePlan, scratch: Path) -> dict[str, str]:
    """sha256 of every file of weights, by its name in the plan."""
    names = [shard.file for shard in plan.shards]
    with ThreadPoolExecutor(cores()) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(scratch / name), names), strict=True))


def _check_place(out: Path, plan: MergePlan) -> None:
    """Refuse an output that is inside a source, or that a source is inside of."""
    target = out.resolve()
    for source in (plan.base.source, *(planned.adapter.source for planned in plan.adapters)):
        root = source.path.resolve()
        if target.is_relative_to(root):
            raise OutputError(f"{out}: is inside the source {source.given}; choose an --out elsewhere")
        if root.is_relative_to(target):
            raise OutputError(f"{out}: the source {source.given} is inside it; choose another --out")


def _check_space(scratch: Path, needed: int) -> None:
    free = shutil.disk_usage(scratch).free
    if needed + _MARGIN_BYTES > free:
        raise OutputError(
            f"{scratch.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make "
            "room, or choose an --out on another disk"
        )
