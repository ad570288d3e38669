import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_matrix
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from mergekit_bio.eval.scoring import classification, detection
from mergekit_bio.eval.scoring.statistics import (
    SWAPS,
    PValue,
    bootstrap,
    holm,
    holm_adjusted,
    mcnemar_exact,
    paired_randomisation,
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


LABELS = ("a", "b", "c")
SKLEARN = {
    "accuracy": accuracy_score,
    "f1_weighted": lambda true, said: f1_score(true, said, average="weighted", zero_division=0),
    "f1_macro": lambda true, said: f1_score(true, said, average="macro", zero_division=0),
}


def swapping(targets, first, second):
    """The p-values of all metrics of two cells' answers."""
    cells = (
        classification.indicators(targets=targets, answers=answers, listed=answers, labels=LABELS)
        for answers in (first, second)
    )
    return paired_randomisation(*cells, classification.resampled_metrics)


@settings(max_examples=15)
@given(st.lists(st.tuples(TARGETS, ANSWERS, ANSWERS), min_size=1, max_size=5))
def test_a_paired_p_value_is_the_share_of_all_swaps_that_differ_as_much(clips):
    targets, first, second = zip(*clips, strict=True)
    ours = swapping(targets, first, second)
    for name, metric in SKLEARN.items():
        seen = abs(metric(targets, first) - metric(targets, second))
        beyond = 0
        for swaps in itertools.product((False, True), repeat=len(clips)):
            pairs = [(b, a) if swap else (a, b) for swap, a, b in zip(swaps, first, second, strict=True)]
            left, right = zip(*pairs, strict=True)
            beyond += abs(metric(targets, left) - metric(targets, right)) >= seen - 1e-12
        assert ours[name] == PValue(beyond / 2 ** len(clips)), name


def test_a_paired_p_value_is_scipys():
    generator = np.random.default_rng(5)
    targets, first, second = (generator.choice(LABELS, 8) for _ in range(3))
    second[:6] = targets[:6]

    def difference(left, right):
        codes = np.array(LABELS)
        return SKLEARN["f1_macro"](targets, codes[left.astype(int)]) - SKLEARN["f1_macro"](
            targets, codes[right.astype(int)]
        )

    codes = [np.searchsorted(LABELS, answers) for answers in (first, second)]
    scipys = stats.permutation_test(codes, difference, permutation_type="samples", n_resamples=np.inf, vectorized=False)
    assert swapping(targets, first, second)["f1_macro"].value == pytest.approx(scipys.pvalue)


def test_swaps_that_are_drawn_come_near_to_scipys_and_state_a_bound_where_none_differs_as_much():
    generator = np.random.default_rng(2)
    targets = generator.choice(LABELS, 60)
    first = np.where(generator.random(60) < 0.6, targets, generator.choice(LABELS, 60))
    second = np.where(generator.random(60) < 0.3, targets, generator.choice(LABELS, 60))
    right = [(answers == targets).astype(float) for answers in (first, second)]
    scipys = stats.permutation_test(
        right, lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis), permutation_type="samples", n_resamples=20_000,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    ours = swapping(targets, first, second)["accuracy"]
    assert 0.01 < scipys.pvalue < 0.5 and not ours.at_most
    # Four standard errors of the difference of two shares.
    assert ours.value == pytest.approx(scipys.pvalue, abs=4 * math.sqrt(scipys.pvalue * (1 / 20_000 + 1 / SWAPS)))
    clear = swapping(np.repeat(LABELS, 20), np.repeat(LABELS, 20), np.repeat(["b", "c", "a"], 20))
    assert clear["f1_macro"] == PValue(1 / (SWAPS + 1), at_most=True)


@pytest.mark.parametrize("clips", [1, 2, 3, 6, 10])
def test_no_paired_p_value_goes_below_what_so_many_clips_allow(clips):
    p = swapping(["a"] * clips, ["a"] * clips, ["b"] * clips)
    assert p["f1_macro"] == p["accuracy"] == PValue(2 / 2**clips)
    assert p["accuracy"].value == pytest.approx(mcnemar_exact(only_first=clips, only_second=0))


def test_equal_answers_are_told_apart_no_more_often_than_the_level_says():
    generator = np.random.default_rng(0)
    runs, false = 400, dict.fromkeys(("f1_weighted", "f1_macro"), 0)
    for number in range(runs):
        targets, first, second = (generator.choice(LABELS, 6 + number % 7) for _ in range(3))
        p_values = swapping(targets, first, second)
        for name in false:
            false[name] += p_values[name].value <= 0.05
    # Of a test that holds its level so many false alarms are as rare as one in a thousand.
    for name, alarms in false.items():
        assert alarms <= stats.binom.isf(0.001, runs, 0.05), name
        assert alarms > 0, name


def test_an_adjusted_p_value_is_a_bound_where_a_bound_raised_it():
    floor = PValue(1e-4, at_most=True)
    assert holm_adjusted([PValue(0.0002), floor, PValue(0.3), floor]) == [
        PValue(pytest.approx(4e-4), at_most=True), PValue(pytest.approx(4e-4), at_most=True), PValue(0.3),
        PValue(pytest.approx(4e-4), at_most=True),
    ]  # fmt: skip


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
