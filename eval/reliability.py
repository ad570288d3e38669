"""What a choice's probability is worth: the demo model's reliability curve, and its choices beside its free text.

    python eval/reliability.py                      # eval/results/reliability.md and .png, some minutes on two cores

Fresh recordings of the demo's five unheard species (not those of `mergekit-bio demo`) are asked about with the list of
the five, at several alphas: once for free text, once for the likeliest of the list. Then recordings of species that are
not on the list, with the list alone and with "none of these" added.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
import yaml
from machine import describe
from matplotlib.figure import Figure
from scipy.stats import binomtest

from mergekit_bio.audio.recording import read_clip
from mergekit_bio.demo.recordings import write_recordings
from mergekit_bio.demo.run import CLOSED, MODEL
from mergekit_bio.demo.species import HEARD, UNHEARD
from mergekit_bio.engine.decoding.choices import NONE, likeliest, with_choices
from mergekit_bio.engine.interface import Prompt
from mergekit_bio.engine.transformers import TransformersEngine
from mergekit_bio.eval.recipe.shipped import copy_shipped
from mergekit_bio.eval.records.predictions import Prediction, read_predictions
from mergekit_bio.eval.report.drawing import BLUE, GREY, STYLE, VERMILION
from mergekit_bio.eval.run.evaluate import evaluate
from mergekit_bio.eval.scoring.scorers import SCORERS
from mergekit_bio.merging.merge import merge

RESULTS = Path(__file__).with_name("results")
ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)
#: Those that are drawn: the best of the demo's curve, and the fine-tune as it is.
DRAWN = ((0.5, BLUE), (1.0, VERMILION))
CHOICES = tuple(sorted(species.scientific for species in UNHEARD))
QUESTION = "What is the scientific name for the focal species in the audio?\nOutput exactly one of: {species_list}"
BINS = 10
#: Recordings of each kind that are asked with and without "none of these".
COMPARED = 50
#: What the recordings are of.
ON, OFF = "the five species", "25 other species"
#: What they are of, and what they were asked with -> the choice about each and its probability.
Asked = dict[tuple[str, str], list[tuple[str, float]]]


@dataclass(frozen=True)
class Chosen:
    """What was chosen at one alpha: for each recording the probability of its choice, and whether that is right."""

    probabilities: np.ndarray
    right: np.ndarray

    def bins(self) -> list[np.ndarray]:
        """Indices of recordings of about the same probability: as many in each, the least likely first."""
        return np.array_split(np.argsort(self.probabilities, kind="stable"), BINS)

    @property
    def calibration_error(self) -> float:
        """Mean distance of accuracy and probability over the bins (Guo et al. 2017, arXiv 1706.04599, equal counts)."""
        distances = [abs(self.right[bin].mean() - self.probabilities[bin].mean()) * len(bin) for bin in self.bins()]
        return sum(distances) / len(self.right)


def asked(folder: Path, *, decoding: str) -> dict[float, list[Prediction]]:
    """The predictions of the demo's closed set, by alpha."""
    recipe = yaml.safe_load((folder / f"{CLOSED}.yaml").read_text())
    recipe |= {"decoding": decoding, "datasets": [{"path": "./unheard"}], "checkpoints": ["./sweep"]}
    file = folder / f"{decoding}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    run = evaluate(recipe=file, out=folder / decoding, engine="transformers")
    return {cell.alpha or 0.0: read_predictions(run.path / cell.file) for cell in run.record.cells}


def right_in_free_text(rows: Sequence[Prediction]) -> np.ndarray:
    """Whether the exact scorer finds the right name."""
    answers = SCORERS["exact"].match([row.prediction for row in rows], CHOICES).answers
    return np.array([answer == row.label for answer, row in zip(answers, rows, strict=True)])


def chosen(rows: Sequence[Prediction]) -> Chosen:
    """The likeliest of each recording's choices."""
    best = [likeliest(row.choice_logprobs or {}, 1)[0] for row in rows]
    right = [label == row.label for (label, _), row in zip(best, rows, strict=True)]
    return Chosen(np.array([probability for _, probability in best]), np.array(right))


