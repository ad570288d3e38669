"""The arithmetic: one tensor, in blocks of rows, for every strength at once.

A worker owns a few slots of buffers. On a GPU each slot has a stream of its own, so that one block's transfer runs
beside another's arithmetic; on a CPU there is one slot, and several workers stand for the overlap.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from mergekit_bio.adapter.delta import BlockDelta, not_finite
from mergekit_bio.checkpoint.clone import write_exactly
from mergekit_bio.checkpoint.header import DTYPES, TensorInfo, read_exactly
from mergekit_bio.errors import AdapterError
from mergekit_bio.merging.plan import Fold
from mergekit_bio.merging.rounding import Noise, noise_key, round_into
from mergekit_bio.merging.rounding_loss import ErrorSums

#: Takes the number of a target, an offset in the tensor, and bytes.
Write: TypeAlias = Callable[[int, int, memoryview], None]
#: Elements a block holds: small enough for a CPU core's cache, large enough for a GPU's launch cost.
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}
#: Strengths that share a GPU's block at its full size; more of them get smaller blocks, and so the same memory.
_TARGETS_A_BLOCK = 12
#: The rounding loss is estimated from every 16th row; blocks begin at multiples of it.
SAMPLED_ROWS = 16


@dataclass(frozen=True)
class Folded:
    """What became of one fold.

    Attributes:
        name: The tensor.
        sha256: Of the written bytes, one for each target.
        errors: The rounding error, one for each target.
    """

    name: str
    sha256: tuple[str, ...]
    errors: tuple[ErrorSums, ...]


@dataclass(frozen=True)
class _Job:
    """What all blocks of one tensor have in common."""

    fold: Fold
    compute: torch.dtype
    dtype: torch.dtype
    cols: int
    deltas: list[BlockDelta]
    noise_key: int | None
    sampled: int


class _Slot:
    """The buffers of one block on its way: read, computed, rounded, ready to be written."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._noise: Noise | None = None
        self._pending: list[tuple[int, int, torch.Tensor]] = []

    def drain(self, write: Write) -> None:
        """Wait for the block, and write what is not written yet."""
        if self._stream is not None and self._pending:
            self._stream.synchronize()
        pending, self._pending = self._pending, []
        for number, offset, rounded in pending:
            write(number, offset, memory_of(rounded))

    def begin(self, job: _Job) -> None:
        """Turn to another tensor."""
        self._job = job
        self.sums = [ErrorSums.zeros(self._device) for _ in job.fold.targets]
        self._probe = torch.zeros((), dtype=torch.float64, device=self._device)
        if self._cuda:
            torch.cuda.current_stream(self._device).synchronize()  # what was prepared is used on other streams

    def finite(self) -> bool:
        """Whether all results of the tensor are finite; a False may be an overflow of the sum that tells."""
        return bool(self._probe.isfinite())

    def start(self, base: int, start: int, stop: int, write: Write) -> None:
        """Read rows ``[start, stop)`` and set the device to work on them; a CPU's results are written at once."""
        job = self._job
        fold, shape, every = job.fold, (stop - start, job.cols), job.sampled
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            weights = self._weights(job, base, start, stop)
            mixed = self._buffer("mixed", shape, job.compute, self._device)
            deltas = [self._buffer(f"delta{n}", shape, job.compute, self._device) for n in range(len(job.deltas))]
            for block, compute in zip(deltas, job.deltas, strict=True):
                compute(start, stop, weights, block)
            noise = None
            if job.noise_key is not None:
                first, count = start * job.cols, shape[0] * job.cols
                noise = self._noise_of(count).draw(job.noise_key, first, count).view(shape)
            sampled = -(-shape[0] // every)
            sample = self._buffer("sample", (4, sampled * job.cols), job.compute, self._device)
            delta, exact, nearest, kept = sample.view(4, sampled, job.cols)
            kept.copy_(weights[::every])
            for number, target in enumerate(fold.targets):
                mixed_from = weights
                delta.zero_()
                for block, strength in zip(deltas, target.strengths, strict=True):
                    mixed_from = torch.add(mixed_from, block, alpha=strength, out=mixed)
                    delta.add_(block[::every], alpha=strength)
                if not deltas:
                    mixed.copy_(weights)
                exact.copy_(mixed[::every])
                rounded = self._buffer("rounded", shape, job.dtype, self._device)
                flat = mixed.flatten()
                self._probe += torch.dot(flat, flat)  # before noise could carry the bits of a NaN round to a number
                round_into(mixed, rounded, noise)
                if job.dtype != torch.bfloat16:  # bfloat16 alone has the range of what it was computed in
                    self._probe += rounded.sum(dtype=torch.float32)
                if deltas:
                    torch.sub(exact.to(job.dtype).to(job.compute), exact, out=nearest)
                    torch.sub(rounded[::every].to(job.compute), exact, out=exact)  # from here on the error
                    self.sums[number].add(sample)
                offset = start * job.cols * job.dtype.itemsize
                if self._cuda:
                    host = self._buffer(f"host{number}", shape, job.dtype, torch.device("cpu"))
                    self._pending.append((number, offset, host.copy_(rounded, non_blocking=True)))
                else:
                    write(number, offset, memory_of(rounded))

    def _weights(self, job: _Job, base: int, start: int, stop: int) -> torch.Tensor:
        """W0 in the compute dtype; rows beyond the base's come from the adapter that brings them."""
        info = job.fold.base
        stored = getattr(torch, DTYPES[info.dtype][1])
        weights = self._buffer("weights", (stop - start, job.cols), job.compute, self._device)
        own = min(stop, _matrix(info.shape)[0])
        if start < own:
            raw = self._buffer("raw", (own - start, job.cols), stored, torch.device("cpu"))
            offset = info.begin + start * job.cols * stored.itemsize
            read_exactly(base, memory_of(raw), offset, info.file)
            if self._cuda:  # widened there: torch would widen on this side, and send twice the bytes
                raw = self._buffer("sent", (own - start, job.cols), stored, self._device).copy_(raw, non_blocking=True)
            weights[: own - start].copy_(raw)
        if own < stop:
            first = max(own, start)
            weights[first - start :].copy_(job.fold.new_rows().read(first, stop))
        return weights

    def _buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A reused buffer of at least this size; on the host side of a GPU, pinned."""
        count = shape[0] * shape[1]
        held = self._buffers.get(name)
        if held is None or held.dtype != dtype or held.numel() < count:
            pinned = self._cuda and device.type == "cpu"
            held = self._buffers[name] = torch.empty(count, dtype=dtype, device=device, pin_memory=pinned)
        return held[:count].view(shape)

    def _noise_of(self, count: int) -> Noise:
        count = max(count, BLOCK_ELEMENTS[self._device.type])
        if self._noise is None or self._noise.capacity < count:
            self._noise = Noise(count, self._device)
        return self._noise


class Folder:
    """Folds tensors on one device with buffers that are allocated once.

    Args:
        root: The output directory that targets are relative to.
        device: Where to compute.
        stochastic: How results of 16 bits are rounded; wider ones go to nearest.
        seed: Of the stochastic rounding.
        progress: Called with the number of bytes of each written block.
    """

    def __init__(
        self, *, root: Path, device: torch.device, stochastic: bool, seed: int, progress: Callable[[int], None]
    ) -> None:
        self._root = root
        self._device = device
        self._stochastic = stochastic
        self._seed = seed
        self._progress = progress
        self._slots = [_Slot(device) for _ in range(3 if device.type == "cuda" else 1)]

    def fold(self, fold: Fold) -> Folded:
        """Compute and write one tensor at all its targets.

        Raises:
            AdapterError: A delta holds NaN or infinity, or the result does not fit the output's dtype.
            OSError: As the system gives it.
        """
        dtype = getattr(torch, DTYPES[fold.dtype][1])
        # Two precisions above a 16-bit result float32 is; a float32 result needs float64 to be rounded but once.
        compute = torch.float32 if dtype.itemsize == 2 else torch.float64
        rows, cols = _matrix(fold.shape)
        block = BLOCK_ELEMENTS[self._device.type]
        if self._device.type == "cuda":  # every target's block waits in pinned memory until the stream is done
            block //= -(-len(fold.targets) // _TARGETS_A_BLOCK)
        step = max(1, block // max(cols, 1))
        step = step // SAMPLED_ROWS * SAMPLED_ROWS or step
        key = noise_key(self._seed, fold.name) if self._stochastic and dtype.itemsize == 2 else None
        deltas = [delta.prepare(fold.base, self._device, compute) for _, delta in fold.deltas]
        sampled = SAMPLED_ROWS if rows >= 4 * SAMPLED_ROWS else 1
        job = _Job(fold, compute, dtype, cols, deltas, key, sampled)
        digests = [hashlib.sha256() for _ in fold.targets]
        for slot in self._slots:
            slot.begin(job)

        def write(number: int, offset: int, block: memoryview) -> None:
            target = fold.targets[number]
            digests[number].update(block)
            with _opened(self._root / target.file, os.O_WRONLY) as file:  # a sweep has more files than may be open
                write_exactly(file, block, target.offset + offset)
            self._progress(len(block))

        with _opened(fold.base.file, os.O_RDONLY) as base:
            starts = range(0, rows, step)
            for number, start in enumerate(starts):
                slot = self._slots[number % len(self._slots)]
                slot.drain(write)
                slot.start(base, start, min(start + step, rows), write)
            for number in range(len(starts), len(starts) + len(self._slots)):
                self._slots[number % len(self._slots)].drain(write)
        if not all(slot.finite() for slot in self._slots):
            self._refuse_not_finite(fold)
        errors = tuple(
            ErrorSums.total(slot.sums[number] for slot in self._slots) for number in range(len(fold.targets))
        )
        return Folded(fold.name, tuple(digest.hexdigest() for digest in digests), errors)

    def _refuse_not_finite(self, fold: Fold) -> None:
        """Find out whose fault it is: an adapter's, the base's, or the dtype's range."""
        for _, delta in fold.deltas:
            for tensor in delta.stored:
                if not bool(tensor.read().isfinite().all()):
                    raise not_finite(tensor)
        if not bool(fold.base.read().isfinite().all()):
            raise AdapterError(
                f"{fold.base.file}: tensor {fold.base.name}: holds NaN or infinity; fetch the base again"
            )
        for target in fold.targets:
            written = TensorInfo(fold.name, fold.dtype, fold.shape, self._root / target.file, target.offset)
            if not bool(written.read().isfinite().all()):
                raise AdapterError(f"{fold.name}: the merged values do not fit {fold.dtype}; choose another --dtype")


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: the first dimension and the rest; a vector is one row."""
    if len(shape) < 2:
        return 1, TensorInfo("", "U8", shape, Path(), 0).elements
    return shape[0], TensorInfo("", "U8", shape[1:], Path(), 0).elements


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


@contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(file, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
