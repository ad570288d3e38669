"""Compares two stored tensors without holding either in memory."""

import os

from mergekit_bio.checkpoint.header import TensorInfo

_STEP = 1 << 20


def same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Compare two stored tensors as far as the shorter one goes."""
    count = min(first.nbytes, second.nbytes)
    with first.file.open("rb", buffering=0) as a, second.file.open("rb", buffering=0) as b:
        for offset in range(0, count, _STEP):
            size = min(_STEP, count - offset)
            # Read, not mapped: a mapping of gigabytes would count as memory of this process.
            if os.pread(a.fileno(), size, first.begin + offset) != os.pread(b.fileno(), size, second.begin + offset):
                return False
    return True


def rows_that_differ(copy: TensorInfo, original: TensorInfo) -> tuple[int, ...]:
    """The rows in which ``copy`` is no copy of ``original``.

    The two may be of different floating point types: a value counts as copied if either type holds what the other's
    value rounds to.

    Args:
        copy: A tensor of floats.
        original: Another of the same shape.

    Returns:
        Their numbers; ``(0,)`` for vectors and scalars that differ, which are one row.
    """
    if copy.dtype == original.dtype and same_bytes(copy, original):
        return ()
    rows: list[int] = []
    step = max(1, _STEP // max(original.elements // max(original.rows, 1), 1))
    for start in range(0, original.rows, step):
        stop = min(start + step, original.rows)
        ours, theirs = (tensor.read(start, stop).reshape(stop - start, -1) for tensor in (copy, original))
        same = (ours.to(theirs.dtype) == theirs) | (theirs.to(ours.dtype) == ours) | (ours.isnan() & theirs.isnan())
        rows.extend(start + int(row) for row in (~same.all(dim=1)).nonzero())
    return tuple(rows)
