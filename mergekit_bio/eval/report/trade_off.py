"""What a task's score costs in instructions kept: both at every alpha."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mergekit_bio.eval.scoring.score import Score

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


def trade_offs(sweeps: "Sequence[Sweep]") -> Iterator[TradeOff]:
    """Every task's sweep over alpha against every sweep of instructions over the same alphas.

    In a report without instructions what is kept is a task's closed list, where it was asked one and free to leave it.
    """
    over_alpha = [sweep for sweep in sweeps if sweep.by_alpha]
    instructions = [sweep for sweep in over_alpha if sweep.cell.task == "instructions"]
    for task in over_alpha:
        if task.cell.task == "instructions":
            continue
        free = task.asked and task.cell.identity.get("decoding", "generate") == "generate"
        for kept in instructions or ([task] if free else []):
            metric = task.main_metrics[0]
            by_alpha = {item.cell.alpha: item for item in kept.scores}
            pairs = [(item, by_alpha[item.cell.alpha]) for item in task.scores if item.cell.alpha in by_alpha]
            points = [_point(metric, *pair) for pair in pairs if _may_be_one_model(*pair)]
            if len(points) > 1:
                yield TradeOff(task=task, metric=metric, kept=kept, points=tuple(points))


def _may_be_one_model(first: Score, second: Score) -> bool:
    """Whether nothing says that two cells of one alpha are of checkpoints that were merged from other sources."""
    sources = [item.cell.identity.get("checkpoint", {}).get("merged_from") for item in (first, second)]
    return None in sources or sources[0] == sources[1]


def _point(metric: str, task: Score, kept: Score) -> Point:
    assert task.cell.alpha is not None
    if kept is task:
        left_low, left_high = task.intervals["out_of_set"]
        share, low, high = 1 - task.metrics["out_of_set"], 1 - left_high, 1 - left_low
    else:
        share, (low, high) = kept.metrics["strict"], kept.intervals["strict"]
    return Point(
        alpha=task.cell.alpha,
        score=task.metrics[metric],
        low=task.intervals[metric][0],
        high=task.intervals[metric][1],
        kept=share,
        kept_low=low,
        kept_high=high,
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
