"""LoRA: a low-rank matrix added to a weight, and the vector that PEFT's ``lora_bias`` adds to a bias."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_bio.adapter.delta import BlockDelta, Delta, Layout, read_finite
from mergekit_bio.adapter.delta import is_zero as tensor_is_zero
from mergekit_bio.adapter.dora import Dora
from mergekit_bio.adapter.peft_kind import AdaptedModule
from mergekit_bio.checkpoint.header import StoredTensor, TensorInfo
from mergekit_bio.errors import AdapterError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRank(Delta):
    """``d = scaling * B A`` (Hu et al. 2021, section 4.1).

    Attributes:
        a: [rank, in], or [rank, vocabulary] for an embedding.
        b: [out, rank], or [hidden, rank] for an embedding.
        scaling: ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` for rank-stabilised LoRA.
        layout: How the base stores the weight.
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    layout: Layout = "linear"

    @property
    def transposed(self) -> bool:
        """Whether ``d`` is stored as [in, out], or [vocabulary, hidden]."""
        return self.layout != "linear"

    @property
    def shape(self) -> tuple[int, ...]:
        outputs, inputs = self.b.shape[0], self.a.shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.a, self.b)

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.a.shape[0]

    @property
    def summary(self) -> str:
        return f"{self.scaling:g} (rank {self.rank})"

    def factors(self, device: "torch.device") -> "tuple[torch.Tensor, torch.Tensor]":
        """``left`` [rows, rank] and ``right`` [rank, cols] with ``d = scaling * left @ right``, in float64."""
        import torch

        a, b = (read_finite(factor, device, torch.float64) for factor in (self.a, self.b))
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return left, right.contiguous()

    def product(self, device: "torch.device") -> "Callable[[int, int], torch.Tensor]":
        """A function that gives rows [start, stop) of ``d`` in float64, on a CPU until it is called again."""
        import torch

        left, right = self.factors(device)
        memory = torch.empty(0, dtype=torch.float64)

        def rows(start: int, stop: int) -> torch.Tensor:
            nonlocal memory
            out, count = None, (stop - start) * right.shape[1]
            if device.type == "cpu":  # on a GPU several blocks are under way, and new memory costs nothing
                if memory.numel() < count:
                    memory = torch.empty(count, dtype=torch.float64)
                out = memory[:count].view(stop - start, right.shape[1])
            # Products of 16-bit numbers are exact in float64; scaled beforehand they would not be.
            return torch.mm(left[start:stop], right, out=out).mul_(self.scaling)

        return rows

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        product = self.product(device)

        def compute(start: int, stop: int, base_rows: "torch.Tensor", out: "torch.Tensor") -> None:
            out.copy_(product(start, stop))

        return compute

    def equals(self, other: Delta) -> bool:
        if not isinstance(other, LowRank):
            return False
        if (self.scaling, self.shape, self.rank) != (other.scaling, other.shape, other.rank):
            return False
        import torch

        # An embedding's d is (B A)^T, a head's is B' A': they are the same if A' = B^T and B' = A^T.
        device = torch.device("cpu")
        return all(map(torch.equal, self.factors(device), other.factors(device)))


@dataclass(frozen=True)
class BiasVector(Delta):
    """``d = scaling * b`` for a bias.

    Attributes:
        vector: ``b``, one number an output.
        scaling: As in :class:`LowRank`.
    """

    vector: StoredTensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.vector.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.vector,)

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        import torch

        scaled = read_finite(self.vector, device, torch.float64).mul(self.scaling)

        def compute(start: int, stop: int, base_rows: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(scaled.reshape(out.shape))

        return compute


# ---- read from PEFT's files (peft/tuners/lora/config.py and layer.py of PEFT 0.21)

PARTS: tuple[str, ...] = (
    "lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
)  # fmt: skip
SETTINGS = frozenset({
    "bias", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "init_lora_weights", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "use_dora", "use_rslora",
})  # fmt: skip

# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) subtract from it.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")


def read(module: AdaptedModule) -> dict[str, Delta]:
    """What LoRA changes of a module's weight, perhaps with DoRA, and of its bias (``lora_bias``)."""
    config, where = module.config, module.config_file
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise AdapterError(
            f"{where}: init_lora_weights {init!r} changed the base weights; save the adapter again with "
            "path_initial_model_for_weight_conversion, then merge that"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterError(f"{where}: bias {config['bias']!r} is not one of none, all, lora_only")
    low_rank = _low_rank(module)
    weight, bias = f"{module.base_name}.weight", f"{module.base_name}.bias"
    deltas: dict[str, Delta] = {weight: low_rank}
    magnitude, vector = module.parts.get("lora_magnitude_vector"), module.parts.get("lora_B.bias")
    if (magnitude is not None) != bool(config.get("use_dora")):
        raise AdapterError(f"{where}: use_dora is {bool(config.get('use_dora'))}, but {module.name} says otherwise")
    if magnitude is not None:
        numbers, outputs = math.prod(magnitude.shape), low_rank.shape[1 if low_rank.transposed else 0]
        if numbers != outputs:
            raise AdapterError(f"{magnitude.where}: has {numbers} numbers for {outputs} outputs")
        deltas[weight] = Dora(low_rank, magnitude, module.parts.get("base_layer"))
    if vector is not None:
        if module.base.find(bias) is None:
            raise AdapterError(f"{where}: lora_bias: the base has no {bias} to add it to; this cannot be folded")
        deltas[bias] = BiasVector(vector, low_rank.scaling)
    return deltas


def is_zero(parts: Mapping[str, StoredTensor]) -> bool:
    """Whether one half of the pair is zero; DoRA's magnitude may change a module all the same."""
    halves = (parts[name] for name in ("lora_B", "lora_embedding_A", "lora_A", "lora_embedding_B") if name in parts)
    return "lora_magnitude_vector" not in parts and any(map(tensor_is_zero, halves))


def _low_rank(module: AdaptedModule) -> LowRank:
    embedding = "lora_embedding_A" in module.parts or "lora_embedding_B" in module.parts
    a, b = (module.matrix(f"lora_embedding_{half}" if embedding else f"lora_{half}") for half in "AB")
    rank, alpha = module.rank_and_alpha("lora_alpha")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{a.where}: shapes {list(a.shape)} and {list(b.shape)} do not have the rank {rank} that "
            f"{module.config_file.name} gives {module.name}"
        )
    scaling = alpha / math.sqrt(rank) if module.config.get("use_rslora") else alpha / rank
    return LowRank(a, b, scaling, "embedding" if embedding else _layout(module, (b.shape[0], a.shape[1])))


def _layout(module: AdaptedModule, linear: tuple[int, int]) -> Layout:
    """How the base stores the module's weight, which a Linear would store in the shape ``linear``."""
    conv1d, names = linear[::-1], module.base.conv1d_modules
    if linear == conv1d:
        return "conv1d" if module.base_name.rpartition(".")[2] in names else "linear"
    target = module.base.find(f"{module.base_name}.weight")
    return "conv1d" if names and target is not None and target.shape == conv1d else "linear"
