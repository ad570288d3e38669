"""Single rows of an embedding that were trained anew: PEFT's ``trainable_token_indices``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_bio.adapter.delta import BlockDelta, Delta, read_finite, same_tensor
from mergekit_bio.checkpoint.header import StoredTensor, TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenRows(Delta):
    """``d = W1 - W0`` in some rows, where W1 has its rows replaced; elsewhere 0, or what the brought matrix adds.

    Attributes:
        values: The new rows [tokens, hidden]. PEFT calls them a delta, but they replace what was there.
        tokens: The number of each.
        embedding_shape: Of all of the embedding.
        origin: The embedding that they were trained in, where the adapter brings it: that of a resized vocabulary.
    """

    values: StoredTensor
    tokens: tuple[int, ...]
    embedding_shape: tuple[int, ...]
    origin: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.embedding_shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.values,) if self.origin is None else (self.values, self.origin)

    @property
    def new_rows(self) -> StoredTensor | None:
        return self.origin

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        import torch

        values = read_finite(self.values, device, dtype)

        def compute(start: int, stop: int, base_rows: torch.Tensor, out: torch.Tensor) -> None:
            if self.origin is None:
                out.zero_()
            else:
                torch.sub(self.origin.read(start, stop).to(device, dtype), base_rows, out=out)
            for index, token in enumerate(self.tokens):
                if start <= token < stop:
                    torch.sub(values[index], base_rows[token - start], out=out[token - start])

        return compute

    def equals(self, other: Delta) -> bool:
        return (
            isinstance(other, TokenRows)
            and self.tokens == other.tokens
            and same_tensor(self.values, other.values)
            and same_tensor(self.origin, other.origin)
        )
