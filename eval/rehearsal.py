"""The first commands of the README on files of the published size and layout, offline; no GPU needed.

Writes Llama-3.1-8B-Instruct and NatureLM-audio with random weights into a Hugging Face cache of its own, runs the real
command line on them with its defaults, and records in eval/results/rehearsal.md what each command took. At its peak it
takes 35 GB of disk and 24 GiB of memory. ``--layers 2`` is a rehearsal of the rehearsal, on a tenth of that.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import time
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import machine
from process import Cost, measure

HERE = Path(__file__).resolve().parent
PROGRAM = Path(sys.executable).with_name("mergekit-bio")
LAYERS = 32  # of the published Llama
BASE, ADAPTER = "meta-llama/Llama-3.1-8B-Instruct", "EarthSpeciesProject/NatureLM-audio"
QUESTION = "What is the common name for the focal species in the audio?"
TOKENS = 4
SWEEP = ("0.4", "0.6")

_PAGE = """\
# The first commands, at full size

{pair}
Offline, from a Hugging Face cache, each command in a process of its own and with its defaults; in this order, the page
cache as the command before left it.
{rounds}: times vary with what else the machine and its disk do. The weights are
random, so the answers mean nothing; the files, the work and the memory are those of the real models. Made by
`make rehearsal` (`eval/rehearsal.py`).

Machine: {machine}. {versions}.

| command | wall | CPU | peak anonymous | peak resident | written |
|---|---:|---:|---:|---:|---:|
{rows}

{notes}

