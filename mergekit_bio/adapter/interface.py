"""An adapter: where it came from and which deltas it holds for a given base."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_bio.adapter.conv1d import conv1d_modules
from mergekit_bio.adapter.delta import Delta
from mergekit_bio.adapter.embeddings import Embeddings, find_embeddings
from mergekit_bio.checkpoint.compare import same_bytes
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.header import FLOATS, StoredTensor, TensorInfo
from mergekit_bio.checkpoint.model_config import language_setting
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import AdapterError


@dataclass(frozen=True)
class Base:
    """The checkpoint deltas are added to, and how its names are to be read.

    Attributes:
        source: Where it came from.
        checkpoint: Its headers.
        overrides: Its tensor name -> what is taken in the place of its own.
    """

    source: Source
    checkpoint: Checkpoint
    overrides: Mapping[str, TensorInfo] = field(default_factory=dict)

    @cached_property
    def _embeddings(self) -> Embeddings:
        return find_embeddings(self.checkpoint)

    @property
    def input_embedding(self) -> str | None:
        """Name of the input embedding's weight; None if there is none, or more than one."""
        return self._embeddings.input

    @property
    def head(self) -> str | None:
        """Name of the output head's weight, stored or not; None if the architecture has no head."""
        return self._embeddings.head

    @property
    def missing_prefix(self) -> str:
        """What must stand in front of all names if the tied head gets a tensor; empty for most files."""
        return self._embeddings.missing_prefix

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding, and the files hold the matrix once."""
        return self.head is not None and self.head not in self.checkpoint.tensors

    @cached_property
    def shared(self) -> bool:
        """Whether the output head is the input embedding for Transformers, however often the files hold the matrix."""
        if self.tied or self.head is None or self.input_embedding is None:
            return self.tied
        if language_setting(self.checkpoint.config, "tie_word_embeddings") is False:
            return False
        head, embedding = self.checkpoint.tensors[self.head], self.checkpoint.tensors[self.input_embedding]
        return (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and same_bytes(head, embedding)

    @cached_property
    def layers(self) -> int | None:
        """How many layers the language model has, by its configuration; None for an encoder beside a decoder."""
        config = self.checkpoint.config
        count = language_setting(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
        return count if isinstance(count, int) and not config.get("is_encoder_decoder") else None

    @cached_property
    def conv1d_modules(self) -> frozenset[str]:
        """Last parts of the names of modules that store their weight as [in, out]; see :mod:`.conv1d`."""
        return conv1d_modules(self.checkpoint.tensors)

    def find(self, name: str) -> TensorInfo | None:
        """The stored tensor that ``name`` means; for a tied head, the input embedding."""
        if name == self.head and self.tied and self.input_embedding:
            name = self.input_embedding
        return self.checkpoint.tensors.get(name)

    def origin(self, name: str) -> TensorInfo:
        """The stored tensor that gives W0: the base's own, or what is taken in its place."""
        tensor = self.find(name)
        if tensor is None:
            raise KeyError(name)
        return self.overrides.get(tensor.name, tensor)


@dataclass(frozen=True)
class Override:
    """A tensor of the base that an adapter repeats with other values.

    Attributes:
        stored: The adapter's tensor as its file has it.
        tensor: The same in the base's shape, without added rows.
        rows: The rows in which it differs from the base.
    """

    stored: TensorInfo
    tensor: TensorInfo
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """Deltas read off one source.

    Attributes:
        kind: ``"peft"``, ``"naturelm-audio"`` or ``"finetune"``.
        source: Where it came from.
        file: The file or directory its tensors are in, for messages.
        deltas: Base tensor name -> what is added to it.
        tower: The tensors of an audio tower, under their original names.
        config: Its own configuration file.
        notes: What a user should know, one line each.
        overrides: Base tensor name -> what the adapter has in its place. A merge takes it at every strength, or is
            refused.
    """

    kind: str
    source: Source
    file: Path
    deltas: Mapping[str, tuple[Delta, ...]]
    tower: tuple[TensorInfo, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    overrides: Mapping[str, Override] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """Everything of it that goes into a merge, by name."""
        used = (tensor for deltas in self.deltas.values() for delta in deltas for tensor in delta.stored)
        taken = (override.stored for override in self.overrides.values())
        return {tensor.name: tensor for tensor in (*used, *self.tower, *taken)}

    @property
    def scalings(self) -> dict[str, int]:
        """How many deltas are scaled in which way, such as ``{"1 (rank 32)": 128}``."""
        summaries = (delta.summary for deltas in self.deltas.values() for delta in deltas)
        return dict(Counter(summary for summary in summaries if summary is not None))


def check_fits(name: str, delta: Delta, base: Base) -> None:
    """Make sure that ``delta`` can be added to the base tensor ``name``.

    Raises:
        AdapterError: There is no such tensor, it is quantized, or the shapes differ.
    """
    target = base.find(name)
    first = delta.stored[0]
    if target is None:
        raise AdapterError(
            f"{first.where}: the base {base.source.given} has no tensor {name}; this adapter was made for another model"
        )
    if target.dtype not in FLOATS:
        raise AdapterError(f"{target.where}: is {target.dtype}; a quantized base cannot be folded exactly")
    resized = delta.shape[1:] == target.shape[1:] and len(target.shape) == 2
    if delta.shape != target.shape and not (resized and name in (base.input_embedding, base.head)):
        raise AdapterError(
            f"{first.where}: changes {name} of shape {list(delta.shape)}, but the base's is "
            f"{list(target.shape)}; this adapter was made for another model"
        )


def check_all_used(tensors: Mapping[str, StoredTensor], used: set[str], file: Path) -> None:
    """Make sure that nothing an adapter holds was passed over.

    Raises:
        AdapterError: A tensor of ``tensors`` is in no delta.
    """
    unused = sorted(set(tensors) - used)
    if unused:
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise AdapterError(f"{file}: tensor {unused[0]}{more}: is nothing this version can fold; nothing was merged")
