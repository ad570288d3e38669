"""What an archive of any size costs in memory."""

import os
import statistics
import subprocess
import time

import pytest
from demo.terminal import PROGRAM, users_environment
from listen.archive import write_recording
from listen.test_kills import answers_in
from process import family, sizes

import mergekit_bio
from mergekit_bio.demo.run import MODEL

#: Bytes by which a process may be larger in the last third of an archive than in the first, and different sounds in it.
GROWTH, SOUNDS = 128 << 20, 40


@pytest.mark.soak
@pytest.mark.repeated(4_000)
def test_vllm_hears_an_archive_in_the_same_memory(tmp_path, count):
    """Of ``count`` recordings of 30 s. The median sizes of every process in each third are printed."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    archive, table = tmp_path / "archive", tmp_path / "birds.csv"
    for number in range(count):
        if number < SOUNDS:
            write_recording(archive / f"{number:05d}.wav", 30, 16_000)
        else:
            os.link(archive / f"{number % SOUNDS:05d}.wav", archive / f"{number:05d}.wav")
    (model,) = mergekit_bio.merge(
        base=MODEL / "base", adapter=MODEL / "adapter", alphas=[0.6], out=tmp_path / "model", dtype="float32"
    )
    words = ["ask", model.path, archive, "--prompt", "Which species is it?", "--beams", 1, "--out", table]
    words += ["--engine", "vllm", "--engine-option", "max_model_len=1024", "--engine-option", "enforce_eager=true"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, *map(str, words)], env=users_environment(), stdout=log, stderr=log)
        thirds: list[dict[int, list[int]]] = [{}, {}, {}]
        while process.poll() is None:
            if answers := answers_in(table):
                third = thirds[min(2, answers // count)]
                for pid in family(process.pid):
                    third.setdefault(pid, []).append(sizes(pid, "smaps_rollup").get("Anonymous", 0))
            time.sleep(1)
    assert process.returncode == 0 and answers_in(table) == 3 * count, (tmp_path / "log").read_text()[-2000:]
    medians = [{pid: statistics.median(found) for pid, found in third.items()} for third in thirds]
    print(*({pid: f"{size / 1e6:.0f} MB" for pid, size in third.items()} for third in medians), sep="\n")
    assert len(medians[2]) >= 2
    assert all(size - medians[0].get(pid, 0) < GROWTH for pid, size in medians[2].items()), medians
