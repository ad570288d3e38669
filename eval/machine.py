"""The machine a benchmark ran on, named by its hardware."""

import os
import shutil
import subprocess
import time
from pathlib import Path


def describe(scratch: Path) -> str:
    """One line: processor, cores, memory, accelerators, and the filesystem that holds ``scratch``."""
    fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    model = next((value.strip() for name, value in fields if name.strip() == "model name"), os.uname().machine)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = [model, f"{len(os.sched_getaffinity(0))} cores", f"{memory / 2**30:.0f} GiB memory"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts += subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    return ", ".join([*parts, f"{_filesystem(scratch)} on disk", f"Linux {os.uname().release.split('-')[0]}"])


def write_speed(scratch: Path, nbytes: int) -> float:
    """Bytes a second that a plain sequential write of ``nbytes`` reaches, fsync included."""
    block = os.urandom(1 << 26)
    file = scratch / "write-speed"
    start = time.perf_counter()
    with file.open("wb") as out:
        written = 0
        while written < nbytes:
            written += out.write(block)
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return written / seconds


def _filesystem(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(Path(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0].parts))[1]
