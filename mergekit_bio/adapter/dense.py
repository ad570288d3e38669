"""A whole tensor that was trained anew: by a full fine-tune, or as one of PEFT's modules to save."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_bio.adapter.delta import BlockDelta, Delta, same_tensor
from mergekit_bio.checkpoint.header import StoredTensor, TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dense(Delta):
    """``d = W1 - W0``. In rows that the base lacks (a grown vocabulary) W1 stands in for W0, and ``d`` is 0.

    Attributes:
        tuned: W1, of the base's shape or with more rows.
    """

    tuned: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tuned.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.tuned,)

    @property
    def new_rows(self) -> StoredTensor:
        return self.tuned

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        import torch

        def compute(start: int, stop: int, base_rows: torch.Tensor, out: torch.Tensor) -> None:
            tuned = self.tuned.read(start, stop).reshape(out.shape).to(device, dtype)
            torch.sub(tuned, base_rows, out=out)

        return compute

    def equals(self, other: Delta) -> bool:
        return isinstance(other, Dense) and same_tensor(self.tuned, other.tuned)
