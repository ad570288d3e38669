"""What a command takes is measured whole and once."""

import sys
from pathlib import Path

import pytest

process = pytest.importorskip("process", reason="eval/ is not on the path")

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")

ALONE = "import time; held = b'1' * 200_000_000; time.sleep(3)"
FORKED = """
import os, time
held = b'1' * 200_000_000
child = os.fork()
time.sleep(3)
if child: os.waitpid(child, 0)
"""
BOTH = """
import subprocess, sys, time
held = b'1' * 200_000_000
program = "held = b'1' * 200_000_000; print('held', flush=True); input()"
with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
    child.stdout.readline()
    time.sleep(3)
    child.stdin.write(b"go on")
"""
MAPPED = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
    sum(mapping[::4096])
    time.sleep(3)
"""


def cost(tmp_path: Path, program: str, *words: object) -> "process.Cost":
    return process.measure([sys.executable, "-c", program, *map(str, words)], log=tmp_path / "log")


@pytest.mark.parametrize(("program", "held"), [(ALONE, 200e6), (FORKED, 200e6), (BOTH, 400e6)])
def test_memory_of_a_process_and_its_children_counts_once(tmp_path: Path, program: str, held: float) -> None:
    assert held < cost(tmp_path, program).anonymous < held + 60e6


def test_a_mapped_file_is_resident_but_no_memory_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1" * 200_000_000)
    found = cost(tmp_path, MAPPED, tmp_path / "file")
    assert found.anonymous < 60e6
    assert found.resident > 200e6
