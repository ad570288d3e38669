"""Jobs handed out to workers, each of which holds one engine: one in this process, or many on Ray."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mergekit_bio.errors import EngineError

Job = TypeVar("Job", bound=Hashable)
Result = TypeVar("Result")
JobIn = TypeVar("JobIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

#: So many workers may die of a job before it is given up.
DEATHS_OF_A_JOB = 3


class Worker(Protocol[JobIn, ResultOut]):
    """Does one job after the other. What decides a job's result comes with the job."""

    def answer(self, job: JobIn, following: JobIn | None) -> ResultOut:
        """Do a job.

        Args:
            job: What to do.
            following: What will probably come next, and may be read ahead.
        """

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """How a worker ended a job.

    Attributes:
        worker: Its number.
        result: What came out; None where the worker died.
        died: Whether it did.
    """

    worker: int
    result: Result | None
    died: bool = False


class Workers(Protocol[JobIn, Result]):
    """Some workers, each with one job at a time.

    Attributes:
        count: How many were asked for.
    """

    count: int

    @property
    def up(self) -> int:
        """How many can work now."""

    def free(self) -> Sequence[int]:
        """The numbers of those that can work and have no job."""

    def start(self, worker: int, job: JobIn, following: JobIn | None) -> None:
        """Give a free worker a job."""

    def wait(self) -> Finished[Result] | None:
        """Wait until a job is finished; None: something else has changed, such as a worker that came back.

        Raises:
            MergekitBioError: A worker raised it, or no worker is left.
        """


class OneWorker(Generic[Job, Result]):
    """One worker in this process.

    Args:
        worker: Which one; whoever made it closes it.
    """

    count = up = 1

    def __init__(self, worker: Worker[Job, Result]) -> None:
        self._worker = worker
        self._next: tuple[Job, Job | None] | None = None

    def free(self) -> Sequence[int]:
        """The number of the worker, once it is asked: see :class:`Workers`."""
        return [0] if self._next is None else []

    def start(self, worker: int, job: Job, following: Job | None) -> None:
        """Keep the job for :meth:`wait`."""
        self._next = job, following

    def wait(self) -> Finished[Result] | None:
        """Do the job."""
        if self._next is None:
            return None
        result = self._worker.answer(*self._next)
        self._next = None
        return Finished(0, result)


def hand_out(
    workers: Workers[Job, Result],
    jobs: Sequence[Job],
    *,
    group: Callable[[Job], Hashable],
    started: Callable[[Job], None],
    note: Callable[[str], None],
    rest: Callable[[Result], Job | None] = lambda result: None,
) -> Iterator[tuple[Job, Result | None]]:
    """Have every job done once, in whatever order it goes fastest.

    Args:
        workers: Who works.
        jobs: In the order in which one worker does them; a job's text names it to a user.
        group: Jobs between which a worker changes cheaply. It stays with its group as long as that has open jobs.
        started: Is told of every job that is begun.
        note: Is told of workers that die.
        rest: What a result leaves of its job: the same worker goes on with it at once.

    Yields:
        A job and its result, as they come; None for a job that has killed ``DEATHS_OF_A_JOB`` workers.

    Raises:
        EngineError: Workers die whatever they are given.
    """
    queue = _Queue(jobs, group)
    running: dict[int, tuple[Job, Job | None]] = {}
    deaths: Counter[Job] = Counter()
    suspected: set[Job] = set()
    given_up_in_a_row = 0
    while queue or running:
        # 1. Every free worker gets a job, and is told what it will probably get next. A job that a worker may have died
        # of is neither read ahead nor done while another is: if the worker dies again, it is clear of what.
        for worker in workers.free():
            if (job := queue.take(worker)) is None:
                break
            following = None if job in suspected else queue.reserve(worker, suspected)
            started(job)
            running[worker] = job, following
            workers.start(worker, job, following)
        # 2. A worker has come to an end, one way or the other.
        finished = workers.wait()
        if finished is None:
            continue
        job, following = running.pop(finished.worker)
        if not finished.died:
            given_up_in_a_row = 0
            left = None if finished.result is None else rest(finished.result)
            if left is not None:
                running[finished.worker] = left, following
                workers.start(finished.worker, left, following)
            yield job, finished.result
            continue
        # 3. The job of a worker that died goes to the next free one, unless it is what kills them.
        queue.forget(finished.worker)
        deaths[job] += 1
        suspected |= {job} if following is None else {job, following}
        if deaths[job] < DEATHS_OF_A_JOB:
            note(f"note: a worker died; asked again: {job}")
            queue.put_back(job)
            continue
        given_up_in_a_row += 1
        if given_up_in_a_row > 1:
            raise EngineError(
                f"workers die whatever they are asked, the last {DEATHS_OF_A_JOB} of them of {job}; is there memory "
                "enough for so many? Run the command again to go on"
            )
        note(f"note: {deaths[job]} workers died; skipped: {job}")
        yield job, None


class _Queue(Generic[Job]):
    """Open jobs, group by group, and who gets which."""

    def __init__(self, jobs: Sequence[Job], group: Callable[[Job], Hashable]) -> None:
        self._group = group
        self._open: dict[Hashable, deque[Job]] = {}
        for job in jobs:
            self._open.setdefault(group(job), deque()).append(job)
        self._reserved: dict[int, Job] = {}
        self._at: dict[int, Hashable] = {}

    def __len__(self) -> int:
        return sum(map(len, self._open.values())) + len(self._reserved)

    def take(self, worker: int) -> Job | None:
        """The job that a worker does now: the one reserved for it, an open one, else one reserved for another."""
        job = self._reserved.pop(worker, None)
        if job is None:
            job = self._next(worker)
        if job is None and self._reserved:
            job = self._reserved.pop(next(iter(self._reserved)))
        if job is not None:
            self._at[worker] = self._group(job)
        return job

    def reserve(self, worker: int, avoid: Collection[Job]) -> Job | None:
        """Keep a job for a worker, as long as the others have enough to do."""
        job = self._next(worker)
        if job is None:
            return None
        if job in avoid:
            self.put_back(job)
            return None
        self._reserved[worker] = job
        return job

    def put_back(self, job: Job) -> None:
        """Make a job open again, the first of its group."""
        self._open[self._group(job)].appendleft(job)

    def forget(self, worker: int) -> None:
        """A worker has lost its engine: it belongs to no group, and what it was to get is open again."""
        self._at.pop(worker, None)
        if (job := self._reserved.pop(worker, None)) is not None:
            self.put_back(job)

    def _next(self, worker: int) -> Job | None:
        """An open job: of the worker's own group, else of one that nobody is at, else of the one with most of them."""
        groups = [group for group, jobs in self._open.items() if jobs]
        if not groups:
            return None
        taken = {*self._at.values(), *map(self._group, self._reserved.values())}
        if self._at.get(worker) in groups:
            chosen = self._at[worker]
        else:
            chosen = next((group for group in groups if group not in taken), None)
            if chosen is None:
                chosen = max(groups, key=lambda group: len(self._open[group]))
        return self._open[chosen].popleft()
