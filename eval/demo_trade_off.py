"""The demo's trade-off for models of several seeds: picking a species from a list against keeping to the list.

    python eval/demo_trade_off.py mergekit_bio/demo/model build/seed1 build/seed2

Each folder has the ``base`` and ``adapter`` that ``python -m demo_model OUT --seed N`` writes. The recordings, the
question and the scorer are the demo's own. Writes eval/results/demo_trade_off.png and a section of demo_model.md there.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from results_page import put_section

from mergekit_bio.demo.recordings import write_recordings
from mergekit_bio.demo.run import CLOSED, EACH_UNHEARD
from mergekit_bio.demo.species import UNHEARD
from mergekit_bio.eval.recipe.shipped import copy_shipped
from mergekit_bio.eval.report.drawing import STYLE
from mergekit_bio.eval.report.trade_off import Point, TradeOff
from mergekit_bio.eval.report.trade_off_figure import draw_trade_off
from mergekit_bio.eval.run.evaluate import evaluate
from mergekit_bio.merging.merge import merge

RESULTS = Path(__file__).with_name("results")
PICTURE, PAGE = RESULTS / "demo_trade_off.png", RESULTS / "demo_model.md"


def measure(model: Path, folder: Path) -> TradeOff:
    """Merge, ask and score what the demo does, with Transformers in float32."""
    merge(base=model / "base", adapter=model / "adapter", alphas=["0:1:0.1"], out=folder / "sweep")
    write_recordings(folder / "recordings/unheard", UNHEARD, each=EACH_UNHEARD, seed=2, label="scientific")
    recipe, *_ = copy_shipped(CLOSED, folder)
    options = {"device": "cpu", "dtype": "float32"}
    run = evaluate(recipe=recipe, out=folder / "run", engine="transformers", engine_options=options)
    (trade_off,) = run.report().trade_offs
    return trade_off


def draw(measured: dict[str, TradeOff]) -> None:
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(2.9 * len(measured), 2.8))
        panels = canvas.subplots(1, len(measured), squeeze=False, sharey=True)[0]
        for axes, (name, trade_off) in zip(panels, measured.items(), strict=True):
            draw_trade_off(axes, trade_off)
            axes.set(title=name, ylim=(0, 0.9), xlabel="answers on the list", ylabel="")
        panels[0].set_ylabel("right one of five unheard species")
        canvas.savefig(PICTURE)


def section(measured: dict[str, TradeOff]) -> str:
    rows = []
    for name, trade_off in measured.items():
        first, *_, last = points = trade_off.points
        best = max(points, key=lambda point: point.score)
        halved = "yes" if last.kept < first.kept / 2 else "no"
        beats = "yes" if best.low > max(first.score, last.score) else "no"
        texts = (_text(first), f"{best.alpha:g}: {_text(best)}", _text(last), halved, beats)
        rows.append(f"| {name} | {' | '.join(texts)} |")
    return f"""## The trade-off of three seeds

![Right answers against answers on the list, a panel a seed, one point an alpha]({PICTURE.name})

The right one of five unheard species, and answers that are one of the list of the five, with 95% intervals over the
demo's {len(trade_off.task.clips)} recordings (`eval/demo_trade_off.py`, Transformers in float32). *halved*: alpha 1
keeps less than half of what alpha 0 keeps; *beats both*: the best alpha's interval is above what either end gets.

| | alpha 0: right; on the list | best alpha | alpha 1 | halved | beats both |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def _text(point: Point) -> str:
    right = f"{point.score:.2f} [{point.low:.2f}, {point.high:.2f}]"
    return f"{right}; {point.kept:.2f} [{point.kept_low:.2f}, {point.kept_high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="in the order of their seeds, from 0")
    measured = {}
    for seed, model in enumerate(parser.parse_args().models):
        with tempfile.TemporaryDirectory() as folder:
            measured[f"seed {seed}"] = measure(model, Path(folder))
    draw(measured)
    put_section(PAGE, section(measured))


if __name__ == "__main__":
    main()
