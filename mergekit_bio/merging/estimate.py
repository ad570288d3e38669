"""What a merge will take, guessed from its plan."""

from mergekit_bio.checkpoint.header import nbytes_of
from mergekit_bio.merging.plan import MergePlan
from mergekit_bio.merging.write import cores

#: A worker's buffers on a CPU: twelve blocks of fold.BLOCK_ELEMENTS, most of them 4 bytes wide.
_WORKER_BYTES = 24 << 20


def memory_bytes(plan: MergePlan) -> int:
    """Bytes of buffers and factors beside what torch itself takes: a few tensors, whatever the model's size."""
    stored = [tensor for fold in plan.folds for delta in fold.deltas for tensor in delta.stored]
    return cores() * _WORKER_BYTES + 4 * max((nbytes_of(tensor.dtype, tensor.shape) for tensor in stored), default=0)


def seconds(plan: MergePlan) -> float:
    """A guess from rates measured on two cores of a server with its files in memory; not a benchmark."""
    return 1.5 + (plan.bytes_on_disk - plan.bytes_folded) / 2.5e9 + plan.bytes_folded / 1.0e9
