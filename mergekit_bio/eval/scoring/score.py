"""Scores of a cell, from its predictions alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_bio.errors import RunError
from mergekit_bio.eval.label_map import candidates, missing_names, target_text
from mergekit_bio.eval.records.cells import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.scoring import captioning, classification, detection
from mergekit_bio.eval.scoring.matching import (
    END_OF_TEXT,
    MAX_EDITS,
    NO_LABEL,
    NO_MATCH,
    SCORERS,
    birds_counted,
    clean_as_paper,
    match_exactly,
    match_lists,
    nearest_labels,
)
from mergekit_bio.eval.scoring.statistics import Statistic, bootstrap, percentile_interval
from mergekit_bio.outside_data import nearest


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a scorer says about a cell.

    Attributes:
        scorer: Its name.
        ids: The clips, in the order of the following three.
        targets: The right answers; ``NO_TARGET`` where a label has no scientific name.
        answers: The labels that the predictions were matched with; where there is none, "None" of the published scorers
            and "" of the others. For captioning the captions themselves.
        correct: Whether they agree (all False for captioning).
        figures: Name -> value.
        intervals: 95% bootstrap interval of the figures that have one.
        baselines: What majority and random answers get, named after the figure they belong to (classification).
        matching: How the texts met the labels (scorers ``paper`` and ``beans-zero``, classification).
        samples: The resampled values behind the intervals, float64 [resamples].
        indicators: Per-clip indicators, scipy CSR float64 [clips, columns].
        statistic: From sums of the indicators to the figures with intervals.
        notes: What a reader of the figures must be told.
    """

    cell: Cell
    scorer: str
    ids: tuple[str, ...]
    targets: tuple[str, ...]
    answers: tuple[str, ...]
    correct: tuple[bool, ...]
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    baselines: dict[str, float] = field(default_factory=dict)
    matching: dict[str, float | None] = field(default_factory=dict)
    samples: dict[str, Any] = field(repr=False)
    indicators: Any = field(repr=False)
    statistic: Statistic = field(repr=False)
    notes: tuple[str, ...] = ()


def score(cell: Cell, *, scorer: str, labels: Sequence[str] = (), seed: int = 0) -> Score:
    """Score a cell.

    Args:
        cell: Its predictions and what they should be.
        scorer: One of ``SCORERS``.
        labels: The labels of all clips that any cell of the sweep has, so that a cell with few clips is given no easier
            list to match with; by default those of the cell.
        seed: Of the bootstrap.

    Raises:
        RunError: There is no such scorer, or the cell holds no row or what it cannot score.
        RecipeError: No label has a scientific name, and the right answers are made of them.
    """
    if scorer not in SCORERS:
        raise RunError(f"unknown scorer '{scorer}'{nearest(scorer, list(SCORERS))}")
    if not cell.rows:
        raise RunError(f"{cell.file}: no prediction in it")
    notes = cell.notes
    if cell.expected_rows is not None and len(cell.rows) < cell.expected_rows:
        notes = (*notes, f"{cell}: incomplete, {len(cell.rows)} of {cell.expected_rows} clips")
    scored = {"classification": _classification, "detection": _detection, "captioning": _captioning}[cell.task]
    return scored(cell, scorer, labels or [row.label for row in cell.rows], seed, notes)


#: What the published scorers do to a label "None".
_AS_NONE = {
    "paper": "counts every answer without a label as it",
    "beans-zero": "counts every answer without a label as it in the error breakdown",
}


def _classification(cell: Cell, scorer: str, sweep_labels: Sequence[str], seed: int, notes: tuple[str, ...]) -> Score:
    unlabelled = [row.id for row in cell.rows if not row.label]
    if unlabelled:
        raise RunError(f"{cell.file}: the clip {unlabelled[0]!r} has no label")
    targets = [target_text(row.label, target=cell.target, names=cell.names) for row in cell.rows]
    labels = candidates(sweep_labels, target=cell.target, names=cell.names, where=str(cell.file))
    where = f"{cell.run}, {cell.dataset}, query {cell.query}"
    missing = missing_names(sweep_labels, target=cell.target, names=cell.names)
    if missing:
        notes = (*notes, f"{where}: {missing}")
    if NO_LABEL in labels and scorer in _AS_NONE:
        does = f"the scorer {scorer} {_AS_NONE[scorer]}"
        notes = (*notes, f"{where}: '{NO_LABEL}' is a label here, and {does}; --scorer exact tells them apart")
    texts = [birds_counted(row.prediction) if cell.dataset == "zf-indiv" else row.prediction for row in cell.rows]
    if scorer == "paper":
        texts = [clean_as_paper(text, cell.dataset) for text in texts]
    matching: dict[str, float | None] = {}
    if scorer in ("paper", "beans-zero"):
        matches = nearest_labels(texts, labels)
        matching = classification.match_counts(matches=matches, targets=targets)
        listed = match_lists(texts, labels)
        answers = [match.within(MAX_EDITS) if scorer == "paper" else match.nearest[0] for match in matches]
    else:
        answers = listed = [_chosen(text, row, scorer, labels) for text, row in zip(texts, cell.rows, strict=True)]
    figures = classification.figures(targets=targets, answers=answers)
    figures["out_of_set"], figures["in_set_wrong"] = classification.error_rates(
        targets=targets, answers=listed, labels=labels
    )
    figures["out_of_set_matched"], figures["in_set_wrong_matched"] = classification.error_rates(
        targets=targets, answers=answers, labels=labels
    )
    return _score(
        cell=cell,
        scorer=scorer,
        seed=seed,
        notes=notes,
        targets=targets,
        answers=answers,
        correct=[answer == target for answer, target in zip(answers, targets, strict=True)],
        figures=figures,
        baselines=classification.baselines(targets),
        matching=matching,
        indicators=classification.indicators(targets=targets, answers=answers, listed=listed, labels=labels),
        statistic=classification.resampled_figures,
    )


