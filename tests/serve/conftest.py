"""One real server with every strength of an adapter, for all tests of this folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
from serve.requests_to_server import KEY, KEYS, MAX_AUDIOS, MAX_NEW_TOKENS
from tiny_naturelm import make_base, make_naturelm

import mergekit_bio
from mergekit_bio.engine.transformers import TransformersEngine

#: Of the merges; the server is named two of them, and told to turn the dial of what they were merged from.
ALPHAS = tuple(n / 10 for n in range(11))
NAMED = ("alpha-0.50", "alpha-1.00")
#: Fewer slots than strengths, so that strengths wait for each other, and adapters are read again.
SLOTS = ["--max-loras", "4", "--max-cpu-loras", "6"]


@dataclass
class Server:
    url: str
    process: subprocess.Popen
    sweep: dict[str, Path]
    folder: Path
    log: Path
    request_log: Path
    uploads: list[Path] = field(default_factory=list)  # what the page was sent

    def interrupt(self) -> int:
        """Ctrl-C, which a terminal sends to all of its processes."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    base = make_base(folder / "base")
    merged = mergekit_bio.merge(
        base=base,
        adapter=make_naturelm(folder / "naturelm", base=base),
        alphas=ALPHAS,
        out=folder / "out",
        dtype="float32",
        device="cpu",
    )
    return {checkpoint.path.name: checkpoint.path for checkpoint in merged}


@pytest.fixture(scope="session")
def engines(sweep) -> dict[str, TransformersEngine]:
    """What each strength should answer: its merge in float32."""
    return {name: TransformersEngine(path, device="cpu") for name, path in sweep.items()}


@pytest.fixture(scope="session")
def server(sweep, tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = tmp_path_factory.mktemp("clips")
    keys, requests = folder.parent / "keys", folder.parent / "requests.jsonl"
    keys.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--port", str(port), "--api-key", KEY, "--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"]
    flags += ["--limit-mm-per-prompt", f'{{"audio": {MAX_AUDIOS}}}', "--allowed-local-media-path", str(folder)]
    flags += [
        "--allowed-media-domains",
        "localhost",
        "--max-body-mb",
        "11",
        "--max-audio-seconds",
        "60",
        "--api-keys",
        str(keys),
        "--request-log",
        str(requests),
        "--max-new-tokens",
        str(MAX_NEW_TOKENS),
        *SLOTS,
    ]
    if find_spec("gradio"):
        flags.append("--page")
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = folder.parent / "server.log"
    with log.open("w") as output:
        command = [
            sys.executable,
            "-c",
            "from mergekit_bio.cli.app import main; main()",
            "serve",
            *(str(sweep[name]) for name in NAMED),
            "--dial",
            *flags,
        ]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    running = Server(f"http://127.0.0.1:{port}", process, sweep, folder, log, requests)
    try:
        _wait_until_up(running, seconds=270)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_up(server: Server, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"the server did not start:\n{server.log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def http(server):
    import httpx

    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def sounds() -> list[np.ndarray]:
    """Samples of 16 bits at 16 kHz."""
    rng = np.random.default_rng(11)
    return [(rng.uniform(-0.5, 0.5, 16000 * seconds) * 2**15).astype(np.int16) for seconds in (1, 2, 3, 4, 5, 12)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium with a microphone that hears a tone."""
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    tone = tmp_path_factory.mktemp("microphone") / "tone.wav"
    soundfile.write(tone, 0.4 * np.sin(np.arange(48000 * 4) * 0.2), 48000)
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    flags += [f"--use-file-for-fake-audio-capture={tone}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield chromium
        chromium.close()
