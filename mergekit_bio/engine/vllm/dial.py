"""The dial: every strength of an adapter from one engine, in vLLM's LoRA slots.

The engine runs the merge at alpha 0. A strength is a LoRA adapter of its own: the same tensors, with ``lora_alpha``
times the strength. vLLM adds it to the weights while it computes, and requests of different strengths share a batch.

Strengths are thousandths from 0 to 2. So there are 2001 adapters, each with a fixed number, name and folder, and
nobody needs to remember which were asked for: vLLM keeps the ones that were used last, and reads the others again. Its
own ways to add adapters at run time stay off; they take any path from a client, and forget nothing.

Strength 0 is an adapter too. On a CPU vLLM gives a request without one the adapter of its last slot, and says nothing.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

#: A strength as a name has it: up to three digits behind the point.
_STRENGTH = re.compile(r"[0-9]?(\.[0-9]{1,3})?", re.ASCII)
#: The largest strength, in thousandths.
LARGEST = 2000
#: What is listed of all that there is: 0, 0.1, ..., 1.
LISTED = range(0, 1001, 100)
#: The ranks that vLLM has slots for (``MaxLoRARanks`` of its ``config/lora.py``).
_SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_PACKED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_SLOTS = "slots.json"


def parse_strength(text: str) -> int | None:
    """Thousandths of a strength such as ``"0.35"``, ``".350"`` or ``"2"``; None for what is no strength."""
    if not text or not _STRENGTH.fullmatch(text):
        return None
    whole, _, digits = text.partition(".")
    thousandths = 1000 * int(whole or 0) + int(digits.ljust(3, "0"))
    return thousandths if thousandths <= LARGEST else None


def write_strength(thousandths: int) -> str:
    """As names have it: ``"0.35"`` for 350."""
    return f"{thousandths / 1000:g}"


@dataclass(frozen=True)
class SlotAdapter:
    """A LoRA as slots hold it: for each linear layer a rank, and the factor of ``B A``.

    Attributes:
        modules: Dotted module name, as the base has it -> rank and scaling at strength 1.
    """

    modules: Mapping[str, tuple[int, float]]

    @property
    def slot_rank(self) -> int | None:
        """The rank that slots must have; None where vLLM has none so large."""
        largest = max(rank for rank, _ in self.modules.values())
        return next((rank for rank in _SLOT_RANKS if rank >= largest), None)

    @property
    def layers(self) -> list[str]:
        """The kinds of layers that it changes, by the last part of their names."""
        return sorted({module.rpartition(".")[2] for module in self.modules})

    @property
    def vllm_layers(self) -> list[str]:
        """The same by vLLM's names, which has several layers in one; it makes slots for no others."""
        return sorted({_PACKED.get(layer, layer) for layer in self.layers})

    def config(self, thousandths: int) -> dict[str, Any]:
        """``adapter_config.json`` at a strength."""
        alphas = {module: rank * scaling * thousandths / 1000 for module, (rank, scaling) in self.modules.items()}
        ranks = {module: rank for module, (rank, _) in self.modules.items()}
        (rank, *other_ranks), (alpha, *other_alphas) = dict.fromkeys(ranks.values()), dict.fromkeys(alphas.values())
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": self.layers, "bias": "none"}
        # Their keys are regular expressions for the ends of names.
        if other_ranks:
            config["rank_pattern"] = {re.escape(module): rank for module, rank in ranks.items()}
        if other_alphas:
            config["alpha_pattern"] = {re.escape(module): alpha for module, alpha in alphas.items()}
        return config

    def save(self, folder: Path) -> None:
        """Write it beside the weights, for :func:`strength_folder`."""
        (folder / _SLOTS).write_text(json.dumps(self.modules))

    @classmethod
    def load(cls, folder: Path) -> "SlotAdapter":
        """What :meth:`save` wrote."""
        stored = json.loads((folder / _SLOTS).read_text())
        return cls({module: (rank, scaling) for module, (rank, scaling) in stored.items()})


