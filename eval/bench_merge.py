"""Time, memory and disk that a merge costs, beside cp, PEFT and mergekit.

Writes a synthetic Llama and a LoRA for its attention, runs everybody in turn, several rounds, page cache warm, and
writes the medians to eval/results/merge.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import machine
from merge_report import report
from process import Cost, measure

HERE = Path(__file__).resolve().parent
ALPHAS = 11
MERGEKIT = "mergekit==0.1.5"
#: Everybody works offline and from compiled bytecode, as installed programs do.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": ""}

PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass(frozen=True)
class Sources:
    """What everybody merges, and where."""

    base: Path
    adapter: Path
    scratch: Path


@dataclass(frozen=True)
class Contender:
    """One way to get a merged checkpoint (or a copy of the base, to compare with).

    Attributes:
        name: As the tables have it.
        command: Makes the command line for an output directory.
        durable: Whether the command itself has everything on the disk when it ends.
    """

    name: str
    command: Callable[[Path], Sequence[str | os.PathLike]]
    durable: bool = False


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        cost: Of the command.
        durable_wall: Seconds until everything was on the disk.
        disk: Bytes that the output takes, hard links counted once.
    """

    cost: Cost
    durable_wall: float
    disk: int


def contenders(sources: Sources, *, device: str, peers: Sequence[str]) -> list[Contender]:
    """Everybody who takes part, in the order of a round."""

    def ours(alpha: str, *options: str) -> Callable[[Path], Sequence[str | os.PathLike]]:
        program = Path(sys.executable).with_name("mergekit-bio")
        inputs = ["--base", sources.base, "--adapter", sources.adapter, "--alpha", alpha, "--device", device]
        return lambda out: [program, "merge", *inputs, "--out", out, "--quiet", *options]

    def copies(count: int) -> Callable[[Path], Sequence[str | os.PathLike]]:
        script = 'mkdir "$2" && for i in $(seq "$3"); do cp -r "$1" "$2/$i" || exit 1; done'
        return lambda out: ["sh", "-c", script, "sh", sources.base, out, str(count)]

    sweep = f"0:1:{1 / (ALPHAS - 1)}"
    taking_part = [
        Contender("cp -r", lambda out: ["cp", "-r", sources.base, out]),
        Contender("mergekit-bio", ours("0.5", "--no-fsync")),
        Contender("mergekit-bio, fsync", ours("0.5"), durable=True),
        Contender("cp -r, sweep", copies(ALPHAS)),
        Contender("mergekit-bio, sweep", ours(sweep, "--no-fsync")),
        Contender("mergekit-bio, sweep, fsync", ours(sweep), durable=True),
        Contender("import torch", lambda _: [sys.executable, "-c", "import torch"], durable=True),
    ]
    if "peft" in peers:
        script = [sys.executable, "-c", PEFT_MERGE, sources.base, sources.adapter]
        taking_part.insert(2, Contender("PEFT", lambda out: [*script, out]))
    if "mergekit" in peers:
        install_mergekit()
        program = mergekit_program("mergekit-yaml")
        recipe, cache = sources.scratch / "mergekit.yaml", sources.scratch / "mergekit-cache"
        merged = f"{sources.base}+{sources.adapter}"
        recipe.write_text(f"models: [{{model: {merged}}}]\nmerge_method: passthrough\ndtype: bfloat16\n")
        options = ["--lora-merge-cache", cache, "--no-copy-tokenizer", "--quiet"]
        taking_part.insert(2, Contender("mergekit", lambda out: [program, recipe, out, *options]))
    return taking_part


