"""Prompts a second through vLLM, our Transformers engine and a loop in the reference's style, on the same prompts.

    python eval/bench_serving.py                      # writes eval/results/serving.md
    python eval/bench_serving.py --before ../older    # and measures another checkout of this project in turns with it

On a tiny model made from random numbers by default: its tower and Llama cost little, so what is compared is mostly the
engines themselves. ``--checkpoint`` measures a real merge. Every measurement has a process of its own: vLLM binds its
process's threads to cores, which would slow the others down.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import machine
import torch
from tiny_naturelm import make_base, make_naturelm

import mergekit_bio
from mergekit_bio.audio import prefix as prefix_module
from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.engine.prefix_cache import PrefixCache
from mergekit_bio.model import processing

HERE = Path(__file__).resolve().parent
BATCH = 16
QUESTION = "What is the common name for the focal species in the audio? Answer with one of: marsh wren, tree frog."

#: (What, audios a prompt) -> what each round gave.
Rounds = dict[tuple[str, int], list[Any]]
#: Answers prompts.
Run = Callable[[Sequence[Prompt], Decoding], object]


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        engine: Who answered.
        audios: Audios a prompt.
        prompts: How many there were.
        seconds: For all of them.
        tower: Seconds of these in filter bank and tower.
        first_token: Seconds to the first token of a prompt that comes alone, its clips never heard before.
    """

    engine: str
    audios: int
    prompts: int
    seconds: float
    tower: float
    first_token: float


@dataclass(frozen=True)
class Swept:
    """The same prompts at every alpha of a sweep, by one engine that encodes each clip once.

    Attributes:
        audios: Audios a prompt.
        prompts: How many there were, at each alpha.
        alphas: How many.
        heard: Audios in the prompts of all alphas.
        encoded: Clips that went through the tower.
        first: Seconds in filter bank and tower at the first alpha.
        all: At all of them.
        seconds: Of the whole sweep.
    """

    audios: int
    prompts: int
    alphas: int
    heard: int
    encoded: int
    first: float
    all: float
    seconds: float


@dataclass(frozen=True)
class Heard:
    """A sweep over recordings, from recipe to predictions: ``mergekit-bio eval`` with vLLM.

    Attributes:
        clips: Recordings of 10 s at 48 kHz.
        alphas: How many checkpoints were asked about each.
        decoded: How often a recording was decoded and resampled.
        encoded: Clips that went through the tower.
        seconds: Of the whole run.
        cpu: Seconds of all cores.
    """

    clips: int
    alphas: int
    decoded: int
    encoded: int
    seconds: float
    cpu: float


class TowerClock:
    """Adds up the time spent in filter bank and tower, whoever calls them; installs itself when made."""

    def __init__(self) -> None:
        self.seconds, self._running = 0.0, False
        holders: list[tuple[Any, str]] = [(AudioPrefix, "encode"), (AudioPrefix, "project")]
        holders += [(module, "fbank") for module in (prefix_module, processing)]
        for holder, name in holders:
            setattr(holder, name, self._timed(getattr(holder, name)))

    def also_in(self, module: Any) -> None:
        """Time the filter bank that a module imported before."""
        module.fbank = prefix_module.fbank

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._running:
                return function(*arguments, **named)
            _finish()
            self._running, start = True, time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                _finish()
                self._running = False
                self.seconds += time.perf_counter() - start

        return timed


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_prompts(count: int, audios: int, *, seed: int = 0) -> list[Prompt]:
    """In-context prompts: all but a prompt's last audio are the same examples."""
    generator = torch.Generator().manual_seed(seed)

    def clip() -> Clip:
        return Clip.from_samples(torch.rand(160_000, generator=generator) - 0.5, sampling_rate=16_000)

    examples = [clip() for _ in range(audios - 1)]
    text = "".join("Audio: <Audio><AudioHere></Audio>\nLabel: marsh wren\n" for _ in examples)
    return [Prompt(f"{text}<Audio><AudioHere></Audio> {QUESTION} ({n})", [*examples, clip()]) for n in range(count)]


@contextmanager
def reference_loop(checkpoint: Path) -> Iterator[Run]:
    """Transformers' generate on batches of 16 in the prompts' order, as the reference runs it.

    Every prompt's clips are encoded anew, the rows are padded on the right, and a batch waits for its slowest.
    """
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype="auto").to(device).eval()

    @torch.no_grad()
    def run(prompts: Sequence[Prompt], decoding: Decoding) -> None:
        for start in range(0, len(prompts), BATCH):
            rows = []
            for prompt in prompts[start : start + BATCH]:
                text = processor.render(prompt.text, num_audios=len(prompt.audios))
                inputs = processor(text, audio=[clip.waveform for clip in prompt.audios]).to(device)
                rows.append(model.embed(inputs["input_ids"], inputs["input_features"])[0])
            masks = [torch.ones(len(row), dtype=torch.long, device=device) for row in rows]
            model.generate(
                inputs_embeds=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
                attention_mask=torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
                max_new_tokens=decoding.max_new_tokens,
                do_sample=False,
                pad_token_id=processor.pad_token_id,
            )

    yield run


