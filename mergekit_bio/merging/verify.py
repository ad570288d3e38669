"""Checking a merged checkpoint against its manifest, and against the sources it was made from."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.audio.names import merged_name
from mergekit_bio.checkpoint.compare import same_bytes
from mergekit_bio.checkpoint.digest import file_sha256
from mergekit_bio.checkpoint.directory import INDEX, SINGLE, Checkpoint, inside
from mergekit_bio.checkpoint.header import TensorInfo, read_exactly
from mergekit_bio.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from mergekit_bio.errors import CheckpointError, VerificationError
from mergekit_bio.merging.layouts import check_layouts
from mergekit_bio.merging.plan import Fold
from mergekit_bio.merging.replan import plan_again

if TYPE_CHECKING:
    import torch

_CHUNK = 8 << 20


@dataclass(frozen=True)
class Verification:
    """What was checked, and found right.

    Attributes:
        directory: The checkpoint.
        files: Shards whose size and header were compared.
        companions: Files beside them whose sha256 was compared.
        hashed: Tensors whose sha256 was compared.
        copied: Tensors that were compared with the source byte by byte; None without sources.
        recomputed: Tensors that were folded again in float64; None without sources.
        worst_ulp: The largest distance of a written value from the exact one, in units of the last place.
        worst_tensor: Where that was.
    """

    directory: Path
    files: int
    companions: int
    hashed: int
    copied: int | None = None
    recomputed: int | None = None
    worst_ulp: float | None = None
    worst_tensor: str | None = None


def verify(
    directory: str | Path,
    *,
    against_sources: bool = False,
    base: str | None = None,
    adapters: list[str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Check a merged checkpoint.

    Args:
        directory: What a merge has written.
        against_sources: Also compare every copied tensor with its source, and compute every folded one again in
            float64.
        base: Where the base is now, if not where it was.
        adapters: Likewise for the adapters, in their order.
        progress: Called with the number of bytes of each checked tensor.

    Raises:
        VerificationError: The first thing that is not as the manifest says.
        MergekitBioError: A source cannot be found.
    """
    root = Path(directory)
    if not root.is_dir():
        raise VerificationError(f"{root}: no such directory")
    manifest = read_manifest(root)
    try:
        checkpoint = Checkpoint.open(root)
        checkpoint.config  # noqa: B018 - reading it is the check
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    _check_files(root, manifest, checkpoint)
    for name, record in manifest.tensors.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise VerificationError(f"{root}: tensor {name} is missing")
        if _sha256(info) != record.sha256:
            raise VerificationError(f"{info.where}: was changed after the merge (sha256 differs)")
        progress(info.nbytes)
    result = Verification(root, len(manifest.files), len(manifest.companions), len(manifest.tensors))
    if not against_sources:
        return result
    return _against_sources(result, manifest, checkpoint, base, adapters, progress)


def _check_files(root: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    shards = {shard.file.name: shard for shard in checkpoint.shards}
    for name, record in manifest.files.items():
        if name not in shards:
            raise VerificationError(f"{root / name}: is in {MANIFEST} but not in the checkpoint")
        found = shards[name].size, hashlib.sha256(shards[name].header).hexdigest()
        if found != (record.bytes, record.header_sha256):
            raise VerificationError(f"{root / name}: size or header is not what the merge wrote")
        if record.sha256 and file_sha256(inside(root, name)) != record.sha256:
            raise VerificationError(f"{root / name}: was changed after the merge (sha256 differs)")
    present = {path.name for path in root.glob("*.safetensors")}
    for name in sorted(present - manifest.files.keys()):
        raise VerificationError(f"{root / name}: is not part of the merge; remove it")
    if len(shards) > 1 and (root / SINGLE).exists():
        raise VerificationError(f"{root / SINGLE}: stands beside {INDEX}; remove one")
    for name, sha256 in manifest.companions.items():
        if not (root / name).is_file():
            raise VerificationError(f"{root / name}: is missing; the merge wrote it")
        if file_sha256(inside(root, name)) != sha256:
            raise VerificationError(f"{root / name}: was changed after the merge (sha256 differs)")


def _sha256(info: TensorInfo) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(info.nbytes, _CHUNK)))
    with info.file.open("rb", buffering=0) as stream:
        for offset in range(0, info.nbytes, _CHUNK):
            piece = buffer[: info.nbytes - offset]
            read_exactly(stream.fileno(), piece, info.begin + offset, info.file)
            digest.update(piece)
    return digest.hexdigest()


