import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from mergekit_bio.eval.scoring import classification, detection
from mergekit_bio.eval.scoring.statistics import (
    bootstrap,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    percentile_interval,
    plateau,
)

ANSWERS = st.sampled_from(["a", "b", "c", "None"])
TARGETS = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.tuples(TARGETS, ANSWERS), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_figures_of_a_resample_are_scikit_learns_of_the_resampled_clips(clips, random):
    targets, answers = zip(*clips, strict=True)
    drawn = [random.randrange(len(clips)) for _ in clips]
    weights = np.bincount(drawn, minlength=len(clips)).astype(float)[None]
    matrix = classification.indicators(targets=targets, answers=answers, listed=answers, labels=targets)
    ours = classification.resampled_metrics(weights @ matrix)
    true, answered = [targets[i] for i in drawn], [answers[i] for i in drawn]
    options = {"zero_division": 0}
    assert ours["accuracy"][0] == pytest.approx(accuracy_score(true, answered))
    assert ours["f1_weighted"][0] == pytest.approx(f1_score(true, answered, average="weighted", **options))
    assert ours["f1_macro"][0] == pytest.approx(f1_score(true, answered, average="macro", **options))
    assert ours["f1_macro_true"][0] == pytest.approx(
        f1_score(true, answered, average="macro", labels=sorted(set(true)), **options)
    )
    assert ours["out_of_set"][0] == pytest.approx(np.mean([text not in set(targets) for text in answered]))


SETS = st.frozensets(st.sampled_from("abc"))


@given(st.lists(st.tuples(SETS, SETS), min_size=2, max_size=12).filter(lambda rows: any(row[0] for row in rows)))
def test_detection_figures_are_scikit_learns_label_by_label(rows):
    targets, answers = zip(*rows, strict=True)
    labels = sorted(frozenset().union(*targets))
    true = np.array([[label in row for label in labels] for row in targets])
    answered = np.array([[label in row for label in labels] for row in answers])
    ours = detection.metrics(targets=targets, answers=answers)
    assert ours["map"] == pytest.approx(average_precision_score(true, answered.astype(float), average="macro"))
    by_label = [f1_score(true[:, k], answered[:, k], zero_division=0) for k in range(len(labels))]
    assert ours["f1_macro"] == pytest.approx(np.mean(by_label))


def mean(sums):
    return {"mean": sums[:, 0] / sums[:, 1]}


def test_the_interval_of_a_share_is_the_normal_approximation_at_many_clips():
    hits = np.array([1.0] * 1200 + [0.0] * 2800)
    samples = bootstrap(indicators=csr_matrix(np.c_[hits, np.ones_like(hits)]), statistic=mean, seed=1)
    low, high = percentile_interval(samples["mean"])
    half = 1.96 * math.sqrt(0.3 * 0.7 / 4000)
    assert low == pytest.approx(0.3 - half, abs=0.002)
    assert high == pytest.approx(0.3 + half, abs=0.002)


def test_the_same_seed_resamples_alike_and_another_does_not():
    matrix = csr_matrix(np.c_[np.arange(50.0), np.ones(50)])
    first, again, other = (bootstrap(indicators=matrix, statistic=mean, seed=seed)["mean"] for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_many_clips_are_resampled_in_parts_without_changing_their_number():
    clips = 300_000
    matrix = csr_matrix(np.ones((clips, 1)))
    sums = bootstrap(indicators=matrix, statistic=lambda sums: {"clips": sums[:, 0]}, resamples=20)["clips"]
    assert (sums == clips).all() and len(sums) == 20


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_sum(first, second):
    total = first + second
    tail = sum(math.comb(total, k) for k in range(min(first, second) + 1)) / 2**total
    assert mcnemar_exact(only_first=first, only_second=second) == pytest.approx(min(1.0, 2 * tail) if total else 1.0)


def test_the_paired_bootstrap_sees_a_difference_that_unpaired_intervals_hide():
    generator = np.random.default_rng(0)
    hard = generator.random(300)
    first, second = (hard > 0.50).astype(float), (hard > 0.46).astype(float)
    samples = [
        bootstrap(indicators=csr_matrix(np.c_[x, np.ones(300)]), statistic=mean)["mean"] for x in (first, second)
    ]
    assert percentile_interval(samples[0])[1] > percentile_interval(samples[1])[0]
    low, _, p = paired_bootstrap(*samples)
    assert low > 0 and p < 0.01


def test_equal_cells_are_not_told_apart():
    samples = np.random.default_rng(0).random(500)
    assert paired_bootstrap(samples, samples) == (0.0, 0.0, 1.0)


def test_holm_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("values", "p", "stretch"),
    [
        ([0.1, 0.4, 0.5, 0.4, 0.1], [0.001, 0.2, 1.0, 0.049, 0.5], (1, 2)),
        ([0.5, 0.4], [1.0, 0.9], (0, 1)),
        ([0.1, 0.5], [0.01, 0.0], (1, 1)),
    ],
)
def test_a_plateau_is_unbroken_around_the_best(values, p, stretch):
    assert plateau(values, p) == stretch
