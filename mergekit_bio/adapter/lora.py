"""LoRA: a low-rank matrix added to a weight, and the vector that PEFT's ``lora_bias`` adds to a bias."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_bio.adapter.delta import BlockDelta, Delta, read_finite
from mergekit_bio.checkpoint.header import StoredTensor, TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRank(Delta):
    """``d = scaling * B A`` (Hu et al. 2021, section 4.1).

    Attributes:
        a: [rank, in], or [rank, vocabulary] for an embedding.
        b: [out, rank], or [hidden, rank] for an embedding.
        scaling: ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` for rank-stabilised LoRA.
        transposed: The base stores [in, out] (GPT-2's Conv1D) or [vocabulary, hidden] (an embedding).
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    transposed: bool = False

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

    def factors(self, device: "torch.device", dtype: "torch.dtype") -> "tuple[torch.Tensor, torch.Tensor]":
        """``left`` [rows, rank] (scaled) and ``right`` [rank, cols] with ``d = left @ right``."""
        a, b = read_finite(self.a, device, dtype), read_finite(self.b, device, dtype)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return left.mul(self.scaling), right.contiguous()

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        import torch

        left, right = self.factors(device, dtype)

        def compute(start: int, stop: int, base_rows: torch.Tensor, out: torch.Tensor) -> None:
            torch.mm(left[start:stop], right, out=out)

        return compute

    def equals(self, other: Delta) -> bool:
        if not isinstance(other, LowRank):
            return False
        if (self.scaling, self.shape, self.rank) != (other.scaling, other.shape, other.rank):
            return False
        import torch

        # An embedding's d is (B A)^T, a head's is B' A': they are the same if A' = B^T and B' = A^T.
        device, dtype = torch.device("cpu"), torch.float32
        return all(map(torch.equal, self.factors(device, dtype), other.factors(device, dtype)))


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

        vector = read_finite(self.vector, device, dtype)

        def compute(start: int, stop: int, base_rows: torch.Tensor, out: torch.Tensor) -> None:
            torch.mul(vector.reshape(out.shape), self.scaling, out=out)

        return compute

    def equals(self, other: Delta) -> bool:
        return False  # embeddings and heads alone are tied, and they are matrices
