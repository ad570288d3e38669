"""Carries a plan out: copies what is copied, folds what is folded, side by side."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Lock, local
from typing import TYPE_CHECKING, Any

from mergekit_bio.audio.device import full_float32
from mergekit_bio.checkpoint.clone import copy_range, link_or_copy, reflink, start_write_back, write_exactly
from mergekit_bio.merging.devices import compute_devices
from mergekit_bio.merging.journal import Journal
from mergekit_bio.merging.plan import Copy, Fold, MergePlan, OutputShard

if TYPE_CHECKING:
    import torch

    from mergekit_bio.merging.fold import Folded

_CHUNK = 64 << 20
_WORKERS_PER_GPU = 4


class _Stopped(Exception):
    """Another worker has failed, or the user has interrupted: leave quietly."""


def cores() -> int:
    """Processor cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def execute(plan: MergePlan, root: Path, journal: Journal, progress: Callable[[int], None]) -> "tuple[Folded, ...]":
    """Write every shard of ``plan`` under ``root``.

    Args:
        plan: What to do.
        root: An existing directory, with what the journal says and nothing else.
        journal: Of what is finished; it is not done again.
        progress: Called from any worker with numbers of bytes that sum up to ``plan.bytes_on_disk``, what is finished
            among them.

    Returns:
        The folds' results, in the plan's order.
    """
    lock, stop = Lock(), Event()

    def advance(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            progress(count)

    started: list[Future[Any]] = []
    folding: list[Future[Folded]] = []
    with ExitStack() as afterwards, ExitStack() as pools:
        copiers = pools.enter_context(ThreadPoolExecutor(cores(), "merge"))
        # What must be on the disk at the end is sent there at once, by a thread that waits for the disk.
        sender = pools.enter_context(ThreadPoolExecutor(1, "disk"))

        def write_back(file: str, offset: int, count: int) -> None:
            with suppress(RuntimeError):  # the sender has been told to stop
                if plan.request.fsync:
                    sender.submit(start_write_back, root / file, offset, count)

        try:
            # 1. Make the files, and start copying at once. Importing torch takes a second and runs beside it.
            for shard in plan.shards:
                for copies in _create(shard, root, journal, advance):
                    started.append(copiers.submit(_copy, copies, shard.file, root, journal, write_back, advance))
            # 2. Start folding: on a CPU by those that copy, on GPUs by a few for each.
            if plan.folds:
                devices = compute_devices(plan.request.device)
                import torch

                afterwards.enter_context(full_float32())
                # What a worker sets for itself is the default of later threads.
                afterwards.callback(torch.set_num_threads, torch.get_num_threads())
                folders = [copiers]
                if devices[0].type != "cpu":
                    folders = [pools.enter_context(ThreadPoolExecutor(_WORKERS_PER_GPU)) for _ in devices]
                folding = _start_folding(plan, root, devices, folders, journal, write_back, advance)
                started += folding
            # 3. Wait for all of it, or for the first that fails. Then whoever is at work leaves, and nobody begins.
            wait(started, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for job in started:
                job.cancel()
            sender.shutdown(wait=False, cancel_futures=True)
    for job in started:
        failure = None if job.cancelled() else job.exception()
        if failure is not None and not isinstance(failure, _Stopped):
            raise failure
    # 4. Give files that several outputs share their other names.
    for shard in plan.shards:
        for link in shard.links:
            (root / link).parent.mkdir(exist_ok=True)
            (root / link).unlink(missing_ok=True)  # of a process that was killed
            link_or_copy(root / shard.file, root / link)
    return tuple(fold.result() for fold in folding)


def _create(
    shard: OutputShard, root: Path, journal: Journal, advance: Callable[[int], None]
) -> Iterable[Sequence[Copy]]:
    """Make the file with its header; give the ranges still to be copied, in portions."""
    if journal.is_made(shard.file):
        cloned = journal.is_cloned(shard.file)
    else:
        cloned = _make(shard, root / shard.file)
        journal.note_made(shard.file, cloned=cloned)
    advance(len(shard.header))
    for portion in _portions(shard.copies):
        if cloned or journal.is_copied(shard.file, portion):
            advance(sum(copy.count for copy in portion))
        else:
            yield portion


def _make(shard: OutputShard, file: Path) -> bool:
    """Make the file with its header and its size; whether it is a clone of its source, with all that is copied."""
    file.parent.mkdir(exist_ok=True)
    with file.open("wb", buffering=0) as stream:
        if shard.mirrors is not None:
            with shard.mirrors.open("rb") as source:
                if reflink(source.fileno(), stream.fileno()):
                    return True
        os.truncate(stream.fileno(), shard.size)
        write_exactly(stream.fileno(), shard.header, 0)
    return False


def _portions(copies: Sequence[Copy]) -> Iterable[Sequence[Copy]]:
    """The ranges cut and joined to pieces of work of one size; the same for the same plan."""
    portion: list[Copy] = []
    for copy in copies:
        for start in range(0, copy.count, _CHUNK):
            count = min(_CHUNK, copy.count - start)
            portion.append(Copy(copy.source, copy.source_offset + start, copy.target_offset + start, count))
            if sum(part.count for part in portion) >= _CHUNK:
                yield portion
                portion = []
    if portion:
        yield portion


def _copy(
    copies: Sequence[Copy],
    target: str,
    root: Path,
    journal: Journal,
    write_back: Callable[[str, int, int], None],
    advance: Callable[[int], None],
) -> None:
    with (root / target).open("r+b", buffering=0) as writer:
        for copy in copies:
            with copy.source.open("rb", buffering=0) as reader:
                copy_range(reader.fileno(), copy.source_offset, writer.fileno(), copy.target_offset, copy.count)
            advance(copy.count)
    journal.note_copied(target, copies)
    first, last = copies[0], copies[-1]
    write_back(target, first.target_offset, last.target_offset + last.count - first.target_offset)


def _start_folding(
    plan: MergePlan,
    root: Path,
    devices: "Sequence[torch.device]",
    pools: Sequence[ThreadPoolExecutor],
    journal: Journal,
    write_back: Callable[[str, int, int], None],
    advance: Callable[[int], None],
) -> "list[Future[Folded]]":
    """Hand the folds to the workers of each device; the results come in the plan's order."""
    import torch

    from mergekit_bio.merging.fold import Folder

    state = local()  # every worker has buffers of its own

    def fold(job: Fold, device: torch.device) -> "Folded":
        if (finished := journal.folded(job.name)) is not None:
            advance(job.nbytes * len(job.targets))
            return finished
        if not hasattr(state, "folder"):
            torch.set_num_threads(1)  # of this worker: the workers are the parallelism
            state.folder = Folder(root=root, device=device, request=plan.request, progress=advance)
        result: Folded = state.folder.fold(job)
        for target in job.targets:
            write_back(target.file, target.offset, job.nbytes)
        journal.note_folded(job.name, result)
        return result

    # The largest first, so that the workers end together; GPUs take turns.
    indexes = range(len(plan.folds))
    order = sorted(indexes, key=lambda index: -plan.folds[index].nbytes * len(plan.folds[index].targets))
    futures: dict[int, Future[Folded]] = {}
    for turn, index in enumerate(order):
        device_index = turn % len(devices)
        futures[index] = pools[device_index].submit(fold, plan.folds[index], devices[device_index])
    return [futures[index] for index in indexes]