Memory is sampled from `/proc/PID/status`, with several processes from their `smaps_rollup`, where a page that they
share counts once. "anonymous" is what they hold for themselves. "resident" adds pages of files that they have mapped:
these are in the page cache anyway, and the kernel takes them back when memory is short. "written" counts bytes put into
the page cache for the disk.
"""


class RehearsalError(Exception):
    """Why it cannot be done, in one line."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        shown: As the table names it.
        command: Program and arguments.
    """

    shown: str
    command: Sequence[str | os.PathLike]


@dataclass(frozen=True)
class Answers:
    """One question through vLLM.

    Attributes:
        start: Seconds until the engine was ready.
        seconds: Of each answer, by its name.
    """

    start: float
    seconds: dict[str, float]


class Rehearsal:
    """A scratch folder, and the commands that run in it.

    Args:
        scratch: An empty folder.
        layers: Of Llama.
        rounds: How often copying and merging take turns.
    """

    def __init__(self, scratch: Path, layers: int, rounds: int = 1) -> None:
        self.scratch, self.layers, self.rounds = scratch, layers, rounds
        self.hub = scratch / "huggingface" / "hub"
        self.half = scratch / "merged" / "half"
        self.recording = scratch / "recording.wav"
        self.rows: list[tuple[str, Cost]] = []
        self.notes: list[str] = []
        self.disk = 0
        self._environment = {
            "HF_HOME": str(self.hub.parent),
            "HF_HUB_CACHE": str(self.hub),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: a question needs little, and the model leaves little
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }

    def run(self, step: Step) -> None:
        """Run a command, and keep its cost.

        Raises:
            RehearsalError: It failed.
        """
        print(f"{step.shown} ...", flush=True)
        os.sync()  # what others have written is not to be waited for
        try:
            cost = measure(step.command, log=self.scratch / "log", env=self._environment)
        except RuntimeError as error:
            raise RehearsalError(f"{step.shown}: {error}") from error
        self.rows.append((step.shown, cost))
        files = {stat.st_ino: stat.st_blocks * 512 for stat in (file.lstat() for file in self.scratch.rglob("*"))}
        self.disk = max(self.disk, sum(files.values()))
        memory = f"{cost.anonymous / 1e9:.2f} GB anonymous, {cost.resident / 1e9:.2f} GB resident"
        print(f"  {cost.wall:.1f} s, {memory}", flush=True)

    def rehearse(self, *, merge_only: bool = False) -> None:
        """All of it, or up to the merge."""
        start = time.perf_counter()
        # 1. The files, in a process of their own: this one stays small, or its children's figures would carry it.
        writer = [sys.executable, HERE / "published_pair.py", self.hub, "--layers", str(self.layers)]
        self.run(Step("writing the pair", writer))
        self.rows.clear()  # no command of ours
        base = self.hub / f"models--{BASE.replace('/', '--')}" / "snapshots"
        write_recording(self.recording)

        # 2. A merge, and what any copy costs, to compare with; and a merge that only copies.
        copy = self.scratch / "copy"
        script = 'cp -rL "$1" "$2" && find "$2" -type f -exec sync {} +'
        merged = ["--out", self.half, "--quiet"]
        for turn in range(self.rounds):
            self.run(Step("`cp -rL` of the base, and sync", ["sh", "-c", script, "sh", base, copy]))
            shutil.rmtree(copy)
            if self.rounds > 1:
                self.run(Step("`merge --alpha 0`, which only copies", [PROGRAM, "merge", "--alpha", "0", *merged]))
                shutil.rmtree(self.half)
            self.run(Step("`merge --alpha 0.5`", [PROGRAM, "merge", "--alpha", "0.5", *merged]))
            if turn < self.rounds - 1:
                shutil.rmtree(self.half)

        if merge_only:
            return

        # 3. The rest of the command line, as the README has it.
        self.run(Step("`verify --against-sources`", [PROGRAM, "verify", self.half, "--against-sources", "--quiet"]))
        for name, source in (("base", BASE), ("adapter", ADAPTER), ("merge", self.half)):
            self.run(Step(f"`inspect` of the {name}", [PROGRAM, "inspect", source]))
        for name, source in (("adapter", ADAPTER), ("merge", self.half)):
            out = self.scratch / f"{name}.safetensors"
            command = [PROGRAM, "embed", source, self.recording, "--out", out, "--quiet"]
            self.run(Step(f"`embed`, 10 s of sound, of the {name}", command))
        asked = ["--prompt", QUESTION, "--max-new-tokens", str(TOKENS)]
        shown = f"`ask`, through Transformers, two beams, {TOKENS} tokens"
        self.run(Step(shown, [PROGRAM, "ask", self.half, self.recording, *asked, "--quiet"]))

        # 4. The same question through vLLM.
        self.ask_vllm("one question through vLLM, greedy and with two beams", [self.half])

        # 5. A sweep, where a GPU makes it worth while.
        if shutil.which("nvidia-smi"):
            shutil.rmtree(self.half)  # or the disk would have to hold both
            sweep = self.scratch / "merged" / "sweep"
            alphas = [word for alpha in SWEEP for word in ("--alpha", alpha)]
            command = [PROGRAM, "merge", *alphas, "--out", sweep, "--quiet"]
            self.run(Step(f"`merge --alpha {' --alpha '.join(SWEEP)}`", command))
            self.ask_vllm("one question through vLLM at both", sorted(path for path in sweep.glob("alpha-*")))
        else:
            self.note("No GPU: the sweep of two alphas was left out.")
        minutes = (time.perf_counter() - start) / 60
        self.note(
            f"All of it, the writing of the pair included: {minutes:.1f} minutes, {self.disk / 1e9:.1f} GB of disk."
        )

    def ask_vllm(self, shown: str, checkpoints: Sequence[Path]) -> None:
        """One question through vLLM, in a process of its own."""
        result = self.scratch / "answers.json"
        command = [sys.executable, HERE / "rehearsal.py", "--answer", result, "--ask", self.recording]
        self.run(Step(shown, [*command, *checkpoints]))
        answers = Answers(**json.loads(result.read_text()))
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in answers.seconds.items())
        self.note(f"vLLM: started in {answers.start:.1f} s (imports included); for {TOKENS} tokens: {times}.")

    def note(self, text: str) -> None:
        """Say something now, and on the page."""
        print(text, flush=True)
        self.notes.append(text)

    def page(self) -> str:
        """The results as Markdown."""
        packages = {"mergekit-bio": "mergekit-bio", "PyTorch": "torch", "Transformers": "transformers"}
        vllm = next((name for name in ("vllm", "vllm-cpu") if _installed(name)), None)
        packages |= {"vLLM": vllm} if vllm else {}
        return _PAGE.format(
            pair=describe_pair(self.layers),
            machine=machine.describe(self.scratch),
            versions=", ".join(f"{name} {version(package).partition('+')[0]}" for name, package in packages.items()),
            rows="\n".join(_row(shown, cost) for shown, cost in _medians(self.rows)),
            rounds="One run"
            if self.rounds == 1
            else f"Copying and merging took turns {self.rounds} times, and the table has their medians",
            notes="\n".join(f"- {note}" for note in self.notes),
        )


def describe_pair(layers: int) -> str:
    """One sentence: the published size, or how much smaller."""
    if layers == LAYERS:
        return f"{BASE} (16.06 GB, bfloat16, four shards) and {ADAPTER} (1.56 GB), as published, to the byte."
    return (
        f"**A smaller pair than the published one: {layers} layer{'s' * (layers != 1)} of Llama instead of {LAYERS}** "
        f"({base_bytes(layers) / 1e9:.2f} GB instead of 16.06)."
    )


def base_bytes(layers: int) -> int:
    """Of a Llama of so many layers, in bfloat16: two vocabularies, and attention, feed-forward and norms a layer."""
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096
    return 2 * (2 * 128256 * 4096 + layers * layer + 4096)


def disk_needed(layers: int, *, sweep: bool) -> int:
    """Bytes on the disk at the peak: the pair and a merge of it; with a sweep, what two strengths do not share."""
    adapter, tower, spare = 1_556_386_132, 451_101_000, 500_000_000
    attention = 2 * layers * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    return 2 * base_bytes(layers) + adapter + tower + spare + (attention if sweep else 0)


def write_recording(file: Path) -> None:
    """10 s at 16 kHz: rising whistles over noise."""
    rate, generator = 16_000, random.Random(0)
    samples = []
    for n in range(10 * rate):
        second = n / rate % 1
        whistle = math.sin(2 * math.pi * (2000 * second + 1000 * second * second)) * math.sin(math.pi * second)
        samples.append(round(12_000 * whistle + generator.gauss(0, 300)))
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(struct.pack(f"<{len(samples)}h", *samples))


@contextmanager
def scratch_folder(path: Path, *, keep: bool) -> Iterator[Path]:
    """A folder of ours, gone when all is done or something goes wrong, a signal to end included.

    Raises:
        RehearsalError: It holds something already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RehearsalError(f"{path}: is there already; remove it, or name another --scratch")
    path.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield path.resolve()
    finally:
        if not keep:
            shutil.rmtree(path)
        signal.signal(signal.SIGTERM, before)