def mergekit_program(name: str) -> Path:
    """A program of mergekit's own virtual environment, in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit-bio"
    return cache / MERGEKIT.replace("==", "-") / "bin" / name


def install_mergekit() -> None:
    """Make mergekit's environment, once.

    It gets the release of PyTorch that we run on, in its CPU build where ours is one: pip's default drags in CUDA.
    """
    python = mergekit_program("python")
    environment = python.parent.parent
    if (environment / "ready").exists():
        return
    print(f"making {environment} (once; a few minutes)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    pytorch = version("torch")
    install = [python, "-m", "pip", "install", "--quiet", f"torch=={pytorch}", MERGEKIT]
    # PIP_FIND_LINKS may offer the wheel; asking PyTorch's own index costs minutes of retries where it is unreachable.
    if subprocess.run(install).returncode:
        index = f"https://download.pytorch.org/whl/{pytorch.partition('+')[2] or 'cpu'}"
        subprocess.run([*install, "--extra-index-url", index], check=True)
    (environment / "ready").touch()


def versions(peers: Sequence[str]) -> str:
    """Who took part, by release."""
    environments = {"PEFT": ("peft", sys.executable), "mergekit": ("mergekit", mergekit_program("python"))}
    code = "from importlib.metadata import version as v; print(v('{}'), 'with Transformers', v('transformers'))"
    parts = [f"mergekit-bio {version('mergekit-bio')}, PyTorch {version('torch').partition('+')[0]}"]
    for name, (package, python) in environments.items():
        if package in peers:
            shown = subprocess.run([python, "-c", code.format(package)], capture_output=True, text=True, check=True)
            parts.append(f"{name} {shown.stdout.strip()}")
    return "; ".join(parts)


def run(contender: Contender, sources: Sources) -> Run:
    """One measured run on a quiet disk; its output is removed."""
    out = sources.scratch / "out"
    os.sync()
    start = time.perf_counter()
    cost = measure(contender.command(out), log=sources.scratch / "log", env=ENVIRONMENT)
    if not contender.durable:
        _sync(out)
    durable_wall = time.perf_counter() - start
    disk = _disk(out)
    for leftover in (out, sources.scratch / "mergekit-cache"):
        shutil.rmtree(leftover, ignore_errors=True)
    return Run(cost, durable_wall, disk)


def _sync(root: Path) -> None:
    for file in [*root.rglob("*"), root]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _disk(root: Path) -> int:
    files = {stat.st_ino: stat.st_blocks * 512 for stat in (file.lstat() for file in root.rglob("*"))}
    return sum(files.values())


def warm(directory: Path) -> None:
    """Have all of a directory's files in the page cache."""
    for file in directory.rglob("*.safetensors"):
        with file.open("rb") as data:
            while data.read(1 << 24):
                pass


def median(runs: Sequence[Run]) -> Run:
    """Every figure's own median."""

    def middle(figure: Callable[[Run], float]) -> float:
        return statistics.median(map(figure, runs))

    cost = Cost(
        middle(lambda run: run.cost.wall),
        middle(lambda run: run.cost.cpu),
        int(middle(lambda run: run.cost.anonymous)),
        int(middle(lambda run: run.cost.resident)),
        int(middle(lambda run: run.cost.written)),
    )
    return Run(cost, middle(lambda run: run.durable_wall), int(middle(lambda run: run.disk)))


def write_sources(scratch: Path, shape: str, gigabytes: float | None) -> Sources:
    """In a process of its own, so that PyTorch is not in this one, whose size its children's figures would carry."""
    size = ["--gigabytes", str(gigabytes)] if gigabytes else []
    script = [sys.executable, HERE / "synthetic.py", scratch, "--shape", shape, *size]
    print(subprocess.run(script, capture_output=True, text=True, check=True).stdout, end="", file=sys.stderr)
    return Sources(scratch / "base", scratch / "adapter", scratch)


def bench(arguments: argparse.Namespace, scratch: Path) -> dict:
    """All measurements, as JSON."""
    sources = write_sources(scratch / "one", arguments.shape, arguments.gigabytes)
    size = sum(file.stat().st_size for file in sources.base.glob("*.safetensors"))
    runs: dict[str, list[Run]] = defaultdict(list)
    taking_part = contenders(sources, device=arguments.device, peers=arguments.peers)
    for round_ in range(arguments.rounds):
        for contender in taking_part:
            warm(sources.base)
            runs[contender.name].append(run(contender, sources))
            seconds = runs[contender.name][-1].cost.wall
            print(f"round {round_ + 1} of {arguments.rounds}: {contender.name}: {seconds:.2f} s", file=sys.stderr)
    shutil.rmtree(sources.scratch)
    speed = machine.write_speed(scratch, size)
    larger = write_sources(scratch / "three", arguments.shape, 3 * size / 1e9)
    ours = next(one for one in contenders(larger, device=arguments.device, peers=()) if one.name == "mergekit-bio")
    medians = {name: median(of_one) for name, of_one in runs.items()}
    return {
        "machine": machine.describe(scratch),
        "versions": versions(arguments.peers),
        "device": arguments.device,
        "bytes": size,
        "alphas": ALPHAS,
        "rounds": arguments.rounds,
        "disk_write_speed": speed,
        "medians": {
            name: {**vars(one.cost), "durable_wall": one.durable_wall, "disk": one.disk}
            for name, one in medians.items()
        },
        "walls": {name: [round(one.cost.wall, 3) for one in of_one] for name, of_one in runs.items()},
        "anonymous_at_three_times_the_size": run(ours, larger).cost.anonymous,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b", help="widths of the synthetic Llama")
    parser.add_argument("--gigabytes", type=float, help="its size; default: 3.0 for 1b, 16.1 for 8b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="as in mergekit-bio merge")
    parser.add_argument("--peers", nargs="*", choices=("peft", "mergekit"), default=["peft", "mergekit"])
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to measure"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "merge.md")
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mergekit-bio-bench-", dir=arguments.scratch) as scratch:
        result = bench(arguments, Path(scratch))
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(report(result))
    print(json.dumps(result, indent=2) if arguments.json else report(result))


if __name__ == "__main__":
    main()
