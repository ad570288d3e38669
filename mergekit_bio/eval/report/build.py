"""The report as data: scored cells in sweeps, what a reader must be told about them, and its JSON form."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from mergekit_bio.errors import RunError
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.report.choosing import AlphaChoice, choose_on_another, choose_on_halves, matching_cell
from mergekit_bio.eval.report.comparison import (
    MAIN_METRICS,
    Comparison,
    clips_of,
    compare,
    distinct_alphas,
    shared_clips,
)
from mergekit_bio.eval.report.trade_off import TradeOff, trade_off_document, trade_offs
from mergekit_bio.eval.scoring import classification
from mergekit_bio.eval.scoring.label_scores import LabelScore, label_scores
from mergekit_bio.eval.scoring.score import Score, score
from mergekit_bio.eval.scoring.scorers import SCORERS
from mergekit_bio.eval.scoring.statistics import LEVEL, RESAMPLES

#: What every table and figure calls a metric; no average goes unnamed.
TITLES = {
    "accuracy": "Accuracy",
    "f1_weighted": "F1 weighted",
    "f1_macro": "F1 macro",
    "f1_macro_true": "F1 macro (labels only)",
    "precision_weighted": "Precision weighted",
    "recall_weighted": "Recall weighted",
    "precision_macro": "Precision macro",
    "recall_macro": "Recall macro",
    "top1": "Top-1 (beans-zero)",
    "out_of_set": "Out of set",
    "in_set_wrong": "In set, wrong",
    "out_of_set_matched": "Out of set (matched)",
    "in_set_wrong_matched": "In set, wrong (matched)",
    "map": "mAP",
    "map_beans_zero": "mAP (beans-zero)",
    "missed": "Labels missed",
    "added": "Labels added",
    "missed_and_added": "Missed and added",
    "cider": "CIDEr",
    "spice": "SPICE",
    "spider": "SPIDEr",
    "strict": "Kept, strict",
    "loose": "Kept, loose",
}


def counted(number: int, noun: str) -> str:
    """``1 clip``, ``2 clips``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All cells of a run that were asked the same query about the same dataset, for the same target.

    Attributes:
        scores: Of what is compared with each other.
        other_models: Of other people's models, which stand beside it as baselines.
    """

    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]
    choices: tuple[AlphaChoice, ...] = ()
    choices_note: str | None = None
    other_models: tuple[Score, ...] = ()

    @property
    def cell(self) -> Cell:
        """The first cell: what it says about the query holds for all."""
        return self.scores[0].cell

    @property
    def title(self) -> str:
        """Run, dataset where it is not the run's name, query, and what is asked for where it is not the label."""
        cell = self.cell
        parts = [cell.run] + ([] if cell.dataset == cell.run else [cell.dataset]) + [f"query {cell.query}"]
        return ", ".join(parts + ([] if cell.target == "label" else [f"{cell.target} name"]))

    @property
    def by_alpha(self) -> bool:
        """Whether every cell has an alpha of its own: then it is a curve."""
        return distinct_alphas(self.scores)

    @property
    def main_metrics(self) -> list[str]:
        """The metrics of ``MAIN_METRICS`` that could be computed."""
        return [name for name in MAIN_METRICS[self.cell.task] if name in self.scores[0].metrics]

    @property
    def clips(self) -> frozenset[tuple[str, str]]:
        """The id and the right answer of every clip that any cell has."""
        return frozenset.union(*map(clips_of, self.scores))

    @property
    def labels(self) -> frozenset[str]:
        """What the cells of a classification choose among, and answers to a detection are made of."""
        return frozenset(self.scores[0].labels)

    @property
    def baselines(self) -> dict[str, float]:
        """What majority and random answers to all its clips get (classification)."""
        if self.cell.task != "classification":
            return {}
        asked = self.scores[0].labels if self.closed else ()
        return classification.baselines([target for _, target in self.clips], asked)

    @property
    def closed(self) -> bool:
        """Whether the labels are a list that was asked, and not those that the clips have."""
        return bool(self.asked) and SCORERS[self.scores[0].scorer].asked_labels

    @property
    def asked(self) -> frozenset[str]:
        """The closed list that was asked, if there was one."""
        return frozenset(label for item in self.scores for label in item.cell.labels)

    @cached_property
    def label_scores(self) -> tuple[tuple[Score, list[LabelScore]], ...]:
        """For each cell of a classification or detection every label that a clip has or a cell answered, by name."""
        if self.cell.task not in ("classification", "detection"):
            return ()
        scores, several = (*self.scores, *self.other_models), self.cell.task == "detection"
        known = self.labels if several else self.labels | {target for item in scores for target in item.targets}
        texts = [text for item in scores for text in (*item.targets, *item.answers)]
        occurring = {part for text in texts for part in (text.split(", ") if several else [text])}
        labels = sorted(known & occurring)
        return tuple((item, label_scores(item, labels)) for item in scores)

    @property
    def same_clips(self) -> bool:
        """Whether all cells have the same clips, those of other people's models too."""
        return len({clips_of(item) for item in (*self.scores, *self.other_models)}) == 1

    def comparison(self, metric: str) -> Comparison | None:
        """The comparison of a metric; None where the sweep has one cell."""
        return next((item for item in self.comparisons if item.metric == metric), None)

    def compared(self, metric: str, item: Score) -> float:
        """A cell's metric over the clips that all cells have, which there are."""
        comparison = self.comparison(metric)
        return item.metrics[metric] if comparison is None else comparison.values[item.cell.checkpoint]

    def best(self, metric: str) -> Score | None:
        """The best cell of the comparison, or the only one; None where no clip is shared to compare the cells over."""
        comparison = self.comparison(metric)
        if comparison is None:
            return self.scores[0] if len(self.scores) == 1 else None
        return next(item for item in self.scores if item.cell.checkpoint == comparison.best)

    def improvement(self, metric: str) -> tuple[Score, Score, float] | None:
        """The best cell, the one at alpha 1.0 and the relative gain between them over the clips that all cells have.

        None where there is none to state.
        """
        best = self.best(metric)
        full = next((item for item in self.scores if item.cell.alpha == 1.0), None)
        if best is None or full is None or full is best or not self.by_alpha or not self.compared(metric, full):
            return None
        return best, full, self.compared(metric, best) / self.compared(metric, full) - 1

    @property
    def clips_note(self) -> str | None:
        """How the cells differ in clips, if they do."""
        if self.same_clips:
            return None
        noun = "prompt" if self.cell.task == "instructions" else "clip"
        by_number: dict[int, list[str]] = {}
        for item in (*self.scores, *self.other_models):
            by_number.setdefault(len(item.ids), []).append(item.cell.checkpoint)
        has = "; ".join(
            f"{counted(number, noun)}: {', '.join(names) if len(names) <= 3 else f'{len(names)} cells'}"
            for number, names in by_number.items()
        )
        shared = len(shared_clips(self.scores))
        compared = f"compared over the {shared} that all have" if shared else "none is in all, so nothing is compared"
        if len({clips_of(item) for item in self.scores}) == 1:
            compared = "another model's metrics are over its own, and not to be set against the others'"
        return f"{self.title}: the cells have different {noun}s ({has}); {compared}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that tables, figures and the page are drawn from.

    Attributes:
        sweeps: The cells that have answers.
        waiting: Those that were planned and have none yet.
    """

    sweeps: tuple[Sweep, ...]
    waiting: tuple[Cell, ...] = ()

    @property
    def scores(self) -> list[Score]:
        """The scores of all sweeps, other people's models among them."""
        return [item for sweep in self.sweeps for item in (*sweep.scores, *sweep.other_models)]

    @property
    def scorers(self) -> list[str]:
        """The scorers used; more than one only where runs ask for different ones."""
        return list(dict.fromkeys(item.scorer for item in self.scores))

    @property
    def trade_offs(self) -> list[TradeOff]:
        """What each task's score costs in instructions kept."""
        return list(trade_offs(self.sweeps))

    @property
    def notes(self) -> list[str]:
        """What a reader must be told, each once."""
        of_scores = [note for item in self.scores for note in item.notes]
        of_sweeps = [note for sweep in self.sweeps for note in (sweep.clips_note, sweep.choices_note) if note]
        return list(dict.fromkeys([*of_scores, *of_sweeps, *self._waiting_notes()]))

    def _waiting_notes(self) -> Iterator[str]:
        for run, cells in groupby(self.waiting, key=lambda cell: cell.run):
            names = [f"{cell.dataset}, query {cell.query}, {cell.checkpoint}" for cell in cells]
            begun = sum(item.cell.run == run for item in self.scores)
            shown = "; ".join(names[:3]) + ("; ..." if len(names) > 3 else "")
            yield f"{run}: {len(names)} of {begun + len(names)} cells have no answer yet ({shown})"


