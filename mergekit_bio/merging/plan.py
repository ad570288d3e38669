"""The merge as data: what is copied, what is folded, and where every byte goes.

Nothing here reads a weight or writes a file; a plan can be printed, tested and compared before it is carried out.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.adapter.adapter import LM_HEAD, Adapter, Base
from mergekit_bio.adapter.delta import Delta, Dense, Dora, StoredTensor
from mergekit_bio.audio.names import merged_name
from mergekit_bio.checkpoint.checkpoint import SINGLE
from mergekit_bio.checkpoint.header import DTYPES, FLOATS, Shard, TensorInfo, build_header
from mergekit_bio.errors import AdapterError
from mergekit_bio.merging.alpha import Alpha
from mergekit_bio.merging.tying import resolve_tying

if TYPE_CHECKING:
    import torch

#: Folded tensors of a sweep are gathered in shards of at most this size, as the hub's own tools do.
MAX_SHARD_BYTES = 5_000_000_000


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
        adapters: The adapters, each with the strength of its own or None for the merge's.
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

    @property
    def memory_estimate(self) -> int:
        """Bytes of buffers and factors beside what torch itself takes: a few tensors, whatever the model's size."""
        blocks = 64 << 20  # the buffers of a machine's workers, see fold.BLOCK_ELEMENTS
        return blocks + 4 * max((_nbytes(t) for f in self.folds for _, d in f.deltas for t in d.stored), default=0)

    @property
    def seconds_estimate(self) -> float:
        """A guess from rates measured on two cores of a server with its files in memory; not a benchmark."""
        return 1.5 + (self.bytes_on_disk - self.bytes_folded) / 2.5e9 + self.bytes_folded / 1.0e9


@dataclass
class _Piece:
    """A tensor of the output, before it has a place."""

    name: str
    source: TensorInfo
    dtype: str
    shape: tuple[int, ...]
    strengths: dict[int, tuple[float, ...]] = field(default_factory=dict)  # by output; absent where it is a copy
    deltas: tuple[tuple[int, Delta], ...] = ()

    @property
    def converted(self) -> bool:
        return self.dtype != self.source.dtype or self.shape != self.source.shape

    def as_stored(self, file: str, offset: int) -> TensorInfo:
        return TensorInfo(self.name, self.dtype, self.shape, Path(file), offset)


def build_plan(
    *,
    base: Base,
    adapters: Sequence[Adapter],
    fixed: Sequence[Alpha | None],
    alphas: Sequence[Alpha],
    dtype: str = "keep",
    text_only: bool = False,
    share: bool = True,
) -> MergePlan:
    """Decide what to do with every tensor.

    Args:
        base: What is merged into.
        adapters: What is merged, summed.
        fixed: For each adapter a strength of its own, or None for that of ``alphas``.
        alphas: The strengths, one output each.
        dtype: ``"keep"``, or torch's name of a dtype for all weights.
        text_only: Leave an audio tower out.
        share: Store what several outputs have in common once, under several names.

    Raises:
        AdapterError: The adapters do not fit together.
        AlphaError: A strength names modules that no adapter changes.
    """
    towers = [adapter for adapter in adapters if adapter.tower]
    if len(towers) > 1 and not text_only:
        raise AdapterError(
            f"{towers[1].source.given}: brings an audio tower, and {towers[0].source.given} has one already; use "
            "--text-only"
        )
    changes, untied = resolve_tying(base, adapters)
    for alpha in (*alphas, *(alpha for alpha in fixed if alpha is not None)):
        alpha.check_used(changes)
    wanted = next((key for key, (_, name) in DTYPES.items() if name == dtype), None)
    pieces = _pieces(base, changes, fixed, alphas, wanted, untied)
    tower = [] if text_only else [_carried(info) for adapter in adapters for info in adapter.tower]
    groups = _base_groups(base, pieces, untied)
    several = len(alphas) > 1
    if several and share:
        layout = _shared_layout(groups, len(alphas))
    else:
        layout = [(group, (number,)) for number in range(len(alphas)) for group in groups]
    if tower:
        owners = [tuple(range(len(alphas)))] if share else [(number,) for number in range(len(alphas))]
        layout.extend((tower, owner) for owner in owners)
    folders = [f"alpha-{alpha.label}" if several else "" for alpha in alphas]
    outputs, shards, folds = _place(layout, folders, alphas, base)
    grown = _grown_rows(base, pieces)
    return MergePlan(base, tuple(adapters), tuple(fixed), outputs, shards, folds, untied, grown, dtype, text_only)