def first_choices(engine: TransformersEngine, recordings: Path, choices: Sequence[str]) -> list[tuple[str, float]]:
    """What `ask --choices` says about the recordings of a folder, or about ``COMPARED`` of them, all along it."""
    files = sorted(recordings.glob("*.wav"))
    clips = [read_clip(file) for file in files[:: max(1, len(files) // COMPARED)]]
    prompts = [Prompt(with_choices(QUESTION, choices), (clip,)) for clip in clips]
    return [likeliest(scores, 1)[0] for scores in engine.loglikelihood(prompts, choices)]


def draw(curves: dict[float, Chosen], beside: Sequence[tuple[str, float]], file: Path) -> None:
    """The reliability curve; and the probabilities of choices that cannot be right, beside those that can."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(7.0, 3.0))
        curve, histogram = canvas.subplots(1, 2, width_ratios=[1, 1.15])
        curve.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="probability = share right")
        for alpha, colour in DRAWN:
            one = curves[alpha]
            likely = [one.probabilities[bin].mean() for bin in one.bins()]
            share = [one.right[bin].mean() for bin in one.bins()]
            ends = [binomtest(int(one.right[bin].sum()), len(bin)).proportion_ci(method="wilson") for bin in one.bins()]
            low = [value - end.low for value, end in zip(share, ends, strict=True)]
            high = [end.high - value for value, end in zip(share, ends, strict=True)]
            curve.errorbar(likely, share, [low, high], color=colour, marker="o", capsize=2, label=f"alpha {alpha:g}")
        curve.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the choice", ylabel="share that is right")
        curve.set_title(f"Five species, {len(curves[0.5].right)} recordings")
        curve.legend(loc="upper left")
        edges = np.linspace(0.2, 1, 17)
        for values, colour, label in (
            (curves[0.5].probabilities, BLUE, "species on the list"),
            (np.array([probability for _, probability in beside]), VERMILION, "species that are not on it"),
        ):
            weights = np.full(len(values), 1 / len(values))
            histogram.hist(values, edges, weights=weights, histtype="step", color=colour, label=label, linewidth=1.5)
        histogram.set(xlim=(0.2, 1), ylim=(0, 0.26), xlabel="probability of the choice", ylabel="share of recordings")
        histogram.set_title("Alpha 0.5: likely among the choices, whatever sings")
        histogram.legend(loc="upper left")
        canvas.savefig(file)


def report(free: dict[float, np.ndarray], curves: dict[float, Chosen], beside: Asked, machine: str) -> str:
    """The figures as Markdown."""
    count = len(curves[0.5].right)
    lines = [
        "# A choice's probability: the demo model's reliability curve",
        "",
        f"{machine}. `python eval/reliability.py`: {count} fresh recordings of the demo's five",
        "unheard species, asked with the recipe `demo` for free text (scorer `exact`) and, with `loglikelihood` as its",
        "decoding, for the likeliest of the five.",
        "",
        "![Share of right choices against their probability](reliability.png)",
        "",
        "| alpha | right in free text | right of the choices | mean probability of the choice | calibration error |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for alpha, one in curves.items():
        values = (free[alpha].mean(), one.right.mean(), one.probabilities.mean(), one.calibration_error)
        lines.append(f"| {alpha:g} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    lines += [
        "",
        "The calibration error is the mean distance between a bin's share of right choices and its mean probability,",
        f"over {BINS} bins of as many recordings each. The bars in the figure are 95% Wilson intervals.",
        "",
        "What the list does not hold, at alpha 0.5, asked as `ask --choices` asks:",
        "",
        f'| recordings | list | mean probability of the choice | above 0.9 | answered "{NONE}" |',
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (recordings, choices), answers in beside.items():
        probabilities = [probability for _, probability in answers]
        values = (np.mean(np.array(probabilities) > 0.9), np.mean([label == NONE for label, _ in answers]))
        shares = " | ".join(f"{value:.0%}" for value in values)
        lines.append(f"| {len(answers)} of {recordings} | {choices} | {fmean(probabilities):.2f} | {shares} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of reliability.md and reliability.png")
    parser.add_argument("--each", type=int, default=60, help="recordings of each species")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part in ("base", "adapter"):
            shutil.copytree(MODEL / part, folder / part)
        copy_shipped(CLOSED, folder)
        write_recordings(folder / "unheard", UNHEARD, each=arguments.each, seed=3, label="scientific")
        write_recordings(folder / "heard", HEARD, each=COMPARED // len(HEARD), seed=4)
        merge(base=folder / "base", adapter=folder / "adapter", alphas=list(ALPHAS), out=folder / "sweep")
        free = {alpha: right_in_free_text(rows) for alpha, rows in asked(folder, decoding="generate").items()}
        curves = {alpha: chosen(rows) for alpha, rows in asked(folder, decoding="loglikelihood").items()}
        engine = TransformersEngine(folder / "sweep/alpha-0.50", dtype="float32", device="cpu")
        beside = {
            (species, named): first_choices(engine, folder / recordings, choices)
            for named, choices in (("five", CHOICES), ("five, and none", (*CHOICES, NONE)))
            for species, recordings in ((ON, "unheard"), (OFF, "heard"))
        }
        machine = describe(folder)
    draw(curves, beside[OFF, "five"], arguments.out / "reliability.png")
    text = report(free, curves, beside, machine)
    (arguments.out / "reliability.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