def build_report(
    cells: Sequence[Cell],
    *,
    scorer: str | None = None,
    choose_on: str | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Score and compare.

    Args:
        cells: Of ``read_runs``, in its order.
        scorer: For all cells; None takes what each run asks for ("paper" for the published layout).
        choose_on: A dataset or a run whose best alphas the others are scored with; None chooses on halves of the clips.
        progress: Called with 1 after each cell.

    Raises:
        RunError: There is no such dataset or run, or what is to be scored cannot be.
    """
    sweeps = []
    for _, group in groupby((cell for cell in cells if cell.predictions), key=lambda cell: cell.sweep):
        members = list(group)
        # What an answer may be is the sweep's to say: another model beside it changes nothing of it.
        own = [cell for cell in members if not cell.baseline] or members
        labels = [label for _, label in sorted({(row.id, row.label) for cell in own for row in cell.predictions})]
        asked = sorted({label for cell in own for label in cell.labels})
        scores = []
        for cell in members:
            name = scorer or cell.scorer or "paper"
            scores.append(score(cell, scorer=name, labels=labels, asked=asked, seed=seed))
            progress(1)
        # Other people's models are no part of a sweep, unless there is nothing else.
        compared = [item for item in scores if not item.cell.baseline] or scores
        others = tuple(item for item in scores if item.cell.baseline) if len(compared) < len(scores) else ()
        comparisons = tuple(compare(compared, seed))
        choices = tuple(choose_on_halves(compared, comparisons, seed=seed))
        sweeps.append(Sweep(scores=tuple(compared), comparisons=comparisons, choices=choices, other_models=others))
    if choose_on is not None:
        sweeps = list(_chosen_on(choose_on, sweeps))
    return Report(sweeps=tuple(sweeps), waiting=tuple(cell for cell in cells if not cell.predictions))


def _chosen_on(name: str, sweeps: Sequence[Sweep]) -> Iterator[Sweep]:
    """The sweeps, those that are not about the dataset or of the run of that name scored with its best alphas.

    What is both is taken for a dataset. Where the other's best alpha was not asked, halves choose after all.
    """
    datasets = {sweep.cell.dataset for sweep in sweeps}

    def chooses(sweep: Sweep) -> bool:
        return name == (sweep.cell.dataset if name in datasets else sweep.cell.run)

    choosing = [sweep for sweep in sweeps if chooses(sweep)]
    if not choosing:
        known = sorted(datasets | {sweep.cell.run for sweep in sweeps})
        raise RunError(f"--choose-on {name}: no such dataset or run in the report; there is {', '.join(known)}")
    for sweep in sweeps:
        if chooses(sweep) or not sweep.choices:
            yield sweep
            continue
        index = matching_cell([other.cell for other in choosing], sweep.cell)
        chosen: dict[str, AlphaChoice] = {}
        about = name
        if index is not None:
            other = choosing[index]
            about = other.title
            found = choose_on_another(
                sweep.scores, sweep.comparisons, other=other.scores, of_other=other.comparisons, title=about
            )
            chosen = {choice.metric: choice for choice in found}
        missing = [choice.metric for choice in sweep.choices if choice.metric not in chosen]
        note = None
        if missing:
            titles = ", ".join(TITLES[metric] for metric in missing)
            note = (
                f"{sweep.title}: no alpha that is best on {about} was asked here for {titles}; --choose-on {name} does "
                "not count there, and each half of the clips chooses for the other"
            )
        choices = tuple(chosen.get(choice.metric, choice) for choice in sweep.choices)
        yield replace(sweep, choices=choices, choices_note=note)


def to_document(report: Report) -> dict[str, Any]:
    """The report as JSON-serialisable values."""
    return {
        "scorers": {name: SCORERS[name].description for name in report.scorers},
        "intervals": f"{LEVEL:.0%} percentile bootstrap over clips, {RESAMPLES} resamples",
        "comparisons": "against the best, paired by clip; p-values Holm-adjusted, p_at_most: or smaller",
        "notes": report.notes,
        "sweeps": [_sweep_document(sweep) for sweep in report.sweeps],
        "trade_offs": [trade_off_document(trade_off) for trade_off in report.trade_offs],
    }


def _sweep_document(sweep: Sweep) -> dict[str, Any]:
    cell = sweep.cell
    gains = {name: gain for name in sweep.main_metrics if (gain := sweep.improvement(name))}
    return {
        "run": cell.run,
        "dataset": cell.dataset,
        "task": cell.task,
        "query": cell.query,
        "query_text": cell.query_text,
        "target": cell.target,
        "scorer": sweep.scores[0].scorer,
        "clips": len(sweep.clips),
        "clips_shared": len(shared_clips(sweep.scores)),
        "labels": len(sweep.labels) if cell.task == "classification" else None,
        "baselines": sweep.baselines,
        "cells": [_score_document(item) for item in sweep.scores],
        "other_models": [_score_document(item) for item in sweep.other_models],
        # The files have always called a metric a figure, and programs read them.
        "comparisons": [
            {"figure" if key == "metric" else key: value for key, value in asdict(comparison).items()}
            for comparison in sweep.comparisons
        ],
        "alpha_choices": [
            {"figure" if key == "metric" else key: value for key, value in asdict(choice).items()}
            for choice in sweep.choices
        ],
        "best_over_full_strength": {
            name: {
                "best_alpha": best.cell.alpha,
                "best": sweep.compared(name, best),
                "full": sweep.compared(name, full),
                "gain": gain,
            }
            for name, (best, full, gain) in gains.items()
        },
    }


def _score_document(item: Score) -> dict[str, Any]:
    return {
        "checkpoint": item.cell.checkpoint,
        "alpha": item.cell.alpha,
        "clips": len(item.ids),
        "figures": item.metrics,
        "intervals": item.intervals,
        "matching": item.matching,
    }
