"""Scores of a cell, from its predictions alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from mergekit_bio.errors import RunError
from mergekit_bio.eval.label_map import candidates, missing_names, target_text
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.scoring import captioning, classification, detection, following
from mergekit_bio.eval.scoring.matching import NO_LABEL, label_set
from mergekit_bio.eval.scoring.scorers import SCORERS
from mergekit_bio.eval.scoring.statistics import Statistic, bootstrap, percentile_interval
from mergekit_bio.outside_data import nearest

#: How an instruction's constraint fared, by whether it was kept strictly and loosely.
KEPT = {(True, True): "kept", (False, True): "kept loosely", (False, False): "not kept"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a scorer says about a cell.

    Attributes:
        ids: The clips, in the order of the following three.
        targets: The right answers; ``NO_TARGET`` where a label has no scientific name.
        answers: The labels that the predictions were matched with; where there is none, "None" of the published scorers
            and "" of the others. For captioning the captions themselves, for instructions one of ``KEPT``.
        correct: Whether they agree (all False for captioning).
        labels: What an answer could be (classification), or be made of (detection).
        intervals: 95% bootstrap interval of the metrics that have one.
        baselines: What majority and random answers get, named after the metric they belong to (classification).
        matching: How the texts met the labels (classification, scorers that go by edit distance).
        samples: The resampled values behind the intervals, float64 [resamples].
        indicators: Per-clip indicators, scipy CSR float64 [clips, columns].
        statistic: From sums of the indicators to the metrics with intervals.
    """

    cell: Cell
    scorer: str
    ids: tuple[str, ...]
    targets: tuple[str, ...]
    answers: tuple[str, ...]
    correct: tuple[bool, ...]
    labels: tuple[str, ...] = ()
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    matching: dict[str, float | None] = field(default_factory=dict)
    samples: dict[str, Any] = field(repr=False, default_factory=dict)
    indicators: Any = field(repr=False)
    statistic: Statistic = field(repr=False)
    notes: tuple[str, ...] = ()


def score(cell: Cell, *, scorer: str, labels: Sequence[str] = (), asked: Sequence[str] = (), seed: int = 0) -> Score:
    """Score a cell.

    Args:
        scorer: One of ``SCORERS``. Instructions are scored by ``constraint``, whatever is said here.
        labels: The labels of all clips that any cell of the sweep has, so that a cell with few clips is given no easier
            list to match with; by default those of the cell.
        asked: The closed list that any cell of the sweep was asked, as labels; by default that of the cell.
        seed: Of the bootstrap.

    Raises:
        RunError: There is no such scorer, or the cell holds no row or what it cannot score.
        RecipeError: No label has a scientific name, and the right answers are made of them.
    """
    # 1. Refuse what cannot be scored, and note what is not there yet.
    if scorer not in SCORERS:
        raise RunError(f"unknown scorer '{scorer}'{nearest(scorer, list(SCORERS))}")
    if not cell.predictions:
        raise RunError(f"{cell.path}: no prediction in it")
    if cell.task == "instructions":
        scorer = "constraint"
    elif SCORERS[scorer].match is None:
        raise RunError(f"{cell}: the scorer {scorer} is for instructions, this is {cell.task}; give another --scorer")
    notes = cell.notes
    if cell.rows is not None and len(cell.predictions) < cell.rows:
        notes = (*notes, f"{cell}: incomplete, {len(cell.predictions)} of {cell.rows} clips")

    # 2. Match the answers and compute the metrics, each task in its own way.
    of_task = {
        "classification": _classification,
        "detection": _detection,
        "captioning": _captioning,
        "instructions": _instructions,
    }[cell.task]
    scored = of_task(cell, scorer, labels or [row.label for row in cell.predictions], asked or cell.labels)

    # 3. Resample the clips: how sure the metrics are.
    samples = bootstrap(indicators=scored.indicators, statistic=scored.statistic, seed=seed)
    intervals = {name: percentile_interval(samples[name]) for name in samples if name in scored.metrics}
    return replace(scored, samples=samples, intervals=intervals, notes=(*notes, *scored.notes))