def strength_folder(folder: Path, adapter: SlotAdapter, thousandths: int) -> Path:
    """The folder that vLLM reads a strength from: a configuration of its own and a link to the weights.

    It is made when the strength is asked for first: 2001 folders take seconds to make, and to remove.

    Args:
        folder: Where the folders are, and beside them ``adapter_model.safetensors`` with
            ``base_model.model.MODULE.lora_A.weight`` and ``lora_B`` for each module.
        adapter: What the weights are.
        thousandths: The strength.

    Raises:
        OSError: The disk is full, say.
    """
    place = folder / write_strength(thousandths)
    if place.is_dir():
        return place
    unfinished = Path(tempfile.mkdtemp(dir=folder))
    try:
        (unfinished / CONFIG).write_text(json.dumps(adapter.config(thousandths)))
        (unfinished / WEIGHTS).symlink_to(folder.resolve() / WEIGHTS)
        unfinished.rename(place)
    except OSError:  # which another of the server's processes causes if it was first
        shutil.rmtree(unfinished, ignore_errors=True)
        if not place.is_dir():
            raise
    return place


class Dial(Mapping[str | None, Any]):
    """Model name -> vLLM's ``LoRARequest``, for every strength; it takes the place of vLLM's own list of adapters.

    ``NAME@0.35`` and ``NAME@.350`` are one adapter. No name, and the names without a strength, stand for the default
    strength. Iteration goes over those that are listed only: 0, 0.1, ..., 1.

    Args:
        names: What the model is called, the first being the canonical one.
        folder: As :func:`strength_folder` needs it, with what :meth:`SlotAdapter.save` wrote.
        default: The strength, in thousandths, of a name without one.
        aliases: Names, of these or others, with a strength of their own, in thousandths.
    """

    def __init__(self, names: Sequence[str], folder: Path, *, default: int, aliases: Mapping[str, int]) -> None:
        self._names, self._folder, self._default, self._aliases = tuple(names), folder, default, dict(aliases)

    def strength(self, name: str | None) -> int | None:
        """The strength that a model name asks for, in thousandths; None where it is none of this dial's."""
        if name in self._aliases:
            return self._aliases[name]
        if not name or name in self._names:
            return self._default
        model, at, strength = name.rpartition("@")
        return parse_strength(strength) if at and model in self._names else None

    def canonical(self, thousandths: int) -> str:
        """The name that answers have."""
        return f"{self._names[0]}@{write_strength(thousandths)}"

    def __getitem__(self, name: str | None) -> Any:
        from vllm.exceptions import GracefulHTTPError
        from vllm.lora.request import LoRARequest

        thousandths = self.strength(name)
        if thousandths is None:
            raise KeyError(name)
        try:
            folder = strength_folder(self._folder, self._adapter, thousandths)
        except OSError as error:  # which vLLM's routes and ours answer with
            message = f"the server cannot write the adapter of strength {write_strength(thousandths)}: {error.strerror}"
            raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE) from error
        # The number is above 0 by vLLM's rule. Name and path are part of the key of vLLM's prefix cache.
        return LoRARequest(self.canonical(thousandths), thousandths + 1, str(folder), base_model_name=self._names[0])

    @cached_property
    def _adapter(self) -> SlotAdapter:
        return SlotAdapter.load(self._folder)

    def __contains__(self, name: object) -> bool:
        return (name is None or isinstance(name, str)) and self.strength(name) is not None

    def __iter__(self) -> Iterator[str]:
        return map(self.canonical, LISTED)

    def __len__(self) -> int:
        return len(LISTED)


def without_strengths_in_metrics(loggers: Iterable[Any]) -> None:
    """Leave the gauge of adapters out of vLLM's metrics: it keeps a row for every set that ever ran together."""
    for logger in loggers:
        if hasattr(logger, "gauge_lora_info"):
            logger.gauge_lora_info = None
