"""What a kind of PEFT adapter provides, and what it is given to read: one adapted module at a time."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from mergekit_bio.adapter.delta import Delta
from mergekit_bio.adapter.interface import Base
from mergekit_bio.checkpoint.header import StoredTensor
from mergekit_bio.errors import AdapterError


@dataclass(frozen=True)
class AdaptedModule:
    """A module that an adapter changes.

    Attributes:
        name: Dotted, as the adapter names it, and the patterns of its configuration: ``"model.layers.0.mlp.up_proj"``.
        base_name: The same, as the base's files name it.
        parts: Its tensors, under the names in the kind's ``PARTS``, and ``base_layer`` and ``base_layer.bias`` where
            the adapter brings the weights that it was trained on.
        config: ``adapter_config.json``.
        config_file: Where that is, for messages.
        base: What the deltas are for.
    """

    name: str
    base_name: str
    parts: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    config_file: Path
    base: Base

    def matrix(self, part: str) -> StoredTensor:
        """The part with this name, which must be there and be a matrix."""
        tensor = self.parts.get(part)
        if tensor is None:
            present = next(tensor for name, tensor in self.parts.items() if "base_layer" not in name)
            raise AdapterError(f"{present.where}: the {part} beside it is missing; the file is incomplete")
        if len(tensor.shape) != 2:
            raise AdapterError(f"{tensor.where}: has shape {list(tensor.shape)}; only matrices fold")
        return tensor

    def rank_and_alpha(self, alpha_setting: str) -> tuple[int, float]:
        """``r`` and the setting that scales it, or what ``rank_pattern`` and ``alpha_pattern`` say instead."""
        rank = self._by_pattern("rank_pattern", self.config.get("r"))
        alpha = self._by_pattern("alpha_pattern", self.config.get(alpha_setting))
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise AdapterError(
                f"{self.config_file}: the rank r of {self.name} is {rank!r}; it must be a whole number above 0"
            )
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise AdapterError(f"{self.config_file}: {alpha_setting} of {self.name} is {alpha!r}; it must be a number")
        return rank, alpha

    def _by_pattern(self, setting: str, default: Any) -> Any:
        """The first entry whose key, a regular expression, ends the module's name."""
        for key, value in (self.config.get(setting) or {}).items():
            if _ending(key).match(self.name):
                return value
        return default


@cache  # re itself keeps 512: too few where every module has a pattern of its own, as after EVA's initialisation
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


class PeftKind(Protocol):
    """A kind of PEFT adapter: a module with these members, such as ``lora.py``, and a line in the table of ``peft.py``.

    Modules that are saved whole, biases and resized embeddings are read in ``peft.py``, whatever the kind.
    """

    #: Names of the tensors of an adapted module, as PEFT's files have them after the module's name; a ``.weight`` at
    #: the end is left out.
    PARTS: tuple[str, ...]
    #: Settings of ``adapter_config.json`` that it reads, or that do not change what the merged weights are. One that
    #: is in no such list is refused unless it is empty.
    SETTINGS: frozenset[str]

    def read(self, module: AdaptedModule) -> dict[str, Delta]:
        """What the parts of one module change: name of a base tensor -> its delta.

        Raises:
            AdapterError: The parts are incomplete, or cannot be folded exactly.
        """
        ...

    def is_zero(self, parts: Mapping[str, StoredTensor]) -> bool:
        """Whether the parts of a module change nothing: they are as they were before training."""
        ...
