"""What rounding a merge to bfloat16 costs, on a real model: nearest against stochastic.

Trains two adapters for SmolLM2-135M-Instruct, merges them at several strengths, and measures how far the next-token
distribution is from that of the unmerged model in float32. Writes eval/results/rounding.md and rounding.png.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import machine
import smollm2
import torch
from transformers import AutoModelForCausalLM

import mergekit_bio

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDINGS = ("nearest", "stochastic")
#: A delta far above and one far below half a step of bfloat16 (2^-9 of a weight, 0.2%).
ADAPTERS = (
    smollm2.Training("large", steps=200, tokens=64, learning_rate=5e-4),
    smollm2.Training("small", steps=200, tokens=64, learning_rate=3e-5),
)


@dataclass(frozen=True)
class Measurement:
    """One adapter at one strength.

    Attributes:
        adapter: Its name.
        size: Median of ||delta|| / ||W|| at full strength.
        alpha: The strength.
        merged: Divergence of each rounding's checkpoint, computing in float32, from the truth: the unmerged model in
            float32. In nats.
        merged_in_bfloat16: The same, computing in bfloat16.
        unmerged_in_bfloat16: Of the unmerged model computing in bfloat16.
    """

    adapter: str
    size: float
    alpha: float
    merged: dict[str, float]
    merged_in_bfloat16: dict[str, float]
    unmerged_in_bfloat16: float


def measure(training: smollm2.Training, *, alphas: list[float], ids: torch.Tensor) -> list[Measurement]:
    """Merge with both roundings and compare with the unmerged model."""
    adapter = smollm2.adapter(training)
    size = smollm2.relative_size(adapter)
    with tempfile.TemporaryDirectory() as folder:
        merged = {
            rounding: mergekit_bio.merge(
                base=smollm2.base(),
                adapter=adapter,
                alphas=alphas,
                out=Path(folder, rounding, "out"),
                dtype="bfloat16",
                rounding=rounding,
                fsync=False,
            )
            for rounding in ROUNDINGS
        }

        def distribution(rounding: str, number: int, dtype: torch.dtype) -> torch.Tensor:
            path = merged[rounding][number].path
            return smollm2.log_probabilities(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), ids)

        measurements = []
        for number, alpha in enumerate(alphas):
            truth = smollm2.log_probabilities(smollm2.unmerged(adapter, alpha=alpha, dtype=torch.float32), ids)
            in_bfloat16 = smollm2.log_probabilities(smollm2.unmerged(adapter, alpha=alpha, dtype=torch.bfloat16), ids)
            divergences = [
                {each: smollm2.divergence(truth, distribution(each, number, dtype)) for each in ROUNDINGS}
                for dtype in (torch.float32, torch.bfloat16)
            ]
            unmerged = smollm2.divergence(truth, in_bfloat16)
            measurements.append(Measurement(training.name, size, alpha, *divergences, unmerged))
            print(measurements[-1], flush=True)
    return measurements


def report(measurements: list[Measurement], ids: torch.Tensor) -> str:
    """The page eval/results/rounding.md."""
    rows = [
        f"| {one.size:.2%} | {one.alpha:g} | {one.merged['nearest']:.1e} | {one.merged['stochastic']:.1e} "
        f"| {one.merged['nearest'] / one.merged['stochastic']:.1f} | {one.merged_in_bfloat16['nearest']:.1e} "
        f"| {one.merged_in_bfloat16['stochastic']:.1e} | {one.unmerged_in_bfloat16:.1e} |"
        for one in measurements
    ]
    made_with = f"PyTorch {torch.__version__.partition('+')[0]}, {machine.describe(Path(tempfile.gettempdir()))}"
    return f"""\
# What rounding a merge to bfloat16 costs

SmolLM2-135M-Instruct and two rank-{smollm2.RANK} adapters, trained with PEFT for {ADAPTERS[0].steps} steps on Python's
language reference. Mean Kullback-Leibler divergence (nats) of the next-token distribution from that of the unmerged
model in float32, over {ids.numel()} held-out tokens; smaller is better. The first three figures compute in float32,
the last three in bfloat16. Made by `eval/bench_rounding.py` ({made_with}).

| delta / W | alpha | nearest | stochastic | times nearer | nearest, bf16 | stochastic, bf16 | unmerged, bf16 |
|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

![Divergence against alpha](rounding.png)

Rounding to the nearest bfloat16 drops what is below half a step of each weight, so a small delta all but vanishes and
the merged model stays near the base. Stochastic rounding keeps every delta on average. It adds more noise, which shows
where a delta is large; but that is far below what computing in bfloat16 costs any model, merged or not (last column).
"""


def draw(measurements: list[Measurement], file: Path) -> None:
    """Divergence against alpha, one panel an adapter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "nearest": ("#c2410c", "s", "rounded to nearest"),
        "stochastic": ("#0f766e", "o", "rounded stochastically"),
    }
    figure, panels = pyplot.subplots(1, len(ADAPTERS), figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, training in zip(panels, ADAPTERS, strict=True):
        shown = [one for one in measurements if one.adapter == training.name]
        alphas = [one.alpha for one in shown]
        for rounding, (colour, marker, label) in style.items():
            panel.plot(alphas, [one.merged[rounding] for one in shown], color=colour, marker=marker, label=label)
        unmerged = [one.unmerged_in_bfloat16 for one in shown]
        panel.plot(alphas, unmerged, color="0.6", linestyle=":", label="not merged, run in bfloat16")
        panel.set(title=f"delta {shown[0].size:.2%} of the weights", xlabel="alpha", yscale="log")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL to the unmerged model (nats)")
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--sequences", type=int, default=8, help="of 128 held-out tokens each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--json", type=Path, help="also write all figures there")
    arguments = parser.parse_args()
    ids = smollm2.text(held_out=True, tokens=128, count=arguments.sequences)
    measurements = [one for training in ADAPTERS for one in measure(training, alphas=arguments.alphas, ids=ids)]
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "rounding.md").write_text(report(measurements, ids))
    draw(measurements, arguments.results / "rounding.png")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in measurements], indent=2))


if __name__ == "__main__":
    main()