def check_disk(folder: Path, needed: int) -> None:
    """Raise RehearsalError unless the disk that is to hold ``folder`` has the room."""
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise RehearsalError(
            f"{folder}: needs {needed / 1e9:.0f} GB of disk, but {free / 1e9:.0f} GB are free; name a --scratch on "
            "another disk, or take fewer --layers"
        )


def answer(checkpoints: Sequence[Path], recording: Path, result: Path) -> None:
    """Ask every checkpoint through vLLM, greedily and with two beams, and write what it took."""
    start = time.perf_counter()
    import torch

    from mergekit_bio.audio.recording import read_clip
    from mergekit_bio.engine.interface import Decoding, Prompt
    from mergekit_bio.engine.vllm.offline import VllmEngine

    options = {"max_model_len": 1024, "max_audios": 1, "enforce_eager": not torch.cuda.is_available()}
    engine = VllmEngine(checkpoints[0], **options)
    started = time.perf_counter() - start
    prompt = Prompt(QUESTION, [read_clip(recording)])
    seconds = {}
    for checkpoint in checkpoints:
        where = f" at {checkpoint.name}" if len(checkpoints) > 1 else ""
        if checkpoint != checkpoints[0]:
            start = time.perf_counter()
            engine.load(checkpoint)
            seconds[f"moving on to {checkpoint.name}"] = time.perf_counter() - start
        for name, beams in (("greedy", 1), ("two beams", 2)):
            begin = time.perf_counter()
            (generation,) = engine.generate([prompt], Decoding(max_new_tokens=TOKENS, num_beams=beams))
            seconds[name + where] = time.perf_counter() - begin
            if not generation.token_ids:
                raise SystemExit(f"{checkpoint}: no answer")
    engine.close()
    result.write_text(json.dumps({"start": started, "seconds": seconds}))


def _medians(rows: Sequence[tuple[str, Cost]]) -> list[tuple[str, Cost]]:
    """Of commands that ran several times, the run of the median wall time."""
    runs: dict[str, list[Cost]] = {}
    for shown, cost in rows:
        runs.setdefault(shown, []).append(cost)
    return [(shown, sorted(costs, key=lambda cost: cost.wall)[len(costs) // 2]) for shown, costs in runs.items()]


def _installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _row(shown: str, cost: Cost) -> str:
    times = f"{cost.wall:.1f} s | {cost.cpu:.1f} s"
    return (
        f"| {shown} | {times} | "
        + " | ".join(f"{size / 1e9:.2f} GB" for size in (cost.anonymous, cost.resident, cost.written))
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of Llama; fewer than 32 make a smaller pair")
    parser.add_argument("--rounds", type=int, default=1, help="how often copying and merging take turns")
    parser.add_argument("--merge-only", action="store_true", help="leave out what comes after merging")
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "build" / "rehearsal", help="removed at the end")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder")
    parser.add_argument(
        "--results",
        type=Path,
        help="default: eval/results/rehearsal.md, for a smaller pair build/rehearsal-LAYERS.md",
    )
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("checkpoints", type=Path, nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer:
        answer(given.checkpoints, given.ask, given.answer)
        return
    smaller = given.layers != LAYERS
    results = given.results or (
        HERE.parent / "build" / f"rehearsal-{given.layers}.md"
        if smaller or given.merge_only
        else HERE / "results" / "rehearsal.md"
    )
    try:
        if given.layers < 1:
            raise RehearsalError(f"--layers {given.layers}: write 1 or more")
        if find_spec("vllm") is None and not given.merge_only:
            raise RehearsalError("vLLM is not installed; make env builds an environment with it")
        check_disk(given.scratch, disk_needed(given.layers, sweep=shutil.which("nvidia-smi") is not None))
        with scratch_folder(given.scratch, keep=given.keep) as scratch:
            print(describe_pair(given.layers), flush=True)
            rehearsal = Rehearsal(scratch, given.layers, max(1, given.rounds))
            rehearsal.rehearse(merge_only=given.merge_only)
            page = rehearsal.page()
    except RehearsalError as error:
        sys.exit(f"rehearsal: {error}")
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(page)
    print(f"\n{page}\n-> {results}")


if __name__ == "__main__":
    main()
