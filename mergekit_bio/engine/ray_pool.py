"""Many workers, each in a process of its own with its share of cores or GPUs: Ray's actors, here or on a cluster."""

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic

from mergekit_bio.engine.interface import Engine
from mergekit_bio.engine.pool import Finished, Job, Result, Worker
from mergekit_bio.errors import EngineError, MergekitBioError, MissingPackageError

#: What Ray reads when it is imported and started, where it is started here. The user's own settings win.
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_LOCAL_ENVIRONMENT = {
    _CLUSTERS: "0",  # else it turns 127.0.0.1 into the machine's address, and listens there
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else one is written into the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray before 2.60 warns of what this will do
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill workers on a machine whose memory others have filled
}
#: What vLLM reads in a worker. Its engine is in the worker's own process, and ends with it whichever way that ends.
_WORKER_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
#: Bytes of Ray's object store, at least, and for each worker: 32 prefixes of an 8B model, on their way, are 15 MB.
_OBJECT_STORE, _OBJECT_STORE_EACH = 100 << 20, 32 << 20
#: A path of Ray's sockets, of which a folder is the beginning, has 107 bytes at most.
_LONGEST_FOLDER = 40
_SECONDS_TO_KNOCK = 10.0
_SECONDS_TO_CLOSE = 30.0
_SECONDS_BETWEEN_PROBES = 0.2
#: Seconds without any worker, after which the user is told.
_SECONDS_ALONE = 60.0


def missing_ray(purpose: str) -> MissingPackageError | None:
    """The error that says how to install Ray, where it is not."""
    return None if find_spec("ray") else MissingPackageError("Ray", "cluster", purpose)


class Cluster:
    """Ray, connected to.

    Args:
        workers: How many it will run.
        gpus_each: GPUs that each of them takes.
        note: Is told what a user should know.
    """

    def __init__(self, workers: int, gpus_each: int, note: Callable[[str], None]) -> None:
        self.count, self._gpus_each, self._note = workers, gpus_each, note

    @contextmanager
    def workers(self, make: Callable[[], Worker[Job, Result]]) -> "Iterator[RayWorkers[Job, Result]]":
        """Workers, which end with the block: at once if it is left by an exception.

        Args:
            make: Makes one, in its own process, when it gets its first job. Is pickled.
        """
        workers = RayWorkers(make, count=self.count, gpus_each=self._gpus_each, note=self._note)
        try:
            yield workers
            workers.close()
        finally:
            workers.kill()


def cluster_for(
    engine: type[Engine],
    options: Mapping[str, Any],
    *,
    workers: int | None,
    address: str | None,
    note: Callable[[str], None],
) -> AbstractContextManager[Cluster | None]:
    """Ray for workers with an engine each; see :func:`cluster_on`.

    Args:
        engine: What each worker holds.
        options: The engine's options, which say on which device it is, and how many GPUs one takes.
        workers: See :func:`cluster_on`, as for all that follows.
    """
    if engine.remote and ((workers or 1) > 1 or address is not None):
        raise EngineError(f"--workers, --ray: --engine {engine.name} asks all its servers at once; leave them out")
    device, gpus_each = str(options.get("device", "auto")), engine.gpus(options)
    return cluster_on(device, gpus_each, workers=workers, address=address, note=note)