def _against_sources(
    result: Verification,
    manifest: Manifest,
    checkpoint: Checkpoint,
    base: str | None,
    adapters: list[str] | None,
    progress: Callable[[int], None],
) -> Verification:
    # 1. Plan the merge again, from the same weights.
    whole, output_index = plan_again(manifest, base, adapters)
    plan = whole.only(output_index)
    check_layouts(plan)
    planned = {name for shard in plan.shards for name in shard.tensors}
    if planned != checkpoint.tensors.keys():
        name = min(planned ^ checkpoint.tensors.keys())
        raise VerificationError(f"{result.directory}: tensor {name}: is not in both the checkpoint and its sources")
    # 2. Compare what was copied, and fold the rest again.
    folds = {fold.name: fold for fold in plan.folds}
    towers = {merged_name(info.name): info for info in plan.tower}
    copied, worst, worst_tensor = 0, 0.0, None
    for name, info in checkpoint.tensors.items():
        if name in folds:
            distance = _recompute(folds[name], info, stochastic=manifest.rounding == "stochastic")
            if distance >= worst:
                worst, worst_tensor = distance, name
        else:
            source = towers.get(name) or plan.base.origin(name.removeprefix(plan.base.missing_prefix))
            if source.nbytes != info.nbytes or not same_bytes(source, info):
                raise VerificationError(f"{info.where}: is not what {source.file} holds")
            copied += 1
        progress(info.nbytes)
    return replace(result, copied=copied, recomputed=len(folds), worst_ulp=worst, worst_tensor=worst_tensor)


#: What float32 sums and products may be off by, relative to their terms: 2^-23 with room for a rank's worth of them.
_TERMS_PRECISION = 2.0**-18


def _recompute(fold: Fold, written: TensorInfo, *, stochastic: bool) -> float:
    """Fold one tensor again in float64; return the largest distance in units of the last place of its dtype."""
    import torch

    device, double = torch.device("cpu"), torch.float64
    blocks = [delta.prepare(fold.base, device, double) for delta in fold.deltas]
    strengths = fold.targets[0].strengths
    rows = written.rows if written.elements else 0
    step = max(1, (1 << 21) // max(written.elements // max(rows, 1), 1))
    # Half a unit for the nearest value, a whole one for either neighbour; a little more where float32 sums fell short.
    narrow = written.dtype in ("BF16", "F16")
    limit = (1.0 if stochastic and narrow else 0.5) + (0.05 if narrow else 0.51)
    worst = 0.0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = written.read(start, stop).reshape(stop - start, -1)
        w0 = fold.base_rows(start, stop).reshape(values.shape).to(double)
        exact, terms = w0.clone(), w0.abs()
        for strength, block in zip(strengths, blocks, strict=True):
            delta = torch.empty_like(w0)
            block(start, stop, w0, delta)
            exact.add_(delta, alpha=strength)
            terms.add_(delta.abs(), alpha=abs(strength))
        # Where base and delta nearly cancel, the sum's own unit is finer than the precision of its terms.
        excess = (values.to(double) - exact).where(values != exact, 0).abs() - terms * (
            _TERMS_PRECISION if narrow else 0
        )
        distance = float((excess.clamp_(min=0) / _ulp(exact, values.dtype)).max())
        if not distance <= limit:
            raise VerificationError(
                f"{written.where}: is {distance:.2f} units of the last place from what its sources "
                f"give; {limit:.2f} is the most that rounding explains"
            )
        worst = max(worst, distance)
    return worst


def _ulp(values: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """The spacing of ``dtype``'s numbers around each of ``values`` (float64)."""
    import torch

    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    smallest = math.log2(info.tiny)
    return torch.exp2(torch.clamp(exponent - 1, min=smallest).double() + math.log2(info.eps))
