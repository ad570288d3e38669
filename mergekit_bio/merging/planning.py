"""Decides what happens to every tensor of a merge, from the headers of its sources.

Nothing here reads a weight or writes a file.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from mergekit_bio.adapter.interface import Adapter, Base
from mergekit_bio.adapter.layers import is_built
from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.names import merged_name
from mergekit_bio.audio.tower import PROJECTION, check_tower
from mergekit_bio.checkpoint.directory import SINGLE
from mergekit_bio.checkpoint.file_names import fitting
from mergekit_bio.checkpoint.header import DTYPES, FLOATS, Shard, TensorInfo, build_header, nbytes_of
from mergekit_bio.errors import AdapterError, AlphaError
from mergekit_bio.merging.alpha import Alpha
from mergekit_bio.merging.plan import Copy, Fold, MergePlan, Output, OutputShard, PlannedAdapter, Target
from mergekit_bio.merging.request import MergeRequest
from mergekit_bio.merging.tokenizers import choose_tokenizer
from mergekit_bio.merging.tying import Change, Changes, resolve_tying

#: What a file holds: name, dtype and shape of each tensor in it, in order.
_Entries: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]

#: Folded tensors of a sweep are gathered in shards of at most this size, as the hub's own tools do.
MAX_SHARD_BYTES = 5_000_000_000


@dataclass
class _Piece:
    """A tensor of the output, before it has a place.

    Attributes:
        name: Its name in the output.
        source: The stored tensor that it is copied or computed from.
        dtype: Of the output, as safetensors writes it.
        shape: Of the output.
        changes: What is added to it.
        strengths: Output index -> the strength of each change. An output that is not there gets a copy of ``source``.
        targets: Where it goes, once that is decided, in the outputs that do not get a copy.
    """

    name: str
    source: TensorInfo
    dtype: str
    shape: tuple[int, ...]
    changes: tuple[Change, ...] = ()
    strengths: dict[int, tuple[float, ...]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    @property
    def differs(self) -> bool:
        """Whether the outputs of a sweep may have different values for it."""
        return bool(self.changes and self.strengths)


@dataclass(frozen=True)
class _ShardPieces:
    """What goes into one safetensors file, before it has a name; several outputs share it by hard links."""

    pieces: list[_Piece]
    outputs: tuple[int, ...]


def build_plan(request: MergeRequest, base: Base, adapters: Sequence[Adapter]) -> MergePlan:
    """Decide what to do with every tensor.

    Args:
        request: What is asked for.
        base: What its ``base`` names.
        adapters: What its ``adapter`` names, in the same order.

    Raises:
        AdapterError: The adapters do not fit together, an audio tower is not what its configuration asks for, or an
            adapter was made from another base.
        AlphaError: A strength names modules that no adapter changes.
    """
    # 1. At most one audio tower goes along, and it must be whole and made for this base.
    towers = [] if request.text_only else [adapter for adapter in adapters if adapter.tower]
    if len(towers) > 1:
        raise AdapterError(
            f"{towers[1].source.given}: brings an audio tower, and {towers[0].source.given} has one already; use "
            "--text-only"
        )
    for adapter in towers:
        _check_tower(adapter, base)

    # 2. Find W0 of every tensor, everything that is added to it, and how strongly.
    base = _with_overrides(base, adapters, request.base_from_adapter)
    changes, untied = resolve_tying(base, adapters)
    layers = [name for name in base.checkpoint.tensors if is_built(name, base)]
    planned = tuple(
        PlannedAdapter(
            adapter,
            alpha=None if entry.fixed_alpha is None else entry.fixed_alpha.over(layers),
            changed=tuple(
                name for name, added in changes.items() if any(change.adapter_index == index for change in added)
            ),
        )
        for index, (adapter, entry) in enumerate(zip(adapters, request.adapters, strict=True))
    )
    alphas = [alpha.over(layers) for alpha in request.strengths]
    _check_strengths(planned, alphas)

    # 3. Decide each tensor's dtype, shape and strengths: whether it is copied, converted or folded.
    wanted = next((dtype for dtype, (_, torch_name) in DTYPES.items() if torch_name == request.dtype), None)
    vocabulary = _new_vocabulary(base, changes, untied)
    pieces = {
        name: _piece(name, base, planned, alphas, changes.get(name, ()), wanted, vocabulary)
        for name in [*base.checkpoint.tensors, *([str(base.head)] if untied else [])]
    }

    if untied:
        for name in base.checkpoint.tensors:
            pieces[name].name = f"{base.missing_prefix}{name}"

    # 4. Group the tensors into files as the base has them; a new output head joins the input embedding. With several
    # strengths, files that are equal are stored once.
    groups = [[pieces[info.name] for info in shard.tensors] for shard in base.checkpoint.shards]
    if untied:
        next(group for group in groups if pieces[str(base.input_embedding)] in group).append(pieces[str(base.head)])
    every_output = tuple(range(len(alphas)))
    each_output = [(output_index,) for output_index in every_output]
    if request.share and len(alphas) > 1:
        shards = _shared_shards(groups, every_output)
    else:
        shards = [_ShardPieces(group, outputs) for outputs in each_output for group in groups]
    for adapter in towers:
        tower = [_Piece(merged_name(info.name), info, info.dtype, info.shape) for info in adapter.tower]
        shards += [_ShardPieces(tower, outputs) for outputs in ([every_output] if request.share else each_output)]

    # 5. Name the files, and give every tensor its offset.
    outputs = tuple(Output(alpha, fitting(f"alpha-{alpha.label}") if len(alphas) > 1 else "") for alpha in alphas)
    written = _name_files(outputs, shards, base)
    folds = tuple(
        Fold(
            piece.name,
            piece.source,
            piece.shape,
            piece.dtype,
            tuple(change.delta for change in piece.changes),
            tuple(piece.targets),
        )
        for piece in pieces.values()
        if piece.targets
    )
    # 6. Choose the tokenizer, which must have a row for each of its tokens.
    embedding = pieces.get(str(base.input_embedding))
    tokenizer = choose_tokenizer(request, base, adapters, rows=embedding.shape[0] if embedding else None)
    return MergePlan(request, base, planned, outputs, written, folds, untied, vocabulary, tokenizer)


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
            if not base_from_adapter:
                more = f" (and {len(adapter.overrides) - 1} more tensors do)" if len(adapter.overrides) > 1 else ""
                in_rows = (
                    f" in {len(rows)} of {tensor.rows} rows, the first is row {rows[0]}" if tensor.rows > 1 else ""
                )
                raise AdapterError(
                    f"{tensor.where}: differs from {name} of the base {base.source.given}{in_rows}{more}; this "
                    "checkpoint was made from another base: give that, or take the adapter's own weights at every "
                    "alpha with --base-from-adapter, as its original code does"
                )
            if name in overrides:
                raise AdapterError(f"{tensor.where}: another adapter brings its own {name} too; merge them in turn")
            overrides[name] = tensor
    return replace(base, overrides=overrides)


def _check_strengths(planned: Sequence[PlannedAdapter], alphas: Sequence[Alpha]) -> None:
    """Every module that a strength names must be one that the adapters with this strength change."""
    for adapter in planned:
        if adapter.alpha is not None:
            adapter.alpha.check_used(adapter.changed)
    changed = [name for adapter in planned if adapter.alpha is None for name in adapter.changed]
    for alpha in alphas:
        if alpha.modules and not changed:
            raise AlphaError(f"--alpha: {alpha.label} is about nothing: every adapter has a strength of its own")
        alpha.check_used(changed)


def _piece(
    name: str,
    base: Base,
    planned: Sequence[PlannedAdapter],
    alphas: Sequence[Alpha],
    changes: tuple[Change, ...],
    wanted: str | None,
    vocabulary: int | None,
) -> _Piece:
    """Decide what becomes of one tensor.

    ``wanted`` is the dtype of all weights, ``vocabulary`` the embeddings' number of rows; None for the base's own.
    """
    source, in_base = base.origin(name), base.find(name)
    assert in_base is not None
    dtype = wanted if wanted and in_base.dtype in FLOATS else in_base.dtype
    shape = source.shape
    if vocabulary is not None and name in (base.input_embedding, base.head):
        shape = (vocabulary, *shape[1:])
    piece = _Piece(name, source, dtype, shape, changes)
    converted = (piece.dtype, piece.shape) != (source.dtype, source.shape)
    for output_index, alpha in enumerate(alphas):
        strengths = tuple((planned[change.adapter_index].alpha or alpha).of(name) for change in changes)
        if any(strengths) or converted:  # where all strengths are 0, the base's own bytes are the result
            piece.strengths[output_index] = strengths
    return piece


def _new_vocabulary(base: Base, changes: Changes, untied: bool) -> int | None:
    """The new number of rows, if an adapter brings another vocabulary; embedding and head must have the same."""
    stored = base.checkpoint.tensors
    sides = [name for name in (base.input_embedding, base.head) if name is not None and (name in stored or untied)]
    sizes = {name: {change.delta.shape[0] for change in changes.get(name, ())} for name in sides}
    rows = base.origin(sides[0]).rows if sides else 0
    resized = set().union(*sizes.values()) - {rows}
    if not resized:
        return None
    for name in sides:
        of_side = changes.get(name, ())
        # 1. A matrix of another size counts from the adapter that brings it, and nothing else can be added to it.
        if len({change.adapter_index for change in of_side}) > 1 and sizes[name] != {rows}:
            raise AdapterError(
                f"{name}: one adapter brings new rows for it and another changes it too; merge them in turn"
            )
        # 2. Rows that are left out need nothing; new ones must be there.
        if max(resized) <= rows and not of_side:
            continue
        if sizes[name] != resized:
            raise AdapterError(
                f"{name}: the adapter brings a vocabulary of {max(resized)}, but no rows for this tensor of {rows}; "
                "save the adapter with save_embedding_layers=True"
            )
        if max(resized) > rows and all(change.delta.new_rows is None for change in of_side):
            first = of_side[0].delta.stored[0]
            raise AdapterError(f"{first.where}: is for a larger vocabulary, but the new rows are not there")
    return max(resized)


def _shared_shards(groups: list[list[_Piece]], every_output: tuple[int, ...]) -> list[_ShardPieces]:
    """Regroup for a sweep: what all outputs have in common once, the rest in files of each output's own."""
    common = [[piece for piece in group if not piece.differs] for group in groups]
    differing: list[list[_Piece]] = []
    size = 0
    for piece in (piece for group in groups for piece in group if piece.differs):
        if not differing or size + piece.nbytes > MAX_SHARD_BYTES:
            differing.append([])
            size = 0
        differing[-1].append(piece)
        size += piece.nbytes
    shards = [_ShardPieces(group, every_output) for group in common if group]
    return shards + [_ShardPieces(group, (output_index,)) for output_index in every_output for group in differing]


