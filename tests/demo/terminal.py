"""The installed command as a user runs it: without the tests' settings of vLLM, on a terminal or off it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

COLUMNS, ROWS = 80, 50
PROGRAM = Path(sys.executable).with_name("mergekit-bio")
#: What steers terminals, make and torch from outside, too, so that these tests see the same wherever they run.
STEERING = (
    "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
    "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TORCH_COMPILE_DISABLE",
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """What a command wrote to a terminal: every line, drawn over or not, and how many are there at the end."""

    lines: list[str]
    left: int


def users_environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_") and key not in STEERING}
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "TERM": "xterm-256color"} | more


def off_a_terminal(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``mergekit-bio``."""
    command = [PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=users_environment(**environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def on_a_terminal(*command: object, cwd: Path, **environment: str) -> Shown:
    """Run a program on a pseudo terminal of 80 columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [*map(str, command)], cwd=cwd, env=users_environment(**environment), stdin=its, stdout=its, stderr=its
    )
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the last process has closed the terminal
            break
        if not part:
            break
        written += part
    os.close(ours)
    text = written.decode()
    assert process.wait() == 0, text[-4000:]
    ups = sum(int(count or 1) for count in re.findall(r"\x1b\[(\d*)A", text))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return Shown(lines=re.split(r"\r*\n|\r", plain), left=plain.count("\n") - ups)
