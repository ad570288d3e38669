"""The merge as data: what is copied, what is folded, and where every byte goes.

A plan can be printed, tested and compared before it is carried out.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.adapter.delta import Delta
from mergekit_bio.adapter.interface import Adapter, Base
from mergekit_bio.checkpoint.header import StoredTensor, TensorInfo, nbytes_of
from mergekit_bio.merging.alpha import Alpha
from mergekit_bio.merging.request import MergeRequest
from mergekit_bio.merging.tokenizers import TokenizerChoice

if TYPE_CHECKING:
    import torch

#: The version of what a fold computes, step by step (docs/checkpoint.md, "The arithmetic"). Whoever changes that, here
#: or in a delta, counts it up. The first one, of manifests before the third format, took products in float32.
ARITHMETIC = 2


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
        deltas: What is added.
        targets: One for every output it differs in.
    """

    name: str
    base: TensorInfo
    shape: tuple[int, ...]
    dtype: str
    deltas: tuple[Delta, ...]
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the result, at each target."""
        return nbytes_of(self.dtype, self.shape)

    def base_rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows ``[start, stop)`` of W0; those beyond the base's come from the adapter that brings them."""
        import torch

        end_of_base = max(start, min(stop, self.base.rows))
        parts = [self.base.read(start, end_of_base)] if start < end_of_base else []
        parts += [self.new_rows().read(end_of_base, stop)] if end_of_base < stop else []
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[-1].dtype) for part in parts])

    def new_rows(self) -> StoredTensor:
        """The tensor that holds the rows which the base lacks; planning has made sure that there is one."""
        return next(delta.new_rows for delta in self.deltas if delta.new_rows is not None)


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


@dataclass(frozen=True)
class Output:
    """One checkpoint to be written.

    Attributes:
        alpha: Its strength.
        folder: Relative to the output directory; empty for the directory itself.
        files: Its shards, by the names that they have there, in order.
    """

    alpha: Alpha
    folder: str
    files: dict[str, OutputShard] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedAdapter:
    """An adapter, and what the merge does with it.

    Attributes:
        adapter: As it was read.
        alpha: The strength of its own; None where it gets the merge's.
        changed: The tensors that it changes.
    """

    adapter: Adapter
    alpha: Alpha | None
    changed: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do.

    Attributes:
        request: What was asked for.
        base: The base.
        adapters: The adapters, in the request's order.
        outputs: The checkpoints, one for each strength.
        shards: The files.
        folds: The tensors computed anew.
        untied: Whether the output head gets a matrix of its own that the base shares with the input embedding.
        vocabulary: Rows of the embeddings, where an adapter brings more than the base has.
        tokenizer: Whose tokenizer goes along.
    """

    request: MergeRequest
    base: Base
    adapters: tuple[PlannedAdapter, ...]
    outputs: tuple[Output, ...]
    shards: tuple[OutputShard, ...]
    folds: tuple[Fold, ...]
    untied: bool
    vocabulary: int | None
    tokenizer: TokenizerChoice

    def only(self, index: int) -> "MergePlan":
        """What makes one output alone, its files at the root of the output directory."""
        output = self.outputs[index]
        names = {shard.file: name for name, shard in output.files.items()}
        files = {name: replace(shard, file=name, links=()) for name, shard in output.files.items()}
        targets = [
            tuple(replace(target, file=names[target.file]) for target in fold.targets if target.file in names)
            for fold in self.folds
        ]
        folds = (replace(fold, targets=own) for fold, own in zip(self.folds, targets, strict=True) if own)
        alone = Output(output.alpha, "", files)
        return replace(self, outputs=(alone,), shards=tuple(files.values()), folds=tuple(folds))

    @property
    def tower(self) -> tuple[TensorInfo, ...]:
        """The audio tower that goes along."""
        if self.request.text_only:
            return ()
        return tuple(info for planned in self.adapters for info in planned.adapter.tower)

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
        stored = {id(tensor): tensor for fold in self.folds for delta in fold.deltas for tensor in delta.stored}
        of_adapters = sum(nbytes_of(tensor.dtype, tensor.shape) for tensor in stored.values())
        return sum(fold.base.nbytes for fold in self.folds) + of_adapters
