"""Other people's clients against a real server: what README.md shows of them, line for line.

    python eval/clients.py                     # writes eval/results/clients.md
    python eval/clients.py --only beans-next   # or chat: one half of it
    python eval/clients.py --packages FOLDER   # in an environment that has the clients already

The demo's model stands in for NatureLM-audio, a synthesised call for the recording, and a few prompts of our own for
IFEval; addresses, names and keys are README.md's. The clients have an environment of their own, so that they change
nothing of vLLM's. The server listens on 127.0.0.1:8000.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import machine
import numpy as np
import soundfile
from results_page import put_section

from mergekit_bio.demo.calls import call
from mergekit_bio.demo.run import MODEL
from mergekit_bio.demo.species import HEARD

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
PROGRAM = Path(sys.executable).with_name("mergekit-bio")
URL = "http://127.0.0.1:8000"
PACKAGES = ("openai", "litellm", "langchain-openai", "inspect-ai", "lm-eval[api,ifeval]")
#: What they print that is about themselves: where logs are, bars, colours, hints.
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NOISE = re.compile(r"^\d{4}-\d\d-\d\d:|^\[nltk_data\]|^Downloaded punkt|^fatal: not a git|(it|examples)/s[],]|^-+$")
CLIPS, RATE = 200, 48_000

_CHAT = """\
## Clients of OpenAI's API

README.md's lines, against a server with keys, tools and a request log. The demo's model has NatureLM-audio's name: a
toy that knows invented animals. Its answers say that a recording was heard, and no more. IFEval's prompts cannot be
fetched here; three of our own stand in for them. What the clients log about themselves is left out. Made by `python
eval/clients.py`.

Machine: {machine}. {versions}.
"""
_BEANS_NEXT = """\
## beans-next's contract

beans-next is not on PyPI and has not been run. `eval/beans_next.py` is a client of its contract: what it asks of a
server, how large its batches are, and where its run would end. {clips} clips of 10 s at 48 kHz, with the demo's model,
against a server without keys. Made by `python eval/clients.py`.

