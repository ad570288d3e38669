"""The arithmetic: one tensor, in blocks of rows, for every strength at once.

The bytes must be the same on every machine, so every step is one that IEEE 754 defines to the bit, but for one: the sum
in a product of matrices, which kernels take in orders of their own. That product is taken in float64 and rounded to
float32, where a difference in its last bits is lost. docs/checkpoint.md states the arithmetic; whoever changes it
counts ``plan.ARITHMETIC`` up.

A block is read once. Then, for each strength, it is mixed, rounded, measured and written. Buffers are allocated once
and used again for every block. On a GPU several blocks are under way, each with buffers and a stream of its own, so
that one block's transfer runs beside another's arithmetic. On a CPU there is one at a time; workers overlap instead.
"""

import ctypes
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from mergekit_bio.adapter.delta import not_finite
from mergekit_bio.checkpoint.clone import write_exactly
from mergekit_bio.checkpoint.header import DTYPES, TensorInfo, read_exactly
from mergekit_bio.errors import AdapterError
from mergekit_bio.merging.plan import Fold
from mergekit_bio.merging.request import MergeRequest
from mergekit_bio.merging.rounding import Noise, noise_key, round_into
from mergekit_bio.merging.rounding_loss import BASE, DELTA, ERROR, NEAREST

#: Writes bytes at an offset of the tensor, at the target with this index.
Write: TypeAlias = Callable[[int, int, memoryview], None]
#: Elements a block holds: small enough for a CPU core's cache, large enough for a GPU's launch cost.
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}
#: Blocks that are under way at the same time.
_BLOCKS_UNDER_WAY = {"cpu": 1, "cuda": 3}
#: Strengths that share a GPU's block at its full size; more of them get smaller blocks, and so the same memory.
_TARGETS_A_BLOCK = 12
#: The rounding loss is estimated from every 16th row; blocks begin at multiples of it.
SAMPLED_ROWS = 16


@dataclass(frozen=True)
class Folded:
    """What became of one fold.

    Attributes:
        sha256: Of the written bytes, one for each target.
        products: float64 [targets, 4, 4], on the device: what :mod:`~mergekit_bio.merging.rounding_loss` takes.
    """

    sha256: tuple[str, ...]
    products: torch.Tensor