def _chosen(text: str, row: Prediction, scorer: str, labels: Sequence[str]) -> str:
    if scorer == "exact":
        return match_exactly(text, labels)
    if row.choice_logprobs:
        text = max(sorted(row.choice_logprobs), key=row.choice_logprobs.__getitem__)
    text = text.split(END_OF_TEXT)[0]
    return text if text in labels else NO_MATCH


def _detection(cell: Cell, scorer: str, sweep_labels: Sequence[str], seed: int, notes: tuple[str, ...]) -> Score:
    targets = [detection.label_set(row.label) for row in cell.rows]
    if not any(targets):
        raise RunError(f"{cell.file}: no clip has a label other than None; detection needs one")
    if scorer in ("paper", "beans-zero"):
        # As beans-zero: the candidates are the label texts as they stand, lists of several labels included.
        texts = match_lists([row.prediction for row in cell.rows], sweep_labels)
    else:
        known = sorted(frozenset().union(*map(detection.label_set, sweep_labels)))
        texts = [", ".join(match_exactly(part, known) for part in row.prediction.split(",")) for row in cell.rows]
    answers = [detection.label_set(text) for text in texts]
    return _score(
        cell=cell,
        scorer=scorer,
        seed=seed,
        notes=notes,
        targets=[", ".join(sorted(labels)) for labels in targets],
        answers=[", ".join(sorted(labels)) for labels in answers],
        correct=[answer == target for answer, target in zip(answers, targets, strict=True)],
        figures=detection.figures(targets=targets, answers=answers),
        indicators=detection.indicators(targets=targets, answers=answers),
        statistic=detection.resampled_figures,
    )


def _captioning(cell: Cell, scorer: str, sweep_labels: Sequence[str], seed: int, notes: tuple[str, ...]) -> Score:
    import numpy as np
    from scipy.sparse import csr_matrix

    references, captions = [row.label for row in cell.rows], [row.prediction for row in cell.rows]
    plain = scorer not in ("paper", "beans-zero")
    columns = {
        "cider": captioning.cider(
            references=[captioning.words(text, plain=plain) for text in references],
            captions=[captioning.words(text, plain=plain) for text in captions],
            documents=[captioning.words(text, plain=plain) for text in sweep_labels],
        )
    }
    missing = captioning.spice_missing()
    if missing:
        notes = (*notes, f"{missing}; left out")
    else:
        columns["spice"] = captioning.spice(references=references, captions=captions)
        # beans-zero averages SPICE with CIDEr on the scale where a perfect caption has 1.
        columns["spider"] = [(first / 10 + second) / 2 for first, second in zip(*columns.values(), strict=True)]
    values = np.array([*columns.values(), np.ones(len(captions))]).T

    def means(sums: "np.ndarray") -> dict[str, "np.ndarray"]:
        return {name: sums[:, index] / sums[:, -1] for index, name in enumerate(columns)}

    return _score(
        cell=cell,
        scorer=scorer,
        seed=seed,
        notes=notes,
        targets=references,
        answers=captions,
        correct=[False] * len(captions),
        figures={name: float(np.mean(column)) for name, column in columns.items()},
        indicators=csr_matrix(values),
        statistic=means,
    )


def _score(
    *,
    cell: Cell,
    seed: int,
    targets: Sequence[str],
    answers: Sequence[str],
    correct: Sequence[bool],
    indicators: Any,
    statistic: Statistic,
    **rest: Any,
) -> Score:
    """Add what all tasks share: the ids and the intervals."""
    samples = bootstrap(indicators=indicators, statistic=statistic, seed=seed)
    return Score(
        cell=cell,
        ids=tuple(row.id for row in cell.rows),
        targets=tuple(targets),
        answers=tuple(answers),
        correct=tuple(correct),
        intervals={name: percentile_interval(values) for name, values in samples.items()},
        samples=samples,
        indicators=indicators,
        statistic=statistic,
        **rest,
    )