@contextmanager
def transformers_engine(checkpoint: Path) -> Iterator[Run]:
    """Ours: batches of similar length, padded on the left, each clip encoded once."""
    from mergekit_bio.engine.transformers import TransformersEngine

    yield TransformersEngine(checkpoint).generate


@contextmanager
def vllm_engine(checkpoint: Path) -> Iterator[Run]:
    """Raw audio: vLLM runs the tower."""
    engine = start_vllm(checkpoint)
    yield engine.generate
    engine.close()


@contextmanager
def vllm_engine_with_cache(checkpoint: Path) -> Iterator[Run]:
    """As ``mergekit-bio eval`` runs it: the prefix cache encodes each clip once, and vLLM is given prefixes."""
    engine = start_vllm(checkpoint)
    engine.prefixes = prefix_cache(checkpoint)
    yield engine.generate
    engine.close()


def start_vllm(checkpoint: Path) -> Any:
    """vLLM on a checkpoint."""
    from mergekit_bio.engine.vllm.offline import VllmEngine

    return VllmEngine(checkpoint, max_model_len=4096, enforce_eager=not torch.cuda.is_available())


def prefix_cache(checkpoint: Path) -> PrefixCache:
    """A cache of its own for a checkpoint's tower."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = AudioPrefix.from_pretrained(checkpoint).to(device)
    return PrefixCache(tower, batch_size=1 if device == "cpu" else 16)


LOOP = f"loop, batch {BATCH}, right-padded"
ENGINES = {
    "vLLM": vllm_engine,
    "vLLM with the prefix cache": vllm_engine_with_cache,
    "Transformers engine": transformers_engine,
    LOOP: reference_loop,
}
SWEEP = "sweep"
RECORDINGS = "recordings"


def measure(name: str, checkpoint: Path, *, count: int, audios: int, decoding: Decoding) -> Measured:
    """One engine on one set of prompts."""
    clock = TowerClock()
    with ENGINES[name](checkpoint) as run:
        if name == "vLLM":
            from mergekit_bio.engine.vllm import model as vllm_model

            clock.also_in(vllm_model)
        run(make_prompts(BATCH, audios, seed=1), decoding)  # warm up
        alone = [_timed(run, [prompt], Decoding(max_new_tokens=1)) for prompt in make_alone(audios)]
        prompts = make_prompts(count, audios)
        before = clock.seconds
        seconds = _timed(run, prompts, decoding)
    return Measured(name, audios, count, seconds, clock.seconds - before, sorted(alone)[len(alone) // 2])


def make_alone(audios: int) -> list[Prompt]:
    """Prompts that share no clip."""
    return [make_prompts(1, audios, seed=seed)[0] for seed in range(2, 7)]


def _timed(run: Run, prompts: Sequence[Prompt], decoding: Decoding) -> float:
    start = time.perf_counter()
    run(prompts, decoding)
    return time.perf_counter() - start


def sweep(checkpoints: Sequence[Path], *, count: int, audios: int, decoding: Decoding) -> Swept:
    """vLLM over all alphas as ``mergekit-bio eval`` runs it, moved from one to the next."""
    clock = TowerClock()
    engine, cache = start_vllm(checkpoints[0]), prefix_cache(checkpoints[0])
    engine.prefixes = cache
    prompts = make_prompts(count, audios)
    engine.generate(make_prompts(BATCH, audios, seed=1), decoding)
    before, known = clock.seconds, cache.encoded
    first, start = 0.0, time.perf_counter()
    for checkpoint in checkpoints:
        engine.load(checkpoint)
        engine.generate(prompts, decoding)
        first = first or clock.seconds - before
    seconds = time.perf_counter() - start
    engine.close()
    heard = len(checkpoints) * sum(len(prompt.audios) for prompt in prompts)
    encoded, tower = cache.encoded - known, clock.seconds - before
    return Swept(audios, count, len(checkpoints), heard, encoded, first, tower, seconds)


def sweep_recordings(checkpoints: Sequence[Path], *, clips: int, folder: Path) -> Heard:
    """One question about each of many recordings, of every checkpoint; files are counted where they are decoded."""
    from mergekit_bio.eval.data import audio_folder

    recipe, decoded, read = write_recordings(folder, clips), [], audio_folder.read_samples
    audio_folder.read_samples = lambda path, **named: decoded.append(path) or read(path, **named)
    start, cpu = time.perf_counter(), time.process_time()
    options = {"max_model_len": 4096, "enforce_eager": not torch.cuda.is_available()}
    run = mergekit_bio.evaluate(
        recipe=recipe, out=folder / "run", models=checkpoints, engine="vllm", engine_options=options
    )
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    encoded = run.record.environment["clips_encoded"]
    return Heard(clips, len(checkpoints), len(decoded), encoded, seconds, cpu)


def write_recordings(folder: Path, clips: int) -> Path:
    """Chirps of 10 s at 48 kHz and a recipe that asks about them; the file of the recipe."""
    import numpy as np
    import soundfile

    recordings = folder / "recordings"
    recordings.mkdir()
    seconds = np.arange(480_000) / 48_000
    lines = ["file_name,label"]
    for n in range(clips):
        chirp = 0.5 * np.sin((2000 + 10 * n) * seconds * (1 + 0.2 * seconds))
        soundfile.write(recordings / f"{n}.wav", chirp, 48_000)
        lines.append(f"{n}.wav,{('marsh wren', 'tree frog')[n % 2]}")
    (recordings / "metadata.csv").write_text("\n".join(lines))
    recipe = {
        "checkpoints": ["given"],
        "datasets": [{"path": str(recordings)}],
        "queries": ["Which species is it?"],
        "generate": {"max_new_tokens": 1, "num_beams": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def heard_report(heards: Sequence[Heard], before: Sequence[Heard]) -> str:
    """The sweep over recordings as Markdown."""
    what = "asks the model at every alpha the same about each of many recordings of 10 s at 48 kHz"
    lines = ["## A sweep over recordings", "", f"`mergekit-bio eval` with vLLM {what}; an answer is one token.", ""]
    lines += [
        "| | clips | alphas | decoded | encoded | seconds | seconds of CPU |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, rounds in (("before", before), ("now", heards)):
        lines += [
            f"| {name} | {heard.clips} | {heard.alphas} | {heard.decoded} | {heard.encoded} | {heard.seconds:.0f} | "
            f"{heard.cpu:.0f} |"
            for heard in rounds
        ]
    return "\n".join([*lines, ""])


def report(rows: Rounds, before: Rounds, sweeps: Rounds, sweeps_before: Rounds, what: str) -> str:
    """The results as Markdown; the rates are medians over the rounds."""
    rates = {key: statistics.median(row.prompts / row.seconds for row in rounds) for key, rounds in rows.items()}
    lines = ["# Serving", "", what, ""]
    lines += [
        "| engine | audios | prompts/s, rounds | before, in turns | against the loop | in the tower | first token |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for (name, audios), rounds in rows.items():
        tower = statistics.median(row.tower / row.seconds for row in rounds)
        first = statistics.median(row.first_token for row in rounds)
        lines.append(
            f"| {name} | {audios} | {_rates(rounds)} | {_rates(before.get((name, audios), []))} | "
            f"{rates[name, audios] / rates[LOOP, audios]:.1f}x | {tower:.0%} | {1000 * first:.0f} ms |"
        )
    lines += [
        "",
        "| a sweep by vLLM | audios | prompts/s, rounds | before, in turns | against the loop | in the tower |",
    ]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for (name, audios), rounds in sweeps.items():
        tower = statistics.median(swept.all / swept.seconds for swept in rounds)
        rate = statistics.median(swept.alphas * swept.prompts / swept.seconds for swept in rounds)
        lines.append(
            f"| {rounds[0].alphas} alphas x {rounds[0].prompts} prompts | {audios} | {_rates(rounds)} | "
            f"{_rates(sweeps_before.get((name, audios), []))} | {rate / rates[LOOP, audios]:.1f}x | {tower:.0%} |"
        )
    lines += [
        "",
        "With 1 audio a prompt every clip is new to everybody, and hearing it is most of the work. First token: of",
    ]
    lines += ["a prompt that comes alone. The sweep has the prefix cache.", ""]
    if before:
        lines += [
            "The loop is the same in both states: what lies between its two columns is what the machine did meanwhile.",
            "",
        ]
    lines += [
        f"- A sweep with {swept.audios} audio{'s' * (swept.audios > 1)} a prompt hears {swept.heard} audios and sends "
        f"{swept.encoded} clips through the tower: {swept.first:.1f} s at the first alpha, {swept.all:.1f} s at all "
        f"{swept.alphas}."
        for swept, *_ in sweeps.values()
    ]
    return "\n".join([*lines, ""])


def _rates(rounds: Sequence[Any]) -> str:
    return ", ".join(f"{getattr(row, 'alphas', 1) * row.prompts / row.seconds:.0f}" for row in rounds)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", help="Two or more merges of one sweep.")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--loop-prompts", type=int, help="Fewer for what is slow: the loop and Transformers.")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--alphas", type=int, default=11, help="Of the tiny model's sweep.")
    parser.add_argument("--recordings", type=int, default=1000, help="Of the sweep over recordings.")
    parser.add_argument("--before", type=Path, help="Another checkout of this project, to measure in turns with it.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "serving.md")
    parser.add_argument("--measure", choices=[*ENGINES, SWEEP, RECORDINGS], help=argparse.SUPPRESS)
    parser.add_argument("--audios", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure_here(given)
        return
    trees = [HERE.parent, *([given.before.resolve()] if given.before else [])]
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints, model = given.checkpoint, "the checkpoints " + ", ".join(map(str, given.checkpoint or ()))
        if not checkpoints:
            checkpoints, model = (
                make_sweep(Path(scratch), given.alphas),
                "a tiny random model (Llama of 2 layers, tower of 1), float32",
            )
        # (tree, what, audios) -> what each round gave. The trees take turns, and in another order in each round.
        found: dict[tuple[Path, str, int], list[Any]] = {}
        for number in range(given.rounds):
            for audios in (1, 11):
                for name, kind in [*((name, Measured) for name in ENGINES), (SWEEP, Swept)]:
                    for tree in trees if number % 2 else trees[::-1]:
                        result = in_a_process(tree, name, audios, checkpoints, given, Path(scratch) / "result.json")
                        print(tree.name, name, result, file=sys.stderr, flush=True)
                        found.setdefault((tree, name, audios), []).append(kind(**result))
        for tree in trees:
            result = in_a_process(tree, RECORDINGS, 1, checkpoints, given, Path(scratch) / "result.json")
            print(tree.name, RECORDINGS, result, file=sys.stderr, flush=True)
            found.setdefault((tree, RECORDINGS, 1), []).append(Heard(**result))
        what = (
            f"{given.prompts} prompts, greedy, {given.tokens} new tokens at most, on {model}. In the prompts with 11 "
            "audios the first 10 are the same in all. A process for every measurement, and the two states of the "
            f"project in turns where there are two. Machine: {machine.describe(Path(scratch))}."
        )

    def of(tree: Path, names: Sequence[str]) -> Rounds:
        return {key[1:]: rounds for key, rounds in found.items() if key[0] == tree and key[1] in names}

    now, before = trees[0], trees[-1] if given.before else Path()
    text = report(of(now, [*ENGINES]), of(before, [*ENGINES]), of(now, [SWEEP]), of(before, [SWEEP]), what)
    heards, heards_before = (found.get((tree, RECORDINGS, 1), []) for tree in (now, before))
    text += "\n" + heard_report(heards, heards_before)
    print(text)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(text)


def make_sweep(folder: Path, alphas: int) -> list[Path]:
    """The tiny model's merges."""
    merged = mergekit_bio.merge(
        base=make_base(folder / "base"),
        adapter=make_naturelm(folder / "naturelm"),
        alphas=[n / (alphas - 1) for n in range(alphas)],
        out=folder / "sweep",
    )
    return [checkpoint.path for checkpoint in merged]