def _classification(cell: Cell, scorer: str, sweep_labels: Sequence[str], asked: Sequence[str]) -> Score:
    """One label a clip; see ``score`` for the arguments."""
    # 1. What is right, and what an answer may be: the labels, or the scientific names that stand for them.
    unlabelled = [row.id for row in cell.predictions if not row.label]
    if unlabelled:
        raise RunError(f"{cell.path}: the clip {unlabelled[0]!r} has no label")
    targets = [target_text(row.label, target=cell.target, names=cell.names) for row in cell.predictions]
    rules = SCORERS[scorer]
    closed = bool(asked) and rules.asked_labels
    labels = candidates(asked if closed else sweep_labels, target=cell.target, names=cell.names, where=str(cell.path))
    on_list = labels if closed else []

    # 2. From text to label, by the scorer's rules.
    assert rules.match is not None
    matched = rules.match([rules.clean(row, cell.dataset) for row in cell.predictions], labels)
    answers = matched.answers

    # 3. Two error breakdowns: the paper's, which reads an answer as a list of labels, and that of the matched labels.
    metrics = classification.metrics(targets=targets, answers=answers, asked=on_list)
    for suffix, texts in (("", matched.listed), ("_matched", answers)):
        rates = classification.error_rates(targets=targets, answers=texts, labels=labels)
        metrics[f"out_of_set{suffix}"], metrics[f"in_set_wrong{suffix}"] = rates

    # 4. What a reader must be told: labels without a name, a label that a scorer takes for "no label", and a closed
    #    list that is not what the clips have.
    where = f"{cell.run}, {cell.dataset}, query {cell.query}"
    notes = []
    if missing := missing_names(sweep_labels, target=cell.target, names=cell.names):
        notes.append(f"{where}: {missing}")
    if NO_LABEL in labels and rules.label_none:
        does = f"the scorer {scorer} {rules.label_none}"
        notes.append(f"{where}: '{NO_LABEL}' is a label here, and {does}; --scorer exact tells them apart")
    if unseen := sorted(set(asked) - set(sweep_labels)):
        says = _unseen_labels(scorer, asked=len(set(asked)), unseen=len(unseen), closed=closed)
        notes.append(f"{where}: {says}")
    on_list_mask = np.isin(classification.classes_of(targets, answers, labels), on_list) if closed else None
    return Score(
        cell=cell,
        scorer=scorer,
        ids=tuple(row.id for row in cell.predictions),
        targets=tuple(targets),
        answers=tuple(answers),
        correct=tuple(answer == target for answer, target in zip(answers, targets, strict=True)),
        labels=tuple(labels),
        metrics=metrics,
        baselines=classification.baselines(targets, on_list),
        matching=classification.match_counts(matches=matched.matches, targets=targets) if matched.matches else {},
        indicators=classification.indicators(targets=targets, answers=answers, listed=matched.listed, labels=labels),
        statistic=partial(classification.resampled_metrics, asked=on_list_mask),
        notes=tuple(notes),
    )


def _unseen_labels(scorer: str, *, asked: int, unseen: int, closed: bool) -> str:
    """What a reader must be told where the answer had to be one of a list with labels that no clip has."""
    clips_have = f"the clips here have {asked - unseen} of the {asked} labels that were asked"
    if closed:
        return f"{clips_have}; F1 macro is over all {asked}, and the others count 0 in it"
    return (
        f"{clips_have}; the scorer {scorer} takes an answer for one of those that they have (its published rule); "
        f"--scorer exact goes by all {asked}"
    )