def _nbytes(tensor: object) -> int:
    return tensor.nbytes if isinstance(tensor, TensorInfo) else 0


def _carried(info: TensorInfo) -> _Piece:
    return _Piece(merged_name(info.name), info, info.dtype, info.shape)


def _pieces(
    base: Base,
    changes: Mapping[str, tuple[tuple[int, Delta], ...]],
    fixed: Sequence[Alpha | None],
    alphas: Sequence[Alpha],
    wanted: str | None,
    untied: bool,
) -> dict[str, _Piece]:
    names = list(base.checkpoint.tensors) + ([LM_HEAD] if untied else [])
    pieces = {}
    for name in names:
        source = base.find(name)
        assert source is not None
        dtype = wanted if wanted and source.dtype in FLOATS else source.dtype
        deltas = changes.get(name, ())
        piece = _Piece(name, source, dtype, _shape(name, source, deltas), deltas=deltas)
        for number, alpha in enumerate(alphas):
            strengths = tuple((fixed[adapter] or alpha).of(name) for adapter, _ in deltas)
            if any(strengths) or piece.converted:  # at strength 0 the base's own bytes are the result
                piece.strengths[number] = strengths
        pieces[name] = piece
    return pieces


def _shape(name: str, source: TensorInfo, deltas: tuple[tuple[int, Delta], ...]) -> tuple[int, ...]:
    """The base's shape, or the grown one if an adapter brings new rows; those must then be one adapter's."""
    grown = {adapter: delta.shape for adapter, delta in deltas if delta.shape != source.shape}
    if not grown:
        return source.shape
    if len(grown) > 1 or len(deltas) != sum(adapter in grown for adapter, _ in deltas):
        raise AdapterError(f"{name}: one adapter brings new rows for it and another changes it too; merge them in turn")
    if not any(isinstance(delta, Dense) or (isinstance(delta, Dora) and delta.origin) for _, delta in deltas):
        first = deltas[0][1].stored[0]
        raise AdapterError(
            f"{first.file}: tensor {first.name}: is for a larger vocabulary, but the new rows are not there"
        )
    return next(iter(grown.values()))


def _grown_rows(base: Base, pieces: Mapping[str, _Piece]) -> int | None:
    """The new number of rows, if the vocabulary grows; both sides must then grow alike."""
    sides = [piece for name, piece in pieces.items() if name in (base.input_embedding, LM_HEAD)]
    grown = {piece.shape[0] for piece in sides if piece.shape != piece.source.shape}
    if not grown:
        return None
    for piece in sides:
        if {piece.shape[0]} != grown:
            raise AdapterError(
                f"{piece.name}: the adapter brings a vocabulary of {max(grown)}, but no rows for this tensor of "
                f"{piece.shape[0]}; save the adapter with save_embedding_layers=True"
            )
    return grown.pop()


def _base_groups(base: Base, pieces: Mapping[str, _Piece], untied: bool) -> list[list[_Piece]]:
    """The base's sharding; a new head joins the input embedding's shard."""
    groups = [[pieces[info.name] for info in shard.tensors] for shard in base.checkpoint.shards]
    if untied:
        head = pieces[LM_HEAD]
        next(group for group in groups if any(piece.name == base.input_embedding for piece in group)).append(head)
    return groups