Machine: {machine}.
"""


def blocks() -> dict[str, list[str]]:
    """README.md's lines about clients: blocks of Python, and commands."""
    text = README.read_text()
    python, shell = (re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S) for language in ("python", "sh"))
    lines = [line for block in shell for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return {
        "python": [block for block in python if URL in block],
        "sh": [line for line in lines if URL in line and "mergekit-bio" not in line],
    }


def make_environment(folder: Path) -> Path:
    """An environment with the clients."""
    if not (folder / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        uv = Path(sys.executable).with_name("uv")
        environment = os.environ | {"VIRTUAL_ENV": str(folder)}
        subprocess.run([uv, "pip", "install", "--quiet", *PACKAGES], env=environment, check=True)
    return folder


def write_stand_ins(folder: Path) -> None:
    """What the lines name; hub ids are folders, which win over the hub."""
    for hub_id, part in (
        ("meta-llama/Llama-3.1-8B-Instruct", "base"),
        ("EarthSpeciesProject/NatureLM-audio", "adapter"),
    ):
        shutil.copytree(MODEL / part, folder / hub_id)
    soundfile.write(folder / "wren.wav", sound(0), 16_000)
    prompts = [
        ("Name a bird, all in lowercase.", "change_case:english_lowercase"),
        ("Name a bird without any comma.", "punctuation:no_comma"),
        ("Name a bird, all in capital letters.", "change_case:english_capital"),
    ]
    (folder / "google/IFEval").mkdir(parents=True)
    with (folder / "google/IFEval/train.jsonl").open("w") as file:
        for key, (prompt, instruction) in enumerate(prompts):
            row = {"key": key, "prompt": prompt, "instruction_id_list": [instruction], "kwargs": [{}]}
            file.write(json.dumps(row) + "\n")


def sound(number: int) -> np.ndarray:
    """A call of one of the animals that the model knows: float32 [160000] at 16 kHz."""
    kind = HEARD[number % len(HEARD)]
    return call(voice=kind.voice, phrase=kind.phrase, random=np.random.default_rng(number))


def write_clips(folder: Path) -> None:
    """Recordings at 48 kHz; a sample three times over is the same sound with a little more above it."""
    folder.mkdir()
    for number in range(CLIPS):
        soundfile.write(folder / f"{number:03}.wav", np.repeat(sound(number), RATE // 16_000), RATE)


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[str]:
    """A server with its defaults and these flags; its command."""
    command = ["mergekit-bio", "serve", "--port", "8000", *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([PROGRAM, *command[1:]], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{URL}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "server.log").read_text()[-4000:]) from None
                time.sleep(0.5)
        yield shlex.join(command)
    finally:
        process.terminate()
        process.wait(60)


def run(command: list[str | Path], folder: Path, programs: Path, **environment: str) -> str:
    """What a command prints; the end of the benchmark if it fails."""
    path = f"{programs / 'bin'}:{os.environ['PATH']}"
    quiet = {"HF_HUB_OFFLINE": "1", "INSPECT_DISPLAY": "plain", "NO_COLOR": "1", "COLUMNS": "100"}
    quiet |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | quiet | {"PATH": path} | environment, text=True, timeout=280,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout[-6000:]}")
    return done.stdout


def shown(language: str, text: str, printed: str) -> str:
    """A block and what it printed."""
    lines = [_COLOUR.sub("", line).rstrip() for line in re.split(r"[\r\n]", printed)]
    kept = "\n".join(line for line in lines if line and not _NOISE.search(line))
    return f"```{language}\n{text.strip()}\n```\n\n```text\n{kept}\n```"


def ask_through_clients(folder: Path, programs: Path) -> Iterator[str]:
    """What README.md's lines print, with all that a team's server has."""
    (folder / "keys").write_text("team: KEY\n")
    (folder / "keys").chmod(0o600)
    python, lines = programs / "bin/python", blocks()
    flags = ["--api-keys", "keys", "--request-log", "requests.jsonl"]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "llama3_json"]
    # JSON may have spaces between its parts, and the toy would write nothing else.
    flags += ["--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}']
    with served(folder, *flags) as command:
        yield f"```sh\n{command}\n```"
        for text in lines["python"]:
            yield shown("python", text, run([python, "-c", text], folder, programs))
        for line in lines["sh"]:
            if "lm_eval" in line:
                yield shown("sh", line, run(["bash", "-c", line], folder, programs, OPENAI_API_KEY="KEY"))
    log = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    asked = [json.dumps(entry) for entry in log if entry["method"] == "POST"]
    yield f"The request log has {len(asked)} questions, the first and the last of them:"
    yield f"```text\n{asked[0]}\n{asked[-1]}\n```"


def ask_by_contract(folder: Path, programs: Path) -> Iterator[str]:
    """What a run of beans-next asks."""
    write_clips(folder / "clips")
    with served(folder) as command:
        yield f"```sh\n{command}\n```"
        for line in blocks()["sh"]:
            if "beans_next" in line:
                yield shown("sh", line, run(["bash", "-c", line], folder, programs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=HERE.parent / "build/clients", metavar="FOLDER")
    parser.add_argument("--only", choices=("chat", "beans-next"))
    options = parser.parse_args()
    programs = make_environment(options.packages.resolve())
    names = [package.partition("[")[0] for package in PACKAGES]
    program = f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {names}), sep=', ')"
    versions = subprocess.run([programs / "bin/python", "-c", program], check=True, capture_output=True, text=True)
    halves = {"chat": (_CHAT, ask_through_clients), "beans-next": (_BEANS_NEXT, ask_by_contract)}
    for name, (heading, ask) in halves.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="clients-") as scratch:
                folder = Path(scratch)
                write_stand_ins(folder)
                (folder / "eval").symlink_to(HERE)
                told = {"machine": machine.describe(folder), "versions": versions.stdout.strip(), "clips": CLIPS}
                section = "\n\n".join([heading.format(**told).strip(), *ask(folder, programs)])
            put_section(HERE / "results/clients.md", section)


if __name__ == "__main__":
    main()
