"""The command itself, killed again and again."""

import csv
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from demo.terminal import PROGRAM, users_environment
from listen.archive import QUESTION, rows_without_a_table, write_recording

#: Recordings for each kill, each of 30 s; so many of them are compared with what is answered undisturbed.
EACH, COMPARED = 50, 10
#: Bytes by which a process may grow between its middle and its end.
GROWTH = 64 << 20


def answers_in(table: Path) -> int:
    return max(0, table.read_bytes().count(b"\n") - 1) if table.exists() else 0


@pytest.mark.long
@pytest.mark.repeated(2)
def test_an_archive_killed_at_random_has_every_window_once_in_the_same_memory(merged, tmp_path, count):
    archive, sounds, table = tmp_path / "archive", tmp_path / "sounds", tmp_path / "birds.csv"
    archive.mkdir()
    sounds.mkdir()
    for number in range(EACH * count):
        write_recording(archive / f"{number:04d}.wav", 30, 8_000, seed=number)
    for number in range(0, EACH * count, EACH * count // COMPARED):
        os.link(archive / f"{number:04d}.wav", sounds / f"{number:04d}.wav")
    words = ["ask", merged, archive, "--prompt", QUESTION.prompt, "--beams", 1, "--max-new-tokens", 4, "--out", table]
    words += ["--engine", "transformers", "--engine-option", "dtype=float32", "--device", "cpu"]
    moments, kills = random.Random(count), 0
    while True:
        process = subprocess.Popen(
            [PROGRAM, *map(str, words)], env=users_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        there, memory = answers_in(table), []
        if kills < count:
            while process.poll() is None and answers_in(table) == there:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 2))
            process.kill()
            kills += process.wait() < 0
            continue
        while process.poll() is None:
            memory.append((answers_in(table), psutil.Process(process.pid).memory_info().rss))
            time.sleep(0.1)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        break
    assert kills == count
    with table.open(newline="") as file:
        rows = [(row["recording"], float(row["start"]), row["answer"]) for row in csv.DictReader(file)]
    names = [str(archive / f"{number:04d}.wav") for number in range(EACH * count)]
    assert [(name, start) for name, start, _ in rows] == [(name, start) for name in names for start in (0, 10, 20)]
    undisturbed = {(Path(path).name, start): text for path, start, _, text in rows_without_a_table(merged, sounds)}
    answered = {(Path(name).name, start): text for name, start, text in rows}
    assert {place: answered[place] for place in undisturbed} == undisturbed and len(undisturbed) == 3 * COMPARED
    middle = (memory[0][0] + len(rows)) / 2
    half, end = (max(size for answers, size in memory if late == (answers > middle)) for late in (False, True))
    assert end - half < GROWTH
