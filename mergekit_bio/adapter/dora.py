"""DoRA: a low-rank matrix that turns the weights of each output, and a magnitude that scales them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_bio.adapter.delta import BlockDelta, Delta, Layout, read_finite
from mergekit_bio.checkpoint.header import StoredTensor, TensorInfo

if TYPE_CHECKING:
    import torch

    from mergekit_bio.adapter.lora import LowRank

#: Elements of the blocks in which the norms of columns are summed up before folding begins.
_NORM_BLOCK = 1 << 20


@dataclass(frozen=True)
class Dora(Delta):
    """``d = m * (W1 + s B A) / ||W1 + s B A|| - W0``, with one norm for each output (Liu et al. 2024, equation 5).

    W1 is W0, or the matrix that the adapter was trained on where it brings its own.

    Attributes:
        low_rank: ``s B A``.
        magnitude: ``m``, one number for each output (for an embedding: for each hidden unit).
        origin: W1, where the adapter brings it.
    """

    low_rank: "LowRank"
    magnitude: StoredTensor
    origin: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low_rank.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        needed = (*self.low_rank.stored, self.magnitude)
        return needed if self.origin is None else (*needed, self.origin)

    @property
    def new_rows(self) -> StoredTensor | None:
        return self.origin

    @property
    def summary(self) -> str:
        return self.low_rank.summary

    @property
    def layout(self) -> Layout:
        return self.low_rank.layout

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        import torch

        # Norms are sums, as products are: all of it is computed in float64, and rounded once.
        double = torch.float64
        product = self.low_rank.product(device)
        magnitude = read_finite(self.magnitude, device, double).flatten()

        def turned(start: int, stop: int, base_rows: torch.Tensor | None = None) -> torch.Tensor:
            """Rows of W1 + s B A."""
            if self.origin is not None:
                base_rows = self.origin.read(start, stop).to(device)
            elif base_rows is None:
                base_rows = base.read(start, stop).to(device)
            return product(start, stop).add_(base_rows)

        # Where an output is a column of what is stored, its norm needs all rows: they are read once beforehand.
        column_scale = None
        if self.low_rank.transposed:
            rows, cols = self.shape
            step = max(1, _NORM_BLOCK // max(cols, 1))
            squares = torch.zeros(cols, device=device, dtype=double)
            for start in range(0, rows, step):
                squares += turned(start, min(start + step, rows)).square().sum(0)
            column_scale = magnitude / squares.sqrt()

        def compute(start: int, stop: int, base_rows: torch.Tensor, out: torch.Tensor) -> None:
            weights = turned(start, stop, base_rows)
            if column_scale is None:
                weights *= (magnitude[start:stop] / torch.linalg.vector_norm(weights, dim=1)).unsqueeze(1)
            else:
                weights *= column_scale
            out.copy_(weights.sub_(base_rows))

        return compute