def in_a_process(
    tree: Path, name: str, audios: int, checkpoints: Sequence[Path], given: argparse.Namespace, result: Path
) -> dict:
    """Run one measurement of a checkout of the project in a process of its own, and read what it wrote."""
    slow = name in (LOOP, "Transformers engine")
    count = given.loop_prompts or given.prompts if slow else given.prompts
    # The recordings are counted by this script in every checkout; an older one's script may not know of them.
    script = __file__ if name == RECORDINGS else tree / "eval" / "bench_serving.py"
    command = [sys.executable, str(script), "--measure", name, "--audios", str(audios), "--prompts", str(count)]
    command += ["--recordings", str(given.recordings)] if name == RECORDINGS else []
    command += ["--tokens", str(given.tokens), "--results", str(result), "--checkpoint", *map(str, checkpoints)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "eval")))}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    return json.loads(result.read_text())


def measure_here(given: argparse.Namespace) -> None:
    """One measurement, in this process."""
    found: Measured | Swept | Heard
    decoding = Decoding(max_new_tokens=given.tokens)
    if given.measure == RECORDINGS:
        with tempfile.TemporaryDirectory() as folder:
            found = sweep_recordings(given.checkpoint, clips=given.recordings, folder=Path(folder))
    elif given.measure == SWEEP:
        found = sweep(given.checkpoint, count=given.prompts, audios=given.audios, decoding=decoding)
    else:
        found = measure(given.measure, given.checkpoint[0], count=given.prompts, audios=given.audios, decoding=decoding)
    given.results.write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
