"""An archive asked about: windows a second and memory, with the demo's model through the command itself.

Writes eval/results/listening.md. What a start costs is left out by comparing two archives, one ten times the other.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np
import soundfile
from process import Cost, measure

HERE = Path(__file__).resolve().parent
PROGRAM = Path(sys.executable).with_name("mergekit-bio")
PROMPT = "What is the common name for the focal species in the audio?"
#: Different recordings; all others are links to them.
SOUNDS = 40
OPTIONS = {"vllm": ["--engine-option", "enforce_eager=true", "--engine-option", "max_model_len=1024"]}


@dataclass(frozen=True)
class Asked:
    """One command: how many recordings of 30 s, and what it cost."""

    recordings: int
    cost: Cost

    @property
    def windows(self) -> int:
        return 3 * self.recordings


def write_archive(folder: Path, recordings: int) -> Path:
    """Half a minute of the demo's species in each, at 44.1 kHz, as a recorder would write them."""
    from mergekit_bio.demo.calls import SAMPLING_RATE, call
    from mergekit_bio.demo.species import HEARD

    folder.mkdir()
    rate = 44_100
    for number in range(recordings):
        file = folder / f"{number:05d}.wav"
        if number >= SOUNDS:
            os.link(folder / f"{number % SOUNDS:05d}.wav", file)
            continue
        kind, random = HEARD[number % len(HEARD)], np.random.default_rng(number)
        sound = np.concatenate([call(voice=kind.voice, phrase=kind.phrase, random=random) for _ in range(3)])
        places = np.arange(0, len(sound) - 1, SAMPLING_RATE / rate)
        soundfile.write(file, np.interp(places, np.arange(len(sound)), sound), rate)
    return folder


def main() -> None:
    """Run the benchmark."""
    import mergekit_bio
    from mergekit_bio.demo.run import MODEL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", nargs="+", default=["vllm", "transformers"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--recordings", nargs=2, type=int, default=[100, 1000])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "listening.md")
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (merged,) = mergekit_bio.merge(
            base=MODEL / "base", adapter=MODEL / "adapter", alphas=[0.6], out=folder / "demo", dtype="float32"
        )
        archives = [write_archive(folder / f"archive-{count}", count) for count in given.recordings]
        for engine in given.engine:
            for beams in given.beams:
                asked = []
                for archive, count in zip(archives, given.recordings, strict=True):
                    out = folder / f"{engine}-{beams}-{count}.csv"
                    command = [PROGRAM, "ask", merged.path, archive, "--prompt", PROMPT, "--out", out]
                    command += ["--engine", engine, "--beams", str(beams), *OPTIONS.get(engine, [])]
                    cost = measure([*map(str, command)], log=folder / "log", env={"VLLM_CPU_KVCACHE_SPACE": "1"})
                    asked.append(Asked(count, cost))
                    assert out.read_text().count("\n") == 1 + 3 * count
                    print(engine, beams, asked[-1], flush=True)
                few, many = asked
                rate = (many.windows - few.windows) / (many.cost.wall - few.cost.wall)
                cells = [engine, str(beams), f"{rate:.1f}"]
                cells += [f"{one.cost.wall:.0f} s" for one in asked]
                cells += [f"{one.cost.anonymous / 1e9:.2f} GB" for one in asked]
                lines.append(f"| {' | '.join(cells)} |")
        described = machine.describe(folder)
    few, many = given.recordings
    page = f"""# An archive asked about

`mergekit-bio ask` about {few} and {many:,} recordings of 30 s (44.1 kHz, three windows each) with the demo's model at
alpha 0.6 in float32. Windows a second are those of the difference between the two, without the start; times and memory
are of the whole command, memory that of all its processes that no file backs, at its peak. Machine: {described}.

| engine | beams | windows/s | {few} recordings | {many:,} recordings | memory, {few} | memory, {many:,} |
|---|---:|---:|---:|---:|---:|---:|
"""
    given.results.write_text(page + "\n".join(lines) + "\n")
    print(given.results.read_text())


if __name__ == "__main__":
    main()
