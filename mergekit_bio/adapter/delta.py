"""What an adapter adds to one base tensor: the contract that every kind of delta keeps.

A delta stands for ``d`` in W(alpha) = W0 + alpha * d. It refers to tensors on disk and holds no weights itself, so that
a plan can be made of deltas without reading any. The kinds are in ``lora.py``, ``dora.py`` and ``dense.py``. Readers of
adapters make them (for PEFT's see ``peft_kind.py``); everything else knows only what is written here.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from mergekit_bio.checkpoint.compare import same_bytes
from mergekit_bio.checkpoint.header import FLOATS, StoredTensor, TensorInfo
from mergekit_bio.errors import AdapterError

if TYPE_CHECKING:
    import torch

#: ``compute(start, stop, base_rows, out)`` writes rows [start, stop) of ``d`` to ``out``. ``base_rows`` are the same
#: rows of W0. Both are [stop - start, cols], in the compute dtype and on the compute device; a vector is one row.
BlockDelta: TypeAlias = "Callable[[int, int, torch.Tensor, torch.Tensor], None]"
#: How a module stores its weight: [out, in], [in, out], or [vocabulary, hidden].
Layout: TypeAlias = Literal["linear", "conv1d", "embedding"]


class Delta(Protocol):
    """One delta of one base tensor. A new kind of delta is a class with these members, in a file of its own.

    It is a dataclass: its text tells it from every other delta, so that no merge goes on with the work of another.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``d`` as the base stores the tensor.

        It is the base's shape. The embeddings are the exception: there ``d`` may have more rows, or fewer, where the
        adapter was trained with a larger or smaller vocabulary.
        """
        ...

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Every tensor of the adapter that ``d`` is made of, at least one; error messages name the first.

        A tensor that is in no delta is an error of the adapter, so that nothing is dropped. All of them together are
        the adapter's fingerprint.
        """
        ...

    @property
    def new_rows(self) -> StoredTensor | None:
        """The stored matrix that W0 gets its further rows from, where ``d`` has more rows than the base.

        It has all rows, those of the base too. ``d`` counts from it: without training it is 0 in the new rows. None
        where the adapter brings no such matrix; then ``d`` must have the base's shape.
        """
        return None

    @property
    def summary(self) -> str | None:
        """How it is scaled, for people: ``"2 (rank 16)"``. None where there is nothing to say."""
        return None

    @property
    def layout(self) -> Layout | None:
        """How the base's module was taken to store its weight; None where ``d`` does not depend on it."""
        return None

    def prepare(self, base: TensorInfo, device: "torch.device", dtype: "torch.dtype") -> BlockDelta:
        """Read what every block of rows needs, and return the function that computes a block.

        Args:
            base: W0 as stored, for a delta that needs more of it than the rows of one block.
            device: Where blocks are computed.
            dtype: What they are computed in: float32, or float64 for results of more than 16 bits.

        Raises:
            AdapterError: A tensor that is read here holds NaN or infinity.
        """
        ...

    def equals(self, other: "Delta") -> bool:
        """Whether both are the same matrix ``d``; True only where that is certain, so that False is always safe.

        One is of an input embedding, the other of the output head tied to it, so they may be stored transposed to each
        other. Equal ones are added to the shared matrix once; others make two matrices of it.
        """
        return False


def read_finite(tensor: StoredTensor, device: "torch.device", dtype: "torch.dtype") -> "torch.Tensor":
    """Read an adapter's tensor for computing with it.

    Raises:
        AdapterError: It holds NaN or infinity.
    """
    values = tensor.read()
    if not values.isfinite().all():
        raise not_finite(tensor)
    return values.to(device, dtype)


def same_tensor(first: StoredTensor | None, second: StoredTensor | None) -> bool:
    """Whether both hold the same values in the same dtype and shape, or neither is there."""
    if not (isinstance(first, TensorInfo) and isinstance(second, TensorInfo)):
        return first is second  # of an old .bin file, which is in memory
    return (first.dtype, first.shape) == (second.dtype, second.shape) and same_bytes(first, second)


def is_zero(tensor: StoredTensor) -> bool:
    """Whether all values are 0. Most tensors that are not are told from their ends, which are other than 0 and -0."""
    return not set(tensor.ends()) - {0x00, 0x80} and not bool(tensor.read().any())


def not_finite(tensor: StoredTensor) -> AdapterError:
    """The error for a tensor with NaN or infinity in it."""
    return AdapterError(f"{tensor.where}: holds NaN or infinity; the adapter is broken, train it anew")


def check_float(tensor: StoredTensor) -> None:
    """Refuse integers and packed weights.

    Raises:
        AdapterError: The dtype is none that weights are trained in.
    """
    if tensor.dtype not in FLOATS:
        raise AdapterError(f"{tensor.where}: is {tensor.dtype}; only {', '.join(FLOATS)} can be folded exactly")
