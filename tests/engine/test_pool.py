"""Jobs handed out to workers that die: by a simulation at random, and by real processes of Ray."""

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from engine.mortal_workers import DEADLY, REFUSED, Mortal, Noting
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bio.engine.choice import engine_class
from mergekit_bio.engine.pool import DEATHS_OF_A_JOB, Finished, OneWorker, hand_out
from mergekit_bio.engine.ray_pool import cluster_for
from mergekit_bio.errors import EngineError, MissingPackageError

HAND_OUT = {"group": lambda job: job // 10, "started": lambda job: None, "note": lambda text: None}
ENGINE = engine_class("transformers")


class Simulated:
    """Workers whose jobs end in any order and who die of some, or once of nothing, and come back some time later."""

    def __init__(self, count, seed, deadly=None, accidents=0.0):
        self.count = self.up = count
        self.chance, self.deadly = random.Random(seed), set() if deadly is None else {deadly}
        self.accidents, self.had_one = accidents, set()
        self.running, self.down, self.log = {}, set(), []

    def free(self):
        return [worker for worker in range(self.count) if worker not in self.running and worker not in self.down]

    def start(self, worker, job, following):
        assert worker in self.free() and all(job != other for other, _ in self.running.values())
        self.running[worker] = job, following
        self.log.append((worker, job))

    def wait(self):
        if self.down and (not self.running or self.chance.random() < 0.3):
            self.down.pop()
            return None
        worker = self.chance.choice(sorted(self.running))
        job, following = self.running.pop(worker)
        accident = job not in self.had_one and self.chance.random() < self.accidents
        if accident or self.deadly & {job, following}:
            self.had_one |= {job} if accident else set()
            self.down.add(worker)
            return Finished(worker, None, died=True)
        return Finished(worker, -job)


@given(
    jobs=st.lists(st.integers(0, 59), unique=True).map(sorted),
    workers=st.integers(1, 5),
    deadly=st.none() | st.integers(0, 59),
    seed=st.integers(0, 1000),
)
def test_every_job_is_done_once_and_only_what_kills_is_given_up(jobs, workers, deadly, seed):
    simulated = Simulated(workers, seed, deadly, accidents=0.2)
    results = list(hand_out(simulated, jobs, **HAND_OUT))
    assert sorted(job for job, _ in results) == jobs
    assert {job for job, result in results if result is None} == {deadly} & {*jobs}
    assert all(result == -job for job, result in results if job != deadly)


@given(workers=st.integers(1, 5), deadly=st.none() | st.integers(0, 5), seed=st.integers(0, 1000))
def test_a_worker_goes_on_with_what_is_left_of_its_job(workers, deadly, seed):
    """Job 503 leaves 502, that 501, and that 500."""
    simulated = Simulated(workers, seed, None if deadly is None else 101 * deadly, accidents=0.2)
    rest = {"rest": lambda result: -result - 1 if result % 100 else None}
    results = list(hand_out(simulated, [101 * parts for parts in range(6)], **HAND_OUT, **rest))
    done = Counter(job for job, result in results if result is not None)
    others = [parts for parts in range(6) if parts != deadly]
    assert done == Counter(100 * parts + part for parts in others for part in range(parts + 1))
    for worker, job in simulated.log if deadly is None and not simulated.had_one else ():
        assert {who for who, other in simulated.log if other // 100 == job // 100} == {worker}


@given(workers=st.integers(1, 5), groups=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_worker_leaves_its_group_when_nothing_of_it_is_open(workers, groups, seed):
    jobs = [10 * group + number for group in range(groups) for number in range(8)]
    simulated = Simulated(workers, seed)
    list(hand_out(simulated, jobs, **HAND_OUT))
    # Every worker begins with a group of its own, while there are groups.
    first = min(workers, groups)
    assert [job for _, job in simulated.log[:first]] == [10 * group for group in range(first)]
    for worker in range(workers):
        places = [(n, job // 10) for n, (who, job) in enumerate(simulated.log) if who == worker]
        for (_, before), (n, now) in pairwise(places):
            still_to_come = [job for _, job in simulated.log[n + 1 :] if job // 10 == before]
            assert before == now or len(still_to_come) <= workers - 1, "only what others had reserved"


def test_one_worker_does_the_jobs_in_their_order_and_knows_what_comes_next():
    seen = []

    class Here:
        def answer(self, job, following):
            seen.append((job, following))
            return job

    assert [job for job, _ in hand_out(OneWorker(Here()), [3, 1, 12, 4], **HAND_OUT)] == [3, 1, 4, 12]
    assert seen == [(3, 1), (1, 4), (4, 12), (12, None)]


def test_workers_without_ray_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingPackageError, match=r"--workers 2 needs Ray; .* pip install 'mergekit-bio\[cluster\]'"),
        cluster_for(ENGINE, {}, workers=2, address=None, note=print),
    ):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there_is_said_in_one_line(address, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with (
        pytest.raises(EngineError, match=rf"--ray {address}: cannot be reached .* ray start --head") as caught,
        cluster_for(ENGINE, {}, workers=2, address=address, note=print),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_what_no_pool_can_do_is_refused():
    http = engine_class("http")
    for engine, arguments, said in [
        (ENGINE, {"workers": 0, "address": None}, "--workers 0"),
        (http, {"workers": 2, "address": None}, "asks all its servers at once"),
        (http, {"workers": None, "address": "auto"}, "asks all its servers at once"),
    ]:
        with pytest.raises(EngineError, match=said), cluster_for(engine, {}, **arguments, note=print):
            pass


def test_one_gpu_by_its_number_is_for_one_process(monkeypatch):
    """Each of several workers sees one GPU, which is its number 0."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    with cluster_for(ENGINE, {"device": "cuda:1"}, workers=None, address=None, note=print) as cluster:
        assert cluster is None
    for arguments in ({"workers": 2, "address": None}, {"workers": None, "address": "auto"}):
        with (
            pytest.raises(EngineError, match="device cuda:1 is one GPU"),
            cluster_for(ENGINE, {"device": "cuda:1"}, **arguments, note=print),
        ):
            pass


def offspring() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def cluster(notes, monkeypatch_module):
    """Ray on this machine, for two workers."""
    pytest.importorskip("ray", reason="Ray is not installed")
    before = offspring()
    monkeypatch_module.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # where its processes find these workers
    with cluster_for(ENGINE, {}, workers=2, address=None, note=notes.append) as cluster:
        yield cluster
    assert not psutil.wait_procs([process for process in offspring() if process not in before], timeout=60)[1]
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_job_that_kills_three_workers_is_given_up_and_named(cluster, notes, capfd):
    """Each death is one of a real process, by SIGKILL; a job that is only read ahead kills too."""
    with cluster.workers(partial(Mortal, DEADLY)) as workers:
        results = dict(hand_out(workers, [1, 2, 3, 4, DEADLY, 7, 8, 9], **HAND_OUT | {"note": notes.append}))
    assert results.pop(DEADLY) is None
    assert {job: answer for job, (answer, _) in results.items()} == {job: job for job in (1, 2, 3, 4, 7, 8, 9)}
    assert f"note: {DEATHS_OF_A_JOB} workers died; skipped: {DEADLY}" in notes
    assert os.getpid() not in {pid for _, pid in results.values()}
    assert capfd.readouterr() == ("", "")


def test_workers_that_die_of_everything_end_it(cluster):
    with pytest.raises(EngineError, match="whatever they are asked"), cluster.workers(partial(Mortal, None)) as workers:
        list(hand_out(workers, [1, 2], **HAND_OUT))


def test_an_error_of_the_users_comes_through_as_it_is(cluster):
    with pytest.raises(MissingPackageError) as caught, cluster.workers(partial(Mortal, DEADLY)) as workers:
        list(hand_out(workers, [REFUSED], **HAND_OUT))
    assert str(caught.value) == str(MissingPackageError("Sound", "ears", "hearing"))


def test_workers_are_closed_at_the_end_and_then_gone(cluster, tmp_path):
    with cluster.workers(partial(Noting, DEADLY, str(tmp_path / "closed"))) as workers:
        results = list(hand_out(workers, [*range(10, 30)], **HAND_OUT))
    used = Counter(pid for _, (_, pid) in results)
    closed = {int(line) for line in Path(tmp_path / "closed").read_text().split()}
    assert used.keys() <= closed
    psutil.wait_procs([psutil.Process(pid) for pid in closed if psutil.pid_exists(pid)], timeout=60)
    assert not [pid for pid in closed if psutil.pid_exists(pid)]


def test_ray_listens_on_loopback_only(cluster):
    with cluster.workers(partial(Mortal, DEADLY)) as workers:
        list(hand_out(workers, [1, 2], **HAND_OUT))
        listening = {
            (process.name(), connection.laddr.ip)
            for process in [psutil.Process(), *offspring()]
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert "raylet" in {name for name, _ in listening}
    assert {ip.removeprefix("::ffff:") for _, ip in listening} == {"127.0.0.1"}
