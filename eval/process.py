"""What one command costs: wall and processor time, peak memory, bytes written. Linux only."""

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.005
#: A process with many threads takes longer to look at; looking may take one part in so many of a core.
_SAMPLE_SHARE = 20


@dataclass(frozen=True)
class Cost:
    """Of a command and everything it started.

    Attributes:
        wall: Seconds from start to exit.
        cpu: User plus system seconds.
        anonymous: Peak of resident memory that no file backs, in bytes.
        resident: Peak of all resident memory, mapped files included, in bytes.
        written: Bytes put into the page cache for a disk.
    """

    wall: float
    cpu: float
    anonymous: int
    resident: int
    written: int


def measure(command: Sequence[str | os.PathLike], *, log: Path, env: Mapping[str, str] | None = None) -> Cost:
    """Run ``command`` to its end.

    Args:
        command: Program and arguments.
        log: Gets its output.
        env: Added to our own environment.

    Raises:
        RuntimeError: It failed; the message ends with its last lines.
    """
    before = _written()
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | dict(env or {}))
        peaks = _Peaks(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # we are to end: so is it
            process.kill()
            process.wait()
            peaks.stop()
            raise
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    anonymous, resident = peaks.stop()
    if process.returncode:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError(f"{command[0]} ended with {process.returncode}:\n" + "\n".join(tail))
    return Cost(wall, usage.ru_utime + usage.ru_stime, anonymous, resident, _written() - before)


class _Peaks:
    """Samples the memory of a process and its descendants until stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._anonymous = self._resident = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        self._ended.set()
        self._thread.join()
        return self._anonymous, self._resident

    def _sample(self) -> None:
        pause = _SAMPLE_SECONDS
        while not self._ended.wait(pause):
            start = time.perf_counter()
            anonymous = resident = 0
            members = family(self._pid)
            # A forked child has its parent's pages, until one of them writes. Shares add up to what is there (proc(5),
            # Pss), but take the kernel long to find: one process alone is told by its plain sizes.
            file, names = (
                ("status", ("RssAnon", "VmRSS")) if len(members) == 1 else ("smaps_rollup", ("Pss_Anon", "Pss"))
            )
            for pid in members:
                found = sizes(pid, file)
                anonymous += found.get(names[0], 0)
                resident += found.get(names[1], 0)
            self._anonymous = max(self._anonymous, anonymous)
            self._resident = max(self._resident, resident)
            pause = max(_SAMPLE_SECONDS, _SAMPLE_SHARE * (time.perf_counter() - start))


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    members = [pid]
    for member in members:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += map(int, children.read_text().split())
            except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                continue
    return members


def sizes(pid: int, file: str) -> dict[str, int]:
    """The sizes in ``/proc/PID/FILE``, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.removesuffix(":"): int(size) * 1024 for name, size, _ in fields}


def _written() -> int:
    """What we and the children that we waited for have written (``proc(5)``, ``write_bytes``)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])
