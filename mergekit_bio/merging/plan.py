"""The merge as data: what is copied, what is folded, and where every byte goes.

A plan can be printed, tested and compared before it is carried out.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.adapter.adapter import Adapter, Base, Override
from mergekit_bio.adapter.delta import Delta, Dense, Dora, StoredTensor
from mergekit_bio.checkpoint.header import TensorInfo
from mergekit_bio.merging.alpha import Alpha

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Target:
    """One place a folded tensor goes to.

    Attributes:
        strengths: The strength of each of the fold's deltas.
        file: Output file, relative to the output directory.
        offset: Of its first byte in that file.
    """

    strengths: tuple[float, ...]
    file: str
    offset: int


@dataclass(frozen=True)
class Fold:
    """One tensor computed anew: ``W0 + sum(strength * delta)``, rounded to ``dtype``, for every target.

    Without deltas it is a conversion of ``base`` to ``dtype``.

    Attributes:
        name: Its name in the output.
        base: W0.
        shape: Of the output; it may have more rows than the base.
        dtype: Of the output, as safetensors writes it.
        deltas: (number of the adapter, delta) of each.
        targets: One for every output it differs in.
    """

    name: str
    base: TensorInfo
    shape: tuple[int, ...]
    dtype: str
    deltas: tuple[tuple[int, Delta], ...]
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the result, at each target."""
        return TensorInfo(self.name, self.dtype, self.shape, self.base.file, 0).nbytes

    def base_rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows ``[start, stop)`` of W0; those beyond the base's come from the adapter that brings them."""
        import torch

        own = max(start, min(stop, self.base.rows))
        parts = [self.base.read(start, own)] if start < own else []
        parts += [self.new_rows().read(own, stop)] if own < stop else []
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[-1].dtype) for part in parts])

    def new_rows(self) -> StoredTensor:
        """The tensor that holds the rows which the base lacks."""
        for _, delta in self.deltas:
            if isinstance(delta, Dense):
                return delta.tuned
            if isinstance(delta, Dora) and delta.origin is not None:
                return delta.origin
        raise AssertionError(f"{self.name}: the plan has no source for its new rows")


@dataclass(frozen=True)
class Copy:
    """A range of bytes taken over as it is."""

    source: Path
    source_offset: int
    target_offset: int
    count: int


@dataclass(frozen=True)
class OutputShard:
    """One safetensors file to be written.

    Attributes:
        file: Relative to the output directory.
        header: Its first bytes.
        size: Bytes of the whole file.
        tensors: Names of what it holds, in order.
        copies: The ranges that are not folded.
        mirrors: The source file whose layout it keeps, if it does: then the file system may share the data.
        links: Further names of the same file, in the other outputs of a sweep.
    """

    file: str
    header: bytes
    size: int
    tensors: tuple[str, ...]
    copies: tuple[Copy, ...]
    mirrors: Path | None
    links: tuple[str, ...] = ()

    @property
    def header_sha256(self) -> str:
        """Hex digest of the header: names, dtypes, shapes and offsets."""
        return hashlib.sha256(self.header).hexdigest()


@dataclass(frozen=True)
class Output:
    """One checkpoint to be written.

    Attributes:
        alpha: Its strength.
        folder: Relative to the output directory; empty for the directory itself.
        files: Its shards' names, in order.
    """

    alpha: Alpha
    folder: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do.

    Attributes:
        base: The base.
        adapters: The adapters.
        fixed: For each adapter the strength of its own, or None for the merge's.
        changed: For each adapter the tensors that it changes.
        outputs: The checkpoints, one for each strength.
        shards: The files.
        folds: The tensors computed anew.
        untied: Whether the output head gets a matrix of its own that the base shares with the input embedding.
        vocabulary: Rows of the embeddings, where an adapter brings more than the base has.
        dtype: ``"keep"``, or torch's name of the dtype of all weights.
        text_only: Whether an audio tower was left out.
    """

    base: Base
    adapters: tuple[Adapter, ...]
    fixed: tuple[Alpha | None, ...]
    changed: tuple[tuple[str, ...], ...]
    outputs: tuple[Output, ...]
    shards: tuple[OutputShard, ...]
    folds: tuple[Fold, ...]
    untied: bool = False
    vocabulary: int | None = None
    dtype: str = "keep"
    text_only: bool = False

    def files_of(self, output: Output) -> dict[str, OutputShard]:
        """The shards of one output, by the name they have there."""
        return {
            Path(path).name: shard
            for shard in self.shards
            for path in (shard.file, *shard.links)
            if Path(path).parent == Path(output.folder)
        }

    @property
    def tower(self) -> tuple[TensorInfo, ...]:
        """The audio tower that goes along."""
        return () if self.text_only else tuple(info for adapter in self.adapters for info in adapter.tower)

    def overrides_of(self, adapter: Adapter) -> dict[str, Override]:
        """The tensors of the base in whose place this adapter's own are taken, at every strength."""
        return dict(adapter.overrides) if self.base.overrides else {}

    def stored_of(self, adapter: Adapter) -> dict[str, StoredTensor]:
        """Everything of an adapter that goes into the result, by name."""
        return adapter.stored | {one.stored.name: one.stored for one in self.overrides_of(adapter).values()}

    @property
    def bytes_on_disk(self) -> int:
        """Bytes that the output takes, files with several names counted once."""
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_folded(self) -> int:
        """Bytes that are computed."""
        return sum(fold.nbytes * len(fold.targets) for fold in self.folds)

    @property
    def bytes_read(self) -> int:
        """Bytes read into memory: folded tensors of the base, and their deltas."""
        stored = {id(tensor): tensor for fold in self.folds for _, delta in fold.deltas for tensor in delta.stored}
        return sum(fold.base.nbytes for fold in self.folds) + sum(_nbytes(tensor) for tensor in stored.values())


def _nbytes(tensor: object) -> int:
    return tensor.nbytes if isinstance(tensor, TensorInfo) else 0