def _detection(cell: Cell, scorer: str, sweep_labels: Sequence[str], asked: Sequence[str]) -> Score:
    """Any number of labels a clip; see ``score`` for the arguments."""
    targets = [label_set(row.label) for row in cell.predictions]
    if not any(targets):
        raise RunError(f"{cell.path}: no clip has a label other than None; detection needs one")
    # The published scorers match with the label texts as they stand, lists of several labels included.
    texts = SCORERS[scorer].match_lists([row.prediction for row in cell.predictions], sweep_labels)
    answers = [label_set(text) for text in texts]
    known = sorted(frozenset().union(*map(label_set, sweep_labels)))
    # The library's mAP depends on the order of the file.
    rows = {row.id: index for index, row in enumerate(cell.predictions)}
    written = [rows[row_id] for row_id in cell.order or rows]
    return Score(
        cell=cell,
        scorer=scorer,
        ids=tuple(row.id for row in cell.predictions),
        targets=tuple(", ".join(sorted(labels)) for labels in targets),
        answers=tuple(", ".join(sorted(labels)) for labels in answers),
        correct=tuple(answer == target for answer, target in zip(answers, targets, strict=True)),
        labels=tuple(known),
        metrics=detection.metrics(targets=[targets[row] for row in written], answers=[answers[row] for row in written]),
        indicators=detection.indicators(targets=targets, answers=answers, labels=known),
        statistic=detection.resampled_metrics,
    )


def _captioning(cell: Cell, scorer: str, sweep_labels: Sequence[str], asked: Sequence[str]) -> Score:
    """A sentence a clip; see ``score`` for the arguments."""
    # 1. A value for every clip and metric; SPICE only where its program is.
    references, captions = [row.label for row in cell.predictions], [row.prediction for row in cell.predictions]
    words = SCORERS[scorer].caption_words
    columns = {
        "cider": captioning.cider(
            references=[words(text) for text in references],
            captions=[words(text) for text in captions],
            documents=[words(text) for text in sweep_labels],
        )
    }
    missing = captioning.spice_missing()
    if not missing:
        columns["spice"] = captioning.spice(references=references, captions=captions)
        # beans-zero averages SPICE with CIDEr on the scale where a perfect caption has 1.
        columns["spider"] = [(first / 10 + second) / 2 for first, second in zip(*columns.values(), strict=True)]

    # 2. Every metric is a mean over clips: the last indicator counts them.
    def means(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {name: sums[:, index] / sums[:, -1] for index, name in enumerate(columns)}

    return Score(
        cell=cell,
        scorer=scorer,
        ids=tuple(row.id for row in cell.predictions),
        targets=tuple(references),
        answers=tuple(captions),
        correct=(False,) * len(captions),
        metrics={name: float(np.mean(column)) for name, column in columns.items()},
        indicators=csr_matrix(np.array([*columns.values(), np.ones(len(captions))]).T),
        statistic=means,
        notes=(f"{missing}; left out",) if missing else (),
    )


def _instructions(cell: Cell, scorer: str, sweep_labels: Sequence[str], asked: Sequence[str]) -> Score:
    """A constraint a prompt, as its label; see ``score`` for the arguments."""
    follows = SCORERS[scorer].follows
    assert follows is not None
    constraints = [row.label for row in cell.predictions]
    try:
        kept = [follows(row.prediction, row.label) for row in cell.predictions]
        groups = following.groups_of(sweep_labels)
    except ValueError as error:
        raise RunError(f"{cell.path}: {error}") from None
    heard = [row.audio is not None for row in cell.predictions]
    indicators = following.indicators(kept=kept, constraints=constraints, heard=heard, groups=groups)
    statistic = partial(following.resampled_metrics, groups=groups)
    shares = {name: float(values[0]) for name, values in statistic(indicators.sum(axis=0).A).items()}
    return Score(
        cell=cell,
        scorer=scorer,
        ids=tuple(row.id for row in cell.predictions),
        targets=tuple(constraints),
        answers=tuple(KEPT[verdict] for verdict in kept),
        correct=tuple(strict for strict, _ in kept),
        metrics={name: share for name, share in shares.items() if not np.isnan(share)},
        indicators=indicators,
        statistic=statistic,
    )
