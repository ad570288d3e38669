"""One worker against several: answers a second of a whole run, merged before, over a sweep on a tiny model.

Puts its section into eval/results/serving.md. The rounds are interleaved, and every run has a process of its own. One
worker is the engine in the run's own process, with all cores; several share the cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import machine
import numpy as np
import soundfile
from bench_serving import make_sweep
from results_page import put_section

HERE = Path(__file__).resolve().parent
HEADING = "## One worker and several\n"
OPTIONS = {"transformers": {"dtype": "float32"}, "vllm": {"dtype": "float32", "max_model_len": 1024}}


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        answers: How many there were.
        seconds: From the call to the end: start of Ray and engines, reloads, everything.
        rate: Answers a second since the first engine was up.
        encoded: Clips that went through a tower.
    """

    answers: int
    seconds: float
    rate: float
    encoded: int


def measure(engine: str, workers: int, recipe: Path, out: Path) -> Measured:
    """Run it, in this process."""
    import torch

    from mergekit_bio.eval.run.evaluate import evaluate
    from mergekit_bio.eval.run.progress import SilentListener, Standing

    class Last(SilentListener):
        standing_now: Standing

        def standing(self, standing: Standing) -> None:
            self.standing_now = standing

    last = Last()
    options = OPTIONS[engine] | ({"enforce_eager": True} if engine == "vllm" and not torch.cuda.is_available() else {})
    start = time.perf_counter()
    run = evaluate(recipe=recipe, out=out, engine=engine, engine_options=options, workers=workers, listener=last)
    seconds = time.perf_counter() - start
    done = last.standing_now
    return Measured(done.run_done, seconds, done.rate or 0.0, run.record.environment["clips_encoded"])


def write_recipe(folder: Path, *, clips: int, alphas: int) -> Path:
    """Ten seconds of noise a clip, every strength of a tiny model."""
    recordings = folder / "recordings"
    recordings.mkdir()
    generator = np.random.default_rng(0)
    lines = ["file_name,label"]
    for number in range(clips):
        soundfile.write(recordings / f"{number}.wav", generator.uniform(-0.5, 0.5, 160_000), 16_000)
        lines.append(f"{number}.wav,{'wren' if number % 2 else 'frog'}")
    (recordings / "metadata.csv").write_text("\n".join(lines) + "\n")
    checkpoints = [str(path) for path in make_sweep(folder / "model", alphas)]
    recipe = {
        "name": "workers",
        "checkpoints": checkpoints,
        "datasets": [{"path": str(recordings)}],
        "queries": ["Which species is it?"],
        "generate": {"max_new_tokens": 32, "num_beams": 1},
        "scorer": "exact",
    }
    file = folder / "workers.yaml"
    file.write_text(json.dumps(recipe))  # which is YAML
    return file


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", nargs="+", default=["transformers", "vllm"], choices=OPTIONS)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--alphas", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "serving.md")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        engine, workers, recipe, out, result = given.measure
        Path(result).write_text(json.dumps(asdict(measure(engine, int(workers), Path(recipe), Path(out)))))
        return
    found: dict[tuple[str, int], list[Measured]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = write_recipe(folder, clips=given.clips, alphas=given.alphas)
        for number in range(given.rounds):
            for engine in given.engine:
                for workers in given.workers:
                    out, result = folder / f"{engine}-{workers}-{number}", folder / "result.json"
                    command = [sys.executable, __file__, "--measure", engine, str(workers), recipe, out, result]
                    subprocess.run([*map(str, command)], check=True, stdout=sys.stderr)
                    measured = Measured(**json.loads(result.read_text()))
                    print(engine, workers, measured, file=sys.stderr, flush=True)
                    found.setdefault((engine, workers), []).append(measured)
        described = machine.describe(folder)
    rounds = "one round" if given.rounds == 1 else f"medians of {given.rounds} interleaved rounds"
    what = (
        f"`mergekit-bio eval --workers N` on a tiny random model: {given.clips} clips of 10 s at {given.alphas} "
        f"strengths, 32 new tokens at most, greedy, float32; {rounds}. The whole "
        "is all of a run, from Python's imports of the engine and the start of Ray to the last answer; the rate counts "
        f"from the start of the first engine. Machine: {described}."
    )
    lines = [
        HEADING,
        what,
        "",
        "| engine | workers | answers | whole | answers/s | clips encoded |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for (engine, workers), runs in sorted(found.items()):
        seconds, rate = (statistics.median(getattr(run, name) for run in runs) for name in ("seconds", "rate"))
        encoded = round(statistics.median(run.encoded for run in runs))
        lines.append(f"| {engine} | {workers} | {runs[0].answers} | {seconds:.1f} s | {rate:.1f} | {encoded} |")
    section = "\n".join([*lines, ""])
    print(section)
    put_section(given.results, section)


if __name__ == "__main__":
    main()
