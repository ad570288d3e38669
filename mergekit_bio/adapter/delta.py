"""What an adapter adds to one base tensor, as data: every kind of adapter ends in these four words.

A delta describes ``d`` in W(alpha) = W0 + alpha * d. It holds references to stored tensors, no weights; ``prepare``
reads what is small and returns a function that gives ``d`` for a block of rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from mergekit_bio.checkpoint.header import FLOATS, StoredTensor, TensorInfo
from mergekit_bio.errors import AdapterError

if TYPE_CHECKING:
    import torch

#: (first row, row after the last, base rows [n, cols], out [n, cols]) -> None, writing ``d`` of these rows to ``out``.
#: Base rows and out are of the compute dtype, on the compute device.
BlockDelta: TypeAlias = "Callable[[int, int, torch.Tensor, torch.Tensor], None]"


@dataclass(frozen=True)
class LowRank:
    """LoRA: ``d = scaling * B A`` (Hu et al. 2021, section 4.1).

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
        """Shape of ``d`` as the base stores it."""
        out, within = self.b.shape[0], self.a.shape[1]
        return (within, out) if self.transposed else (out, within)

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.a.shape[0]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The adapter's tensors that this uses up."""
        return (self.a, self.b)

    def factors(self, device: "torch.device", dtype: "torch.dtype") -> "tuple[torch.Tensor, torch.Tensor]":
        """``left`` [rows, rank] (scaled) and ``right`` [rank, cols] with ``d = left @ right``."""
        a, b = read_finite(self.a, device, dtype), read_finite(self.b, device, dtype)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return left.mul(self.scaling), right.contiguous()

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        """See the module."""
        import torch

        left, right = self.factors(device, dtype)

        def block(start: int, stop: int, _: torch.Tensor, out: torch.Tensor) -> None:
            torch.mm(left[start:stop], right, out=out)

        return block


@dataclass(frozen=True)
class Dora:
    """DoRA: ``d = m * (W0 + s B A) / ||W0 + s B A|| - W0``, a norm for each output (Liu et al. 2024, eq. 5).

    Attributes:
        low_rank: The direction's update.
        magnitude: ``m``, one number an output (an embedding: one a hidden unit).
        origin: The matrix the adapter was trained on, where it brings its own; the base otherwise.
    """

    low_rank: LowRank
    magnitude: StoredTensor
    origin: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``d`` as the base stores it."""
        return self.low_rank.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The adapter's tensors that this uses up."""
        own = (*self.low_rank.stored, self.magnitude)
        return own if self.origin is None else (*own, self.origin)

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        """See the module."""
        import torch

        left, right = self.low_rank.factors(device, dtype)
        magnitude = read_finite(self.magnitude, device, dtype).flatten()
        origin = self.origin
        by_column = self.low_rank.transposed

        def direction(start: int, stop: int, base_rows: torch.Tensor | None) -> torch.Tensor:
            if origin is not None:
                base_rows = origin.read(start, stop).to(device, dtype)
            elif base_rows is None:
                base_rows = base.read(start, stop).to(device, dtype)
            return torch.addmm(base_rows, left[start:stop], right)

        scale = None
        if by_column:  # an output is a column of what is stored: its norm needs all rows once
            rows, step = self.shape[0], max(1, (1 << 20) // max(self.shape[1], 1))
            squares = torch.zeros(self.shape[1], device=device, dtype=torch.float64)
            for start in range(0, rows, step):
                squares += direction(start, min(start + step, rows), None).double().square().sum(0)
            scale = magnitude / squares.sqrt().to(dtype)

        def block(start: int, stop: int, base_rows: torch.Tensor, out: torch.Tensor) -> None:
            turned = direction(start, stop, base_rows)
            if scale is None:
                turned *= (magnitude[start:stop] / torch.linalg.vector_norm(turned, dim=1)).unsqueeze(1)
            else:
                turned *= scale
            torch.sub(turned, base_rows, out=out)

        return block


@dataclass(frozen=True)
class Dense:
    """A whole tensor trained anew: ``d = W1 - W0``. Rows that the base lacks (a grown vocabulary) have ``d = 0``.

    Attributes:
        tuned: W1, of the base's shape or with more rows.
    """

    tuned: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``d`` as the base stores it."""
        return self.tuned.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The adapter's tensors that this uses up."""
        return (self.tuned,)

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        """See the module."""
        import torch

        def block(start: int, stop: int, base_rows: torch.Tensor, out: torch.Tensor) -> None:
            tuned = self.tuned.read(start, stop).reshape(out.shape).to(device, dtype)
            torch.sub(tuned, base_rows, out=out)

        return block


@dataclass(frozen=True)
class Shift:
    """A vector added to a bias: ``d = scaling * b`` (PEFT's ``lora_bias``).

    Attributes:
        vector: ``b``, one number an output.
        scaling: As in :class:`LowRank`.
    """

    vector: StoredTensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``d`` as the base stores it."""
        return self.vector.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The adapter's tensors that this uses up."""
        return (self.vector,)

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        """See the module."""
        import torch

        vector = read_finite(self.vector, device, dtype)

        def block(start: int, stop: int, _: torch.Tensor, out: torch.Tensor) -> None:
            torch.mul(vector.reshape(out.shape), self.scaling, out=out)

        return block


Delta: TypeAlias = LowRank | Dora | Dense | Shift


def read_finite(tensor: StoredTensor, device: "torch.device", dtype: "torch.dtype") -> "torch.Tensor":
    """Read an adapter's tensor for computing with it.

    Raises:
        AdapterError: It holds NaN or infinity.
    """
    values = tensor.read()
    if not values.isfinite().all():
        raise not_finite(tensor)
    return values.to(device, dtype)


def not_finite(tensor: StoredTensor) -> AdapterError:
    """The error for a tensor with NaN or infinity in it."""
    return AdapterError(
        f"{tensor.file}: tensor {tensor.name}: holds NaN or infinity; the adapter is broken, train it anew"
    )


def check_float(tensor: StoredTensor) -> None:
    """Refuse integers and packed weights.

    Raises:
        AdapterError: The dtype is none that weights are trained in.
    """
    if tensor.dtype not in FLOATS:
        raise AdapterError(
            f"{tensor.file}: tensor {tensor.name}: is {tensor.dtype}; only {', '.join(FLOATS)} can be folded exactly"
        )
