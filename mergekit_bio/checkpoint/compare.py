"""Whether two stored tensors are the same bytes, without holding either in memory."""

import mmap

from mergekit_bio.checkpoint.header import TensorInfo

_STEP = 1 << 20


def same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Compare two stored tensors as far as the shorter one goes."""
    count = min(first.nbytes, second.nbytes)
    with first.file.open("rb") as a, second.file.open("rb") as b:
        left = mmap.mmap(a.fileno(), 0, access=mmap.ACCESS_READ)
        right = mmap.mmap(b.fileno(), 0, access=mmap.ACCESS_READ)
        with left, right:
            for offset in range(0, count, _STEP):
                size = min(_STEP, count - offset)
                x, y = first.begin + offset, second.begin + offset
                # Slices of a mapping are bytes, which compare by memcmp; memoryviews compare item by item.
                if left[x : x + size] != right[y : y + size]:
                    return False
    return True
