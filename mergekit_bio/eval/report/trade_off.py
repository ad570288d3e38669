"""What a task's score costs in instructions kept: both at every alpha."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from mergekit_bio.eval.label_map import candidates
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.report.comparison import aligned, shared_clips
from mergekit_bio.eval.scoring.matching import match_exactly
from mergekit_bio.eval.scoring.statistics import Statistic, bootstrap, percentile_interval

if TYPE_CHECKING:
    from mergekit_bio.eval.report.build import Sweep


@dataclass(frozen=True, kw_only=True)
class Point:
    """One alpha, each share with its 95% interval.

    Attributes:
        score: The task's metric.
        kept: The share of instructions kept.
    """

    alpha: float
    score: float
    low: float
    high: float
    kept: float
    kept_low: float
    kept_high: float


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """A task against what was kept.

    Attributes:
        task: The task's sweep, by the metric ``metric``.
        kept: The instructions' sweep; or the task's own, where what is kept is the closed list that it was asked.
        points: In the order of alpha, two at least.
    """

    task: "Sweep"
    metric: str
    kept: "Sweep"
    points: tuple[Point, ...]

    @property
    def title(self) -> str:
        """What is set against what."""
        return self.task.title if self.kept is self.task else f"{self.task.title}, and {self.kept.title}"

    @property
    def kept_title(self) -> str:
        """What the share kept is a share of."""
        return "answers on the list" if self.kept is self.task else "instructions kept, strict"


@dataclass(frozen=True)
class _Share:
    """A metric of one cell with its interval."""

    value: float
    low: float
    high: float


def trade_offs(sweeps: "Sequence[Sweep]") -> Iterator[TradeOff]:
    """Every task's sweep over alpha against every sweep of instructions over the same alphas.

    In a report without instructions what is kept is a classification's closed list, where it was asked one and free to
    leave it. As in all comparisons, the points of a sweep are over the clips or prompts that all its cells have.
    """
    over_alpha = [sweep for sweep in sweeps if sweep.by_alpha and shared_clips(sweep.scores)]
    instructions = [sweep for sweep in over_alpha if sweep.cell.task == "instructions"]
    for task in over_alpha:
        if task.cell.task == "instructions":
            continue
        asked_a_list = task.cell.task == "classification" and task.asked
        free = asked_a_list and task.cell.identity.get("decoding", "generate") == "generate"
        for kept in instructions or ([task] if free else []):
            metric = task.main_metrics[0]
            scores = _over_shared_clips(task, metric)
            shares = _on_the_list(task) if kept is task else _over_shared_clips(kept, "strict")
            points = [
                _point(alpha, score, shares[alpha])
                for alpha, score in scores.items()
                if alpha in shares and _may_be_one_model(_cell(task, alpha), _cell(kept, alpha))
            ]
            if len(points) > 1:
                yield TradeOff(task=task, metric=metric, kept=kept, points=tuple(points))


def _cell(sweep: "Sweep", alpha: float) -> Cell:
    return next(item.cell for item in sweep.scores if item.cell.alpha == alpha)


def _may_be_one_model(first: Cell, second: Cell) -> bool:
    """Whether nothing says that two cells of one alpha are of checkpoints that were merged from other sources."""
    sources = [cell.identity.get("checkpoint", {}).get("merged_from") for cell in (first, second)]
    return None in sources or sources[0] == sources[1]


def _over_shared_clips(sweep: "Sweep", metric: str) -> dict[float, _Share]:
    """Alpha -> the metric over the clips that all cells of the sweep have."""
    if sweep.same_clips:
        return {item.cell.alpha or 0.0: _Share(item.metrics[metric], *item.intervals[metric]) for item in sweep.scores}
    _, _, indicators = aligned(sweep.scores)
    return {
        item.cell.alpha or 0.0: _resampled(part, item.statistic, metric)
        for item, part in zip(sweep.scores, indicators, strict=True)
    }


def _on_the_list(sweep: "Sweep") -> dict[float, _Share]:
    """Alpha -> the share of answers that are one of the list that was asked, read as ``exact`` reads them.

    The scorer of the task may go by another list, and by likeness.
    """
    shared = shared_clips(sweep.scores)
    listed = candidates(sweep.asked, target=sweep.cell.target, names=sweep.cell.names, where=sweep.title)
    shares = {}
    for item in sweep.scores:
        texts = [row.prediction for row in item.cell.predictions if row.id in shared]
        kept = np.array([bool(match_exactly(text, listed)) for text in texts], dtype=np.float64)
        columns = csr_matrix(np.stack([kept, np.ones(len(kept))], axis=1))
        shares[item.cell.alpha or 0.0] = _resampled(columns, lambda sums: {"kept": sums[:, 0] / sums[:, 1]}, "kept")
    return shares


def _resampled(indicators: Any, statistic: Statistic, metric: str) -> _Share:
    value = float(statistic(np.asarray(indicators.sum(axis=0)).reshape(1, -1))[metric][0])
    return _Share(value, *percentile_interval(bootstrap(indicators=indicators, statistic=statistic)[metric]))


def _point(alpha: float, score: _Share, kept: _Share) -> Point:
    return Point(
        alpha=alpha,
        score=score.value,
        low=score.low,
        high=score.high,
        kept=kept.value,
        kept_low=kept.low,
        kept_high=kept.high,
    )


def trade_off_document(trade_off: TradeOff) -> dict[str, Any]:
    """A trade-off as JSON-serialisable values."""
    sweeps = {"task": trade_off.task, "kept": trade_off.kept}
    named = {
        name: {"run": sweep.cell.run, "dataset": sweep.cell.dataset, "query": sweep.cell.query}
        for name, sweep in sweeps.items()
    }
    figures = {"figure": trade_off.metric, "kept_figure": "in_set" if trade_off.kept is trade_off.task else "strict"}
    return {**named, **figures, "points": [asdict(point) for point in trade_off.points]}