@contextmanager
def cluster_on(
    device: str, gpus_each: int, *, workers: int | None, address: str | None, note: Callable[[str], None]
) -> Iterator[Cluster | None]:
    """Ray for as many workers as are asked for, or None where one worker in this process is to do it.

    Args:
        device: A worker's torch device, or auto. One GPU by its number is for one process.
        gpus_each: GPUs that a worker takes, on a machine that has them.
        workers: How many; None takes one for every GPU that there is, if Ray is installed.
        address: Of a running cluster; None starts Ray on this machine, listening on 127.0.0.1 only.
        note: Is told what a user should know.

    Raises:
        EngineError: There are too few GPUs, or no cluster at the address; or several are to work on one GPU.
        MissingPackageError: Ray is not installed.
    """
    # 1. Where one worker in this process is enough.
    if workers is not None and workers < 1:
        raise EngineError(f"--workers {workers}: write a whole number of 1 or more")
    if device.startswith("cuda:"):
        if (workers or 1) > 1 or address is not None:
            raise EngineError(
                f"--workers, --ray: device {device} is one GPU, and every worker gets one of its own; leave the device "
                "out"
            )
        yield None
        return
    if address is None:
        import torch

        gpus = torch.cuda.device_count() if gpus_each else 0
        if workers is None:
            workers = max(1, gpus // gpus_each) if gpus else 1
            if workers > 1 and missing_ray(""):
                note(f"note: {gpus_each} of {gpus} GPUs in use; for all: pip install 'mergekit-bio[cluster]'")
                workers = 1
        if workers == 1:
            yield None
            return
        if gpus and workers * gpus_each > gpus:
            raise EngineError(
                f"--workers {workers}: each takes {gpus_each} GPU{'s' * (gpus_each > 1)}, and there are {gpus}; take "
                f"{max(1, gpus // gpus_each)}"
            )
    # 2. Ray.
    if error := missing_ray(f"--workers {workers}" if address is None else "--ray"):
        raise error
    with _ray_here(workers or 1) if address is None else _ray_at(address):
        import ray

        if address is not None:
            # Of a cluster that is still growing, workers may wait for their part.
            gpus = int(ray.cluster_resources().get("GPU", 0)) if gpus_each else 0
            machines = sum(bool(node["Alive"]) for node in ray.nodes())
            workers = workers or (max(1, gpus // gpus_each) if gpus else machines)
        assert workers is not None
        yield Cluster(workers, gpus_each if gpus else 0, note)


@contextmanager
def _local_settings() -> Iterator[None]:
    """``_LOCAL_ENVIRONMENT`` for as long as the block lasts, where the user has not set it.

    Ray reads its environment when it is imported, which vLLM may have done before: it is made to read it again.
    """
    new = {name: value for name, value in _LOCAL_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(new)
    from ray._private import ray_constants

    config, clusters = import_module("ray._raylet").Config, ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = os.environ[_CLUSTERS] != "0"
    config.initialize("")
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        config.initialize("")


@contextmanager
def _silent() -> Iterator[None]:
    """Ray prints every death of a worker to stdout, where results belong. Such things are told here."""
    from ray._private.worker import stdout_deduplicator as printed

    before, printed.skip_re = printed.skip_re, re.compile("")  # which matches every line
    try:
        yield
    finally:
        printed.skip_re = before


@contextmanager
def _ray_here(workers: int) -> Iterator[None]:
    """Ray on this machine, or what the process has started of it already."""
    with _local_settings(), _silent():
        import ray

        if ray.is_initialized():
            yield
            return
        parent = tempfile.gettempdir()
        folder = tempfile.mkdtemp(prefix="mergekit-bio-", dir=parent if len(parent) < _LONGEST_FOLDER - 22 else "/tmp")
        try:
            with _started(
                address="local",
                num_cpus=workers,  # as a count of places: how many threads each takes is told to it
                include_dashboard=False,
                object_store_memory=max(_OBJECT_STORE, workers * _OBJECT_STORE_EACH),
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            ):
                yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ray_at(address: str) -> Iterator[None]:
    with _silent():
        import ray

        if ray.is_initialized():
            yield
            return
        with ExitStack() as stack:
            try:
                _knock(address)
                stack.enter_context(_started(address=address))
            except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
                reason = str(error).strip().split("\n")[0]
                raise EngineError(
                    f"--ray {address}: cannot be reached ({reason}); start it with: ray start --head"
                ) from error
            yield


def _knock(address: str) -> None:
    """Ray itself would try for minutes to reach a place where nobody is.

    Raises:
        OSError: Nobody is there.
    """
    host, colon, port = address.rpartition(":")
    if colon and host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_KNOCK).close()


@contextmanager
def _started(**arguments: Any) -> Iterator[None]:
    import ray

    on_termination = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)  # Ray has put its own in its place
    try:
        yield
    finally:
        ray.shutdown()


class _Actor:
    """A worker's process.

    Args:
        folder: The directory to work in.
        environment: Variables to set, if they are not.
        threads: For computing; None gives it its share of the machine's cores.
        sharing: How many such processes a machine has, at most.
    """

    def __init__(self, folder: str, environment: Mapping[str, str], threads: str | None, sharing: int) -> None:
        self._folder = folder
        self._make: list[Any] = []
        self._worker: Worker[Any, Any] | None = None
        # Ray has set this one: 1 for an actor that takes one CPU.
        os.environ["OMP_NUM_THREADS"] = threads or str(max(1, len(os.sched_getaffinity(0)) // sharing))
        for name, value in environment.items():
            os.environ.setdefault(name, value)

    def ready(self, make: list[Any]) -> None:
        """Answers once the process is there, and knows where to get what makes its worker: a reference in a list."""
        self._make = make

    def answer(self, job: Any, following: Any) -> tuple[Any, tuple[type[MergekitBioError], str] | None]:
        """The worker's result, or an error of the user's: its type and text, for not every exception can be pickled."""
        try:
            if self._worker is None:
                self._worker = self._start()
            return self._worker.answer(job, following), None
        except MergekitBioError as error:
            return None, (type(error), str(error))

    def close(self) -> None:
        """Let the worker free what it holds."""
        if self._worker is not None:
            self._worker.close()

    def _start(self) -> Worker[Any, Any]:
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise EngineError(
                f"{self._folder}: cannot be entered on {socket.gethostname()} ({error.strerror}); run the command in "
                "a folder that every machine of the cluster has"
            ) from None
        import ray

        # Only now, as it may open files by their relative paths.
        (reference,) = self._make
        make: Callable[[], Worker[Any, Any]] = ray.get(reference)
        return make()


class RayWorkers(Generic[Job, Result]):
    """Workers in actors of Ray; see :class:`mergekit_bio.engine.pool.Workers`.

    An actor that dies is started again by Ray, elsewhere if its machine is gone, and until it answers nothing is sent
    to it: a restarting actor refuses at once.

    Args:
        make: Makes a worker, in its process, when it gets its first job.
        count: How many.
        gpus_each: GPUs for each.
        note: Is told what a user should know.
    """

    def __init__(
        self, make: Callable[[], Worker[Job, Result]], *, count: int, gpus_each: int, note: Callable[[str], None]
    ) -> None:
        self.count = count
        self._make, self._gpus_each, self._note = make, gpus_each, note
        self._pickled: Any = None
        self._actors: list[Any] = []
        self._free: set[int] = set()
        self._running: dict[Any, int] = {}
        self._probes: dict[Any, int] = {}

    @property
    def up(self) -> int:
        """How many answer, or have a job."""
        return len(self._free) + len(self._running)

    def free(self) -> Sequence[int]:
        """Those that answer and have no job; the first call starts all of them."""
        if not self._actors:
            self._start_actors()
        return sorted(self._free)

    def start(self, worker: int, job: Job, following: Job | None) -> None:
        """Send a job."""
        self._free.remove(worker)
        self._running[self._actors[worker].answer.remote(job, following)] = worker

    def wait(self) -> Finished[Result] | None:
        """Wait for a result, for a death, or for a worker that is up (again)."""
        import ray

        if not self._running and not self._probes:
            raise EngineError("no worker is left; run the command again to go on")
        ready, _ = ray.wait([*self._running, *self._probes], num_returns=1, timeout=_SECONDS_ALONE)
        if not ready:
            if self.up == 0:
                self._note("note: no worker is up; waiting for the cluster")
            return None
        (reference,) = ready
        if (worker := self._probes.pop(reference, None)) is not None:
            self._probed(worker, reference)
            return None
        worker = self._running.pop(reference)
        try:
            result, error = ray.get(reference)
        except ray.exceptions.RayTaskError:
            raise  # a bug
        except ray.exceptions.RayError:
            self._probe(worker)
            return Finished(worker, None, died=True)
        if error is not None:
            kind, text = error
            raise kind.__new__(kind, text)
        self._free.add(worker)
        return Finished(worker, result)

    def close(self) -> None:
        """Let the workers free what they hold."""
        import ray

        closing = [self._actors[worker].close.remote() for worker in self._free]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_SECONDS_TO_CLOSE)

    def kill(self) -> None:
        """End the workers."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _start_actors(self) -> None:
        import ray

        machines = max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
        sharing = -(-self.count // machines)
        environment = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
        environment |= {name: value for name, value in _WORKER_ENVIRONMENT.items() if name not in environment}
        actor = ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=self._gpus_each,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="SPREAD" if machines > 1 else "DEFAULT",
        )
        self._pickled = ray.put(self._make)
        arguments = str(Path.cwd()), environment, os.environ.get("OMP_NUM_THREADS"), sharing
        self._actors = [actor.remote(*arguments) for _ in range(self.count)]
        for worker in range(self.count):
            self._probe(worker)

    def _probe(self, worker: int) -> None:
        self._probes[self._actors[worker].ready.remote([self._pickled])] = worker

    def _probed(self, worker: int, reference: Any) -> None:
        import ray

        try:
            ray.get(reference)
            self._free.add(worker)
        except ray.exceptions.ActorDiedError:
            self._note(f"note: a worker is gone for good; {self.up} of {self.count} are up")
        except ray.exceptions.RayActorError:  # it is still on its way
            time.sleep(_SECONDS_BETWEEN_PROBES)
            self._probe(worker)