def _shared_layout(groups: list[list[_Piece]], count: int) -> list[tuple[list[_Piece], tuple[int, ...]]]:
    """Regroup for a sweep: what differs between outputs in shards of its own, the rest once for all."""
    everyone = tuple(range(count))
    layout = []
    differing: list[list[_Piece]] = [[]]
    size = 0
    for group in groups:
        common = [piece for piece in group if not piece.deltas or not piece.strengths]
        if common:
            layout.append((common, everyone))
        for piece in group:
            if piece.deltas and piece.strengths:
                nbytes = piece.as_stored("", 0).nbytes
                if differing[-1] and size + nbytes > MAX_SHARD_BYTES:
                    differing.append([])
                    size = 0
                differing[-1].append(piece)
                size += nbytes
    layout.extend((part, (number,)) for number in everyone for part in differing if part)
    return layout


def _place(
    layout: list[tuple[list[_Piece], tuple[int, ...]]], folders: Sequence[str], alphas: Sequence[Alpha], base: Base
) -> tuple[tuple[Output, ...], tuple[OutputShard, ...], tuple[Fold, ...]]:
    """Give every shard its names and every tensor its offset."""
    counts = [sum(number in owners for _, owners in layout) for number in range(len(alphas))]
    names: list[list[str]] = [[] for _ in alphas]
    originals = {
        tuple((info.name, info.dtype, info.shape) for info in shard.tensors): shard for shard in base.checkpoint.shards
    }
    shards = []
    targets: dict[str, tuple[_Piece, list[Target]]] = {}
    for group, owners in layout:
        paths = []
        for number in owners:
            name = (
                SINGLE
                if counts[number] == 1
                else f"model-{len(names[number]) + 1:05d}-of-{counts[number]:05d}.safetensors"
            )
            names[number].append(name)
            paths.append(f"{folders[number]}/{name}".lstrip("/"))
        original = originals.get(tuple((piece.name, piece.dtype, piece.shape) for piece in group))
        shards.append(_shard(paths, group, owners[0], targets, original))
    outputs = tuple(Output(*each) for each in zip(alphas, folders, map(tuple, names), strict=True))
    folds = tuple(
        Fold(piece.name, piece.source, piece.shape, piece.dtype, piece.deltas, tuple(places))
        for piece, places in targets.values()
    )
    return outputs, tuple(shards), folds


def _shard(
    paths: list[str],
    group: list[_Piece],
    number: int,
    targets: dict[str, tuple[_Piece, list[Target]]],
    original: Shard | None,
) -> OutputShard:
    if original is None:
        # Wider types first, as safetensors' own writer has it: so every tensor is aligned to its elements.
        group = sorted(group, key=lambda piece: -DTYPES[piece.dtype][0])
        header = build_header(((piece.name, piece.dtype, piece.shape) for piece in group), {"format": "pt"})
    else:
        header = original.header
    offset = len(header)
    copies: list[Copy] = []
    for piece in group:
        nbytes = piece.as_stored(paths[0], offset).nbytes
        if number in piece.strengths:
            target = Target(piece.strengths[number], paths[0], offset)
            targets.setdefault(piece.name, (piece, []))[1].append(target)
        else:
            copies.append(Copy(piece.source.file, piece.source.begin, offset, nbytes))
        offset += nbytes
    return OutputShard(
        file=paths[0],
        header=header,
        size=offset,
        tensors=tuple(piece.name for piece in group),
        copies=tuple(_joined(copies)),
        mirrors=original.file if original else None,
        links=tuple(paths[1:]),
    )


def _joined(copies: Iterable[Copy]) -> list[Copy]:
    """Neighbouring ranges of one file become one."""
    joined: list[Copy] = []
    for copy in copies:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.source == copy.source
            and last.source_offset + last.count == copy.source_offset
            and last.target_offset + last.count == copy.target_offset
        ):
            joined[-1] = Copy(last.source, last.source_offset, last.target_offset, last.count + copy.count)
        elif copy.count:
            joined.append(copy)
    return joined