def _name_files(outputs: Sequence[Output], shards: Sequence[_ShardPieces], base: Base) -> tuple[OutputShard, ...]:
    """Name each output's files as Transformers numbers them, and note in the outputs what is in which file.

    Of the names that a shared file has, the first makes it, and the others are links to it.
    """
    counts = Counter(output_index for shard in shards for output_index in shard.outputs)
    originals = {
        tuple((info.name, info.dtype, info.shape) for info in shard.tensors): shard for shard in base.checkpoint.shards
    }
    written: list[OutputShard] = []
    for shard in shards:
        names: dict[int, str] = {}
        for output_index in shard.outputs:
            place, count = len(outputs[output_index].files) + 1, counts[output_index]
            names[output_index] = SINGLE if count == 1 else f"model-{place:05d}-of-{count:05d}.safetensors"
        paths = [f"{outputs[output_index].folder}/{name}".lstrip("/") for output_index, name in names.items()]
        written.append(_place(shard, paths, originals))
        for output_index, name in names.items():
            outputs[output_index].files[name] = written[-1]
    return tuple(written)


def _place(shard: _ShardPieces, paths: Sequence[str], originals: Mapping[_Entries, Shard]) -> OutputShard:
    """Give every tensor of a file its offset: as a copied range, or as a target of a fold.

    Args:
        shard: What goes into the file.
        paths: Its names.
        originals: The base's files, by what they hold.
    """
    # 1. The header: the base's own where it holds the same tensors, so that the file system can clone the file.
    pieces = shard.pieces
    original = originals.get(tuple((piece.name, piece.dtype, piece.shape) for piece in pieces))
    if original is not None:
        header = original.header
    else:
        # Wider types first, as safetensors' own writer has it: so every tensor is aligned to its elements.
        pieces = sorted(pieces, key=lambda piece: -DTYPES[piece.dtype][0])
        header = build_header(((piece.name, piece.dtype, piece.shape) for piece in pieces), {"format": "pt"})
    # 2. The tensors, one after the other. Outputs that share the file have the same strengths.
    offset = len(header)
    copies: list[Copy] = []
    for piece in pieces:
        strengths = piece.strengths.get(shard.outputs[0])
        if strengths is None:
            copies.append(Copy(piece.source.file, piece.source.begin, offset, piece.nbytes))
        else:
            piece.targets.append(Target(strengths, paths[0], offset))
        offset += piece.nbytes
    mirrors = original.file if original and all(piece.source.file == original.file for piece in pieces) else None
    return OutputShard(
        file=paths[0],
        header=header,
        size=offset,
        tensors=tuple(piece.name for piece in pieces),
        copies=tuple(copies),
        mirrors=mirrors,
        links=tuple(paths[1:]),
    )
