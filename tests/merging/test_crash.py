"""Whatever interrupts a merge, there is a complete output or none, and the next merge is not hindered."""

import contextlib
import filecmp
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mergekit_bio
from mergekit_bio.errors import MergekitBioError
from mergekit_bio.merging.verify import verify

synthetic = pytest.importorskip("synthetic", reason="eval/ is not on the path")

PROGRAM = Path(sys.executable).with_name("mergekit-bio")
ALPHAS = ("0.00", "0.25", "0.50", "0.75", "1.00")
TELLS_TIME = {"merge.json", "README.md"}  # these differ between two runs


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """base/ of 90 MB and adapter/: large enough to catch a sweep at every stage."""
    directory = tmp_path_factory.mktemp("sources")
    shape = synthetic.Dimensions(
        hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=2048, layers=8, vocabulary=16384
    )
    synthetic.write_llama(directory / "base", shape)
    synthetic.write_adapter(directory / "adapter", shape, base=directory / "base")
    return directory


def start(sources: Path, out: Path, *options: str) -> subprocess.Popen:
    inputs = ["--base", sources / "base", "--adapter", sources / "adapter", "--alpha", "0:1:0.25", "--device", "cpu"]
    command = [PROGRAM, "merge", *inputs, "--out", out, "--quiet", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """Its messages, when it has ended."""
    return process.communicate(timeout=120)[1]


def wait_until_writing(process: subprocess.Popen, folder: Path) -> None:
    while process.poll() is None and not any(folder.rglob("*.safetensors")):
        time.sleep(0.002)


@pytest.fixture(scope="module")
def reference(sources, tmp_path_factory) -> Path:
    """What an undisturbed sweep makes."""
    out = tmp_path_factory.mktemp("reference") / "out"
    process = start(sources, out)
    assert (finish(process), process.returncode) == ("", 0)
    assert sorted(path.name for path in out.iterdir()) == [f"alpha-{alpha}" for alpha in ALPHAS]
    for checkpoint in out.iterdir():
        verify(checkpoint)
    return out


def differences(found: Path, wanted: Path) -> set[str]:
    """Files below two directories that are not in both, or not the same to the byte."""
    files = {str(path.relative_to(root)) for root in (found, wanted) for path in root.rglob("*") if path.is_file()}
    compared = {file for file in files if Path(file).name not in TELLS_TIME}
    _, different, unreadable = filecmp.cmpfiles(found, wanted, compared, shallow=False)
    return {*different, *unreadable, *(file for file in files if not (found / file).exists())}


def merge_undisturbed(sources: Path, out: Path, reference: Path) -> None:
    """The next merge succeeds, and clears away what it finds."""
    process = start(sources, out, "--overwrite")
    assert (finish(process), process.returncode) == ("", 0)
    assert list(out.parent.iterdir()) == [out]
    assert differences(out, reference) == set()


@pytest.mark.repeated(2, 8)
def test_kill_at_a_random_moment(sources, reference, tmp_path, count):
    # Each victim is forked from a process that has imported everything: all of its life is merging.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergekit_bio.merging.merge", "mergekit_bio.merging.fold", "torch"])
    out = tmp_path / "out"
    inputs = {"base": sources / "base", "adapter": sources / "adapter", "alphas": ["0:1:0.25"], "device": "cpu"}

    def merging() -> multiprocessing.Process:
        process = context.Process(target=mergekit_bio.merge, kwargs=inputs | {"out": out, "overwrite": True})
        process.start()
        return process

    merging().join()  # starts the server
    began = time.monotonic()
    merging().join()
    duration = time.monotonic() - began
    chance = random.Random(0)
    for number in range(count):
        if number % 2:  # else the victim is about to overwrite
            shutil.rmtree(out)
        victim = merging()
        victim.join(chance.uniform(0, 1.1 * duration))
        victim.kill()
        victim.join()
        if out.exists():
            assert differences(out, reference) == set()
        for checkpoint in [path.parent for path in tmp_path.rglob("config.json")]:
            lacking = differences(checkpoint, reference / checkpoint.name)
            if lacking:
                with pytest.raises(MergekitBioError):
                    verify(checkpoint)
        successor = merging()
        successor.join()
        assert successor.exitcode == 0
        assert list(tmp_path.iterdir()) == [out]
        assert differences(out, reference) == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_merge_cleans_up_and_says_so(number, sources, tmp_path):
    for _ in range(10):  # on a busy machine a merge may be over before the signal is sent
        process = start(sources, tmp_path / "out", "--overwrite")
        wait_until_writing(process, tmp_path)
        process.send_signal(number)
        message = finish(process)
        if process.returncode:
            break
        shutil.rmtree(tmp_path / "out")
    assert (message, process.returncode) == ("interrupted\n", 130)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a filesystem in memory with the given options of tmpfs(5)."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def test_a_disk_too_small_is_refused_before_writing(sources, disk):
    folder = disk("size=64m")
    process = start(sources, folder / "out")
    message = finish(process)
    assert process.returncode == 1
    assert message.startswith("error: ") and message.count("\n") == 1 and str(folder) in message
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(sources, reference, disk):
    folder = disk("size=512m")
    out = folder / "out"
    process = start(sources, out)
    wait_until_writing(process, folder)
    filler = os.open(folder, os.O_TMPFILE | os.O_RDWR)  # has no name, so that it is not among what is left behind
    taken = 0
    while process.poll() is None:  # all that is free now, and what is freed meanwhile
        free = os.fstatvfs(filler).f_bavail * os.fstatvfs(filler).f_bsize
        with contextlib.suppress(OSError):
            os.posix_fallocate(filler, taken, max(free, 1))
            taken += free
        time.sleep(0.005)
    message = finish(process)
    os.close(filler)
    assert process.returncode == 1
    assert message.startswith("error: ") and message.count("\n") == 1 and "disk is full" in message
    assert list(folder.iterdir()) == []
    merge_undisturbed(sources, out, reference)


def test_a_disk_that_runs_out_of_files_halfway(sources, disk):
    folder = disk("size=1g,nr_inodes=8")
    process = start(sources, folder / "out")
    message = finish(process)
    assert process.returncode == 1
    assert message.startswith("error: ") and message.count("\n") == 1 and "disk is full" in message
    assert list(folder.iterdir()) == []
