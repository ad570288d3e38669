"""Makes a merged checkpoint again from its receipt, the ``merge.json``, or refuses and says why.

Every hash of the receipt is compared: of folded tensors, small files and headers, and of whole files where the merge
was asked for those. Else copied tensors are known by their source's fingerprint: names, types, shapes and both ends.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from mergekit_bio.checkpoint.directory import INDEX
from mergekit_bio.checkpoint.manifest import MANIFEST, Manifest, read_manifest, read_manifest_file
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import VerificationError
from mergekit_bio.merging.directory import Companions, companion_sha256, companions
from mergekit_bio.merging.merge import MergedCheckpoint, write_outputs
from mergekit_bio.merging.plan import ARITHMETIC, MergePlan, Output
from mergekit_bio.merging.record import Made
from mergekit_bio.merging.replan import plan_again


@dataclass(frozen=True)
class RebuildPlan:
    """What a rebuild will do.

    Attributes:
        receipt: What was read.
        merge: The merge that it describes, of one checkpoint.
        beside: What stands beside the weights.
    """

    receipt: Manifest
    merge: MergePlan
    beside: Companions


def plan_rebuild(
    receipt: str | Path,
    *,
    out: str | Path,
    base: str | None = None,
    adapters: Sequence[str] | None = None,
    device: str = "auto",
    fsync: bool = True,
    overwrite: bool = False,
) -> RebuildPlan:
    """Read a receipt, find its sources, and make sure that they are what was merged; nothing is written.

    Args:
        receipt: A ``merge.json``, a directory that holds one, or a hub id of such a repository.
        out: The directory to make.
        base: Where the base is now, if not where it was.
        adapters: Likewise for the adapters, in their order.
        device: Where to compute; the bytes are the same.
        fsync: Have everything on the disk before the directory appears.
        overwrite: Replace a directory that a merge has written before.

    Raises:
        VerificationError: It is no receipt, of another arithmetic, or a source is not what was merged.
        MergekitBioError: A source cannot be found.
    """
    # 1. Read the receipt.
    path = Path(receipt)
    if path.is_file():
        manifest, named = read_manifest_file(path), str(path)
    else:
        folder = resolve(receipt, patterns=(MANIFEST,)).path
        manifest, named = read_manifest(folder), str(folder / MANIFEST)
    if manifest.arithmetic != ARITHMETIC:
        raise VerificationError(
            f"{named}: was merged by mergekit-bio {manifest.version}, whose arithmetic was another "
            f"({manifest.arithmetic}, this version's is {ARITHMETIC}), so its bytes cannot be made here; verify it "
            "against its sources, or merge again"
        )
    # 2. Plan the merge again, for this checkpoint alone.
    whole, output_index = plan_again(manifest, base, adapters)
    request = replace(
        whole.request,
        out=out,
        device=device,
        fsync=fsync,
        overwrite=overwrite,
        hash="full" if any(record.sha256 for record in manifest.files.values()) else "folded",
    )
    plan = replace(whole, request=request).only(output_index)
    # 3. Compare what can be compared before the work: files beside the weights, and the layout of the weights.
    names = [adapter.name for adapter in manifest.adapters]
    beside = {name: content for name, content in companions(whole, names).items() if name in manifest.companions}
    for name, recorded in sorted(manifest.companions.items()):
        content = beside.get(name)
        if name != INDEX and (content is None or companion_sha256(content) != recorded):
            what = "its source is gone" if content is None else "its source was changed"
            where = f" ({content})" if isinstance(content, Path) else ""
            raise VerificationError(f"{named}: {name} cannot be made again: {what} since{where}")
    (output,) = plan.outputs
    _compare("header of", _headers(output), {name: record.header_sha256 for name, record in manifest.files.items()})
    return RebuildPlan(manifest, plan, beside)


def rebuild(
    plan: RebuildPlan,
    progress: Callable[[int], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> MergedCheckpoint:
    """Fetch, fold, and compare every hash of the receipt before the directory appears.

    Args:
        plan: From :func:`plan_rebuild`.
        progress: Called with numbers of bytes that sum up to ``plan.merge.bytes_on_disk``.
        note: As of a merge's ``carry_out``.

    Returns:
        The checkpoint; its ``merge.json`` is the receipt.

    Raises:
        VerificationError: A hash is not the receipt's. Nothing is left behind.
        MergekitBioError: As a merge.
    """
    receipt = plan.receipt

    def compared(output: Output, made: Made) -> Manifest:
        _compare("tensor", made.tensors, {name: record.sha256 for name, record in receipt.tensors.items()})
        _compare("file", made.companions, receipt.companions)
        whole_files = {name: record.sha256 for name, record in receipt.files.items() if record.sha256}
        _compare("file", {name: made.files.get(name, "") for name in whole_files}, whole_files)
        return receipt

    (checkpoint,) = write_outputs(plan.merge, plan.beside, compared, progress, note)
    return checkpoint


def _headers(output: Output) -> dict[str, str]:
    return {name: sha256(shard.header).hexdigest() for name, shard in output.files.items()}


def _compare(what: str, found: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Make sure that all hashes are those of the receipt."""
    wrong = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise VerificationError(f"{what} {wrong[0]}{more}: is not what the receipt records (sha256 differs)")