class _Job:
    """What all blocks of one tensor have in common.

    Raises:
        AdapterError: A delta holds NaN or infinity.
    """

    def __init__(self, fold: Fold, device: torch.device, request: MergeRequest) -> None:
        self.fold = fold
        self.rows, self.cols = _matrix(fold.shape)
        self.dtype: torch.dtype = getattr(torch, DTYPES[fold.dtype][1])
        narrow = self.dtype.itemsize == 2
        # float32 is precise enough for a 16-bit result; a float32 result needs float64, or it would be rounded twice.
        self.compute = torch.float32 if narrow else torch.float64
        self.deltas = [delta.prepare(fold.base, device, self.compute) for delta in fold.deltas]
        stochastic = narrow and request.rounding == "stochastic"
        self.noise_key = noise_key(request.seed, fold.name) if stochastic else None
        # The error is measured on some rows of a large tensor, and on all rows of a small one.
        self.sample_step = SAMPLED_ROWS if self.rows >= 4 * SAMPLED_ROWS else 1

    def rows_per_block(self, device: torch.device) -> int:
        """A multiple of ``SAMPLED_ROWS`` where a block holds that many, so that samples are evenly spaced."""
        elements = BLOCK_ELEMENTS[device.type]
        if device.type == "cuda":  # every target's block waits in pinned memory until the stream is done
            elements //= -(-len(self.fold.targets) // _TARGETS_A_BLOCK)
        rows = max(1, elements // max(self.cols, 1))
        return rows // SAMPLED_ROWS * SAMPLED_ROWS or rows


class _BlockWorker:
    """Takes one block at a time from the file to the result, in buffers of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._noise: Noise | None = None
        self._unwritten: list[tuple[int, int, torch.Tensor]] = []  # arguments of Write; on a CPU none

    def begin(self, job: _Job) -> None:
        """Turn to another tensor. What one that failed has left is forgotten."""
        self._job = job
        self._unwritten.clear()
        self.products = torch.zeros(len(job.fold.targets), 4, 4, dtype=torch.float64, device=self._device)
        self.sampled = 0  # elements
        self._probe = torch.zeros((), dtype=torch.float64, device=self._device)
        if self._cuda:
            torch.cuda.current_stream(self._device).synchronize()  # what was prepared is used on other streams

    def start(self, base: int, start: int, stop: int, write: Write) -> None:
        """Set the device to work on rows ``[start, stop)``; ``base`` is a descriptor of the file that holds W0.

        A CPU is done when this returns, and the results are written. A GPU's are written by :meth:`drain`.
        """
        job, offset = self._job, start * self._job.cols * self._job.dtype.itemsize
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            # 1. Read W0, and compute what all strengths share: the deltas and the noise of rounding.
            weights = self._read(base, start, stop)
            deltas = self._compute_deltas(start, stop, weights)
            noise = self._draw_noise(start, stop)
            sample = self._sample_of(weights)
            for target_index, target in enumerate(job.fold.targets):
                # 2. Mix W0 + sum(strength * d). Its sampled rows are kept, because rounding works in place.
                mixed = self._mix(weights, deltas, target.strengths)
                sample[ERROR].copy_(self._sampled(mixed))
                # 3. Round, once.
                rounded = self._round(mixed, noise)
                # 4. Measure what rounding has changed.
                if deltas:
                    self._measure(target_index, sample, deltas, target.strengths, rounded)
                # 5. Hand the result over; a GPU's goes to this side while the next strength is computed.
                if self._cuda:
                    host = self._buffer(f"host{target_index}", rounded.shape, job.dtype, on_host=True)
                    self._unwritten.append((target_index, offset, host.copy_(rounded, non_blocking=True)))
                else:
                    write(target_index, offset, memory_of(rounded))

    def drain(self, write: Write) -> None:
        """Wait for the block that was started last, and write what is not written yet."""
        if self._stream is not None and self._unwritten:
            self._stream.synchronize()
        for target_index, offset, rounded in self._unwritten:
            write(target_index, offset, memory_of(rounded))
        self._unwritten.clear()

    def finite(self) -> bool:
        """Whether all results of the tensor are finite; a False may be an overflow of the sum that tells."""
        return bool(self._probe.isfinite())

    def _read(self, base: int, start: int, stop: int) -> torch.Tensor:
        """W0 [stop - start, cols] in the compute dtype; rows beyond the base's come from the adapter that has them."""
        job, info = self._job, self._job.fold.base
        stored = getattr(torch, DTYPES[info.dtype][1])
        weights = self._buffer("weights", (stop - start, job.cols), job.compute)
        end_of_base = min(stop, _matrix(info.shape)[0])
        if start < end_of_base:
            shape = (end_of_base - start, job.cols)
            raw = self._buffer("raw", shape, stored, on_host=True)
            read_exactly(base, memory_of(raw), info.begin + start * job.cols * stored.itemsize, info.file)
            if self._cuda:  # widened there: torch would widen on this side, and send twice the bytes
                raw = self._buffer("sent", shape, stored).copy_(raw, non_blocking=True)
            weights[: end_of_base - start].copy_(raw)
        if end_of_base < stop:
            first_new = max(end_of_base, start)
            weights[first_new - start :].copy_(job.fold.new_rows().read(first_new, stop))
        return weights

    def _compute_deltas(self, start: int, stop: int, weights: torch.Tensor) -> list[torch.Tensor]:
        """Each delta's rows [stop - start, cols], in the compute dtype."""
        job = self._job
        deltas = [self._buffer(f"delta{index}", weights.shape, job.compute) for index in range(len(job.deltas))]
        for delta, compute in zip(deltas, job.deltas, strict=True):
            compute(start, stop, weights, delta)
        return deltas

    def _draw_noise(self, start: int, stop: int) -> torch.Tensor | None:
        """Noise [stop - start, cols] for rounding at random; None for rounding to nearest."""
        job = self._job
        if job.noise_key is None:
            return None
        count = (stop - start) * job.cols
        if self._noise is None or self._noise.capacity < count:
            self._noise = Noise(max(count, BLOCK_ELEMENTS[self._device.type]), self._device)
        return self._noise.draw(job.noise_key, start * job.cols, count).view(stop - start, job.cols)

    def _mix(self, weights: torch.Tensor, deltas: Sequence[torch.Tensor], strengths: Sequence[float]) -> torch.Tensor:
        """W0 + sum(strength * d), in a buffer of its own."""
        mixed = self._buffer("mixed", weights.shape, self._job.compute)
        if not deltas:
            return mixed.copy_(weights)
        # Product and sum are each rounded. torch.add(alpha=...) would round them together where the processor has an
        # instruction for both, and apart where it has none.
        torch.mul(deltas[0], strengths[0], out=mixed).add_(weights)
        for delta, strength in zip(deltas[1:], strengths[1:], strict=True):
            mixed.add_(torch.mul(delta, strength, out=self._buffer("scaled", weights.shape, self._job.compute)))
        return mixed

    def _round(self, mixed: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """The result in the output's dtype; ``mixed`` is overwritten."""
        rounded = self._buffer("rounded", mixed.shape, self._job.dtype)
        flat = mixed.flatten()
        self._probe += torch.dot(flat, flat)  # before noise could carry the bits of a NaN round to a number
        round_into(mixed, rounded, noise)
        if self._job.dtype != torch.bfloat16:  # bfloat16 alone has the range of what it was computed in
            self._probe += rounded.sum(dtype=torch.float32)
        return rounded

    def _measure(
        self,
        target_index: int,
        sample: torch.Tensor,
        deltas: Sequence[torch.Tensor],
        strengths: Sequence[float],
        rounded: torch.Tensor,
    ) -> None:
        """Take the error of rounding, and of rounding to nearest, into the sums of one target.

        ``sample`` comes with what was mixed in the place of the error, and is overwritten.
        """
        job, exact = self._job, sample[ERROR]
        sample[DELTA].zero_()
        for delta, strength in zip(deltas, strengths, strict=True):
            sample[DELTA].add_(self._sampled(delta), alpha=strength)
        torch.sub(exact.to(job.dtype).to(job.compute), exact, out=sample[NEAREST])
        torch.sub(self._sampled(rounded).to(job.compute), exact, out=sample[ERROR])
        flat = sample.flatten(1)
        self.products[target_index] += flat @ flat.T

    def _sample_of(self, weights: torch.Tensor) -> torch.Tensor:
        """A place for sampled rows of delta, error, error of nearest and base [4, rows, cols]; the base is in it."""
        rows = self._sampled(weights)
        sample = self._buffer("sample", (4, *rows.shape), self._job.compute)
        sample[BASE].copy_(rows)
        self.sampled += rows.numel()
        return sample

    def _sampled(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:: self._job.sample_step]

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, on_host: bool = False) -> torch.Tensor:
        """A reused buffer of this shape on the device, or on this side of it: then, beside a GPU, pinned."""
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < count:
            device = torch.device("cpu") if on_host else self._device
            buffer = torch.empty(count, dtype=dtype, device=device, pin_memory=self._cuda and on_host)
            self._buffers[name] = buffer
        return buffer[:count].view(*shape)


class Folder:
    """Folds tensors on one device with buffers that are allocated once.

    Args:
        root: The output directory that targets are relative to.
        device: Where to compute.
        request: How results of 16 bits are rounded; wider ones go to nearest.
        progress: Called with the number of bytes of each written block.
    """

    def __init__(
        self, *, root: Path, device: torch.device, request: MergeRequest, progress: Callable[[int], None]
    ) -> None:
        self._root = root
        self._device = device
        self._request = request
        self._progress = progress
        self._workers = [_BlockWorker(device) for _ in range(_BLOCKS_UNDER_WAY[device.type])]

    def fold(self, fold: Fold) -> Folded:
        """Compute and write one tensor at all its targets.

        Raises:
            AdapterError: A delta holds NaN or infinity, or the result does not fit the output's dtype.
            OSError: As the system gives it.
        """
        job = _Job(fold, self._device, self._request)
        digests = [hashlib.sha256() for _ in fold.targets]
        for worker in self._workers:
            worker.begin(job)

        def write(target_index: int, offset: int, block: memoryview) -> None:
            target = fold.targets[target_index]
            digests[target_index].update(block)
            # Opened for each block, because a sweep has more files than may be open.
            with (self._root / target.file).open("r+b", buffering=0) as file:
                write_exactly(file.fileno(), block, target.offset + offset)
            self._progress(len(block))

        # The workers take turns. Blocks are written in their order, as the digests need them.
        step = job.rows_per_block(self._device)
        starts = range(0, job.rows, step)
        with fold.base.file.open("rb", buffering=0) as base:
            for turn, start in enumerate(starts):
                worker = self._workers[turn % len(self._workers)]
                worker.drain(write)
                worker.start(base.fileno(), start, min(start + step, job.rows), write)
            for turn in range(len(starts), len(starts) + len(self._workers)):
                self._workers[turn % len(self._workers)].drain(write)
        if not all(worker.finite() for worker in self._workers):
            self._refuse_not_finite(fold)
        # The sample stands for all elements.
        products = torch.stack([worker.products for worker in self._workers]).sum(0)
        products *= job.rows * job.cols / max(sum(worker.sampled for worker in self._workers), 1)
        return Folded(tuple(digest.hexdigest() for digest in digests), products)

    def _refuse_not_finite(self, fold: Fold) -> None:
        """Find out whose fault it is: an adapter's, the base's, or the dtype's range."""
        for delta in fold.deltas:
            for tensor in delta.stored:
                if not bool(tensor.read().isfinite().all()):
                    raise not_finite(tensor)
        base = fold.base.read()
        infinite = base.isinf()
        if bool(base.isnan().any()) or (fold.deltas and bool(infinite.any())):
            raise AdapterError(f"{fold.base.where}: holds NaN or infinity; fetch the base again")
        for target in fold.targets:
            written = TensorInfo(fold.name, fold.dtype, fold.shape, self._root / target.file, target.offset)
            # What is only converted may be infinite where the base is, as causal masks are.
            expected = infinite.flatten()[: written.elements].view(written.shape)
            if bool((~written.read().isfinite() & ~expected).any()):
                raise AdapterError(f"{fold.name}: the merged values do not fit {fold.dtype}; choose another --dtype")


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: the first dimension and the rest; a vector is one row."""
    rows, rest = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
    return rows, math.prod(rest)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")
