"""Decides what happens to every tensor of a merge, from the headers of its sources.

Nothing here reads a weight or writes a file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_bio.adapter.adapter import LM_HEAD, Adapter, Base
from mergekit_bio.adapter.delta import Delta, Dense, Dora
from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.names import merged_name
from mergekit_bio.audio.tower import PROJECTION, check_tower
from mergekit_bio.checkpoint.checkpoint import SINGLE
from mergekit_bio.checkpoint.header import DTYPES, FLOATS, Shard, TensorInfo, build_header
from mergekit_bio.errors import AdapterError, AlphaError
from mergekit_bio.merging.alpha import Alpha
from mergekit_bio.merging.plan import Copy, Fold, MergePlan, Output, OutputShard, Target
from mergekit_bio.merging.tying import resolve_tying

#: Folded tensors of a sweep are gathered in shards of at most this size, as the hub's own tools do.
MAX_SHARD_BYTES = 5_000_000_000


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
    base_from_adapter: bool = False,
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
        base_from_adapter: Where an adapter repeats a tensor of the base with other values, take the adapter's.
        share: Store what several outputs have in common once, under several names.

    Raises:
        AdapterError: The adapters do not fit together, an audio tower is not what its configuration asks for, or an
            adapter was made from another base.
        AlphaError: A strength names modules that no adapter changes.
    """
    towers = [adapter for adapter in adapters if adapter.tower]
    if len(towers) > 1 and not text_only:
        raise AdapterError(
            f"{towers[1].source.given}: brings an audio tower, and {towers[0].source.given} has one already; use "
            "--text-only"
        )
    if not text_only:
        for adapter in towers:
            _check_tower(adapter, base)
    base = _with_overrides(base, adapters, base_from_adapter)
    changes, untied = resolve_tying(base, adapters)
    changed = tuple(
        tuple(name for name, deltas in changes.items() if any(owner == number for owner, _ in deltas))
        for number in range(len(adapters))
    )
    _check_strengths(changed, fixed, alphas)
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
    return MergePlan(
        base, tuple(adapters), tuple(fixed), changed, outputs, shards, folds, untied, grown, dtype, text_only
    )


def _check_tower(adapter: Adapter, base: Base) -> None:
    """An audio tower must hold every tensor that its configuration asks for, no other, and be as wide as the base."""
    hidden_size = next((info.shape[0] for info in adapter.tower if info.name == PROJECTION and info.shape), None)
    if hidden_size is None:
        raise AdapterError(f"{adapter.file}: lacks the tensor {PROJECTION} of the audio tower; fetch it again")
    width = base.checkpoint.config.get("hidden_size", hidden_size)
    if hidden_size != width:
        raise AdapterError(
            f"{adapter.file}: tensor {PROJECTION}: gives embeddings of width {hidden_size}, but the base "
            f"{base.source.given} has hidden_size {width}; it was made for another base"
        )
    config = AudioPrefixConfig.from_naturelm(dict(adapter.config), hidden_size=hidden_size)
    check_tower({info.name: info for info in adapter.tower}, config, adapter.file)


def _with_overrides(base: Base, adapters: Sequence[Adapter], base_from_adapter: bool) -> Base:
    """The base, with the tensors in its place that adapters repeat with other values, if that is wanted."""
    overrides: dict[str, TensorInfo] = {}
    for adapter in adapters:
        for name, override in adapter.overrides.items():
            tensor, rows = override.tensor, override.rows
            where = f"{tensor.file}: tensor {tensor.name}"
            if not base_from_adapter:
                more = f" (and {len(adapter.overrides) - 1} more tensors do)" if len(adapter.overrides) > 1 else ""
                in_rows = (
                    f" in {len(rows)} of {tensor.rows} rows, the first is row {rows[0]}" if tensor.rows > 1 else ""
                )
                raise AdapterError(
                    f"{where}: differs from {name} of the base {base.source.given}{in_rows}{more}; this checkpoint was "
                    "made from another base: give that, or take the adapter's own weights at every alpha with "
                    "--base-from-adapter, as its original code does"
                )
            if name in overrides:
                raise AdapterError(f"{where}: another adapter brings its own {name} too; merge them in turn")
            overrides[name] = tensor
    return replace(base, overrides=overrides)


def _check_strengths(changed: Sequence[Sequence[str]], fixed: Sequence[Alpha | None], alphas: Sequence[Alpha]) -> None:
    """Every strength must be about tensors of the adapters that it is for."""
    for names, own in zip(changed, fixed, strict=True):
        if own is not None:
            own.check_used(names)
    shared = [name for names, own in zip(changed, fixed, strict=True) if own is None for name in names]
    for alpha in alphas:
        if alpha.modules and not shared:
            raise AlphaError(f"--alpha: {alpha.label} is about nothing: every adapter has a strength of its own")
        alpha.check_used(shared)


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
        source, own = base.origin(name), base.find(name)
        assert own is not None
        dtype = wanted if wanted and own.dtype in FLOATS else own.dtype
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
        mirrors=original.file if original and all(piece.source.file == original.file for piece in group) else None,
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
