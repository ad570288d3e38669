"""Beam search and closed lists, against brute force over every sequence of a small language."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bio.engine.decoding.beams import BeamSearch
from mergekit_bio.engine.decoding.labels import build_trie, choose, log_sum_exp, longest_label, score_labels
from mergekit_bio.engine.interface import Decoding
from mergekit_bio.engine.sweep import _layer_order, _with_fused
from mergekit_bio.errors import EngineError

WORDS, END = 3, 0


class Language:
    """Next-token log-probabilities that depend on everything before, the same every time."""

    def __init__(self, seed: int, words: int = WORDS) -> None:
        self._seed, self._words = seed, words

    def __call__(self, tokens: tuple[int, ...]) -> list[float]:
        logits = [
            math.sin(self._seed + 7.3 * n + sum((k + 1.7) * (t + 1) * 3.1 for k, t in enumerate(tokens))) * 2
            for n in range(self._words)
        ]
        total = log_sum_exp(logits)
        return [logit - total for logit in logits]

    def logprob(self, tokens) -> float:
        return sum(self(tuple(tokens[:n]))[token] for n, token in enumerate(tokens))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_beams_as_wide_as_the_language_find_its_best_sentence(seed, penalty):
    language, length = Language(seed), 4
    search = BeamSearch(
        num_beams=81, max_new_tokens=length, eos_token_ids=[END], length_penalty=penalty, early_stopping="never"
    )
    while not search.done:
        search.advance([list(enumerate(language(beam.token_ids))) for beam in search.running])
    sentences = [
        tokens
        for n in range(1, length + 1)
        for tokens in itertools.product(range(WORDS), repeat=n)
        if END not in tokens[:-1] and (tokens[-1] == END or n == length)
    ]
    best = max(sentences, key=lambda tokens: language.logprob(tokens) / len(tokens) ** penalty)
    assert search.finished[0].token_ids == best
    assert search.finished[0].score == pytest.approx(language.logprob(best) / len(best) ** penalty)


def test_early_stopping_ends_with_the_first_full_set():
    search = BeamSearch(num_beams=1, max_new_tokens=5, eos_token_ids=[END], early_stopping=True)
    search.advance([[(END, -0.1), (1, -5.0)]])
    assert search.done and search.finished[0].token_ids == (END,)


LABELS = ["ab", "a", "abc", "ba", "c"]


def encode(label: str) -> list[int]:
    return ["#abc".index(letter) for letter in label]


class Asked:
    """Answers queries of a language, and remembers them."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self.places: list[tuple[int, ...]] = []

    def __call__(self, queries):
        self.places += [query.tokens for query in queries]
        return [[self._language(query.tokens)[token] for token in query.candidates] for query in queries]


def whole_answer(language: Language, label: str, ends: list[int]) -> float:
    """How likely the label is as an answer, whichever end token it ends with; without one, how likely it begins."""
    tokens = encode(label)
    ways = [math.exp(language.logprob([*tokens, end])) for end in ends] or [math.exp(language.logprob(tokens))]
    return math.log(sum(ways))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([[0], [0, 4], []]))
def test_label_scores_are_those_of_whole_answers_over_all_end_tokens(seed, ends):
    language, asked = Language(seed, words=5), Asked(Language(seed, words=5))
    root = build_trie(LABELS, encode)
    (scores,) = score_labels(root, LABELS, prompts=1, eos_token_ids=ends, next_logprobs=asked)
    assert list(scores) == LABELS
    assert scores == pytest.approx({label: whole_answer(language, label, ends) for label in LABELS})
    assert len(asked.places) == len(set(asked.places))  # what labels share is asked once


MANY = ["".join(letters) for n in range(1, 6) for letters in itertools.product("abc", repeat=n)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.lists(st.sampled_from(MANY), unique=True, min_size=1), st.sampled_from([1e-3, 0.2]))
def test_labels_that_are_left_out_are_together_negligible(seed, labels, negligible):
    language, asked = Language(seed, words=5), Asked(Language(seed, words=5))
    root = build_trie(labels, encode)
    (scores,) = score_labels(root, labels, prompts=1, eos_token_ids=[0, 4], next_logprobs=asked, negligible=negligible)
    exact = {label: whole_answer(language, label, [0, 4]) for label in labels}
    scored = {label: score for label, score in scores.items() if score > -math.inf}
    assert scored == pytest.approx({label: exact[label] for label in scored})
    total = sum(map(math.exp, exact.values()))
    assert sum(math.exp(exact[label]) for label in labels if label not in scored) < negligible * total
    assert len(asked.places) == len(set(asked.places))


def test_a_likely_label_among_many_is_found_in_a_few_questions():
    class Sure(Language):
        """Says "cabca" and ends."""

        def __call__(self, tokens):
            said = encode("cabca")
            sure = said[len(tokens)] if tokens == tuple(said[: len(tokens)]) and len(tokens) < 5 else END
            return [math.log(0.97 if token == sure else 0.01) for token in range(4)]

    asked = Asked(Sure(0))
    (scores,) = score_labels(
        build_trie(MANY, encode), MANY, prompts=1, eos_token_ids=[END], next_logprobs=asked, negligible=0.05
    )
    assert max(scores, key=scores.get) == "cabca"
    assert len(MANY) == 363 and len(asked.places) < 40


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_a_choice_takes_the_likeliest_allowed_step(seed):
    language = Language(seed, words=4)

    def next_logprobs(queries):
        return [[language(tokens)[token] for token in options] for _, tokens, options in queries]

    (choice,) = choose(build_trie(LABELS, encode), prompts=1, eos_token_ids=[END], next_logprobs=next_logprobs)
    sofar, logprob = "", 0.0
    while True:
        options = {label[len(sofar)] for label in LABELS if label.startswith(sofar) and len(label) > len(sofar)}
        weights = {letter: language(tuple(encode(sofar)))[encode(letter)[0]] for letter in options}
        if sofar in LABELS:
            weights["#"] = language(tuple(encode(sofar)))[END]
        best = max(weights, key=weights.get)
        logprob += weights[best] - log_sum_exp(list(weights.values())) if len(weights) > 1 else 0.0
        if best == "#":
            break
        sofar += best
        if not any(label.startswith(sofar) and label != sofar for label in LABELS):
            break
    assert choice.label == sofar and list(choice.node.tokens) == encode(sofar)
    assert sum(choice.logprobs) == pytest.approx(logprob)


def test_a_label_may_be_longer_than_pythons_stack():
    label = "abc" * 2000
    root = build_trie([label, label[:-1]], encode)
    assert longest_label(root) == len(label) and [node.depth for node in root.all()] == list(range(len(label) + 1))
    *_, last = root.all()
    assert last.label == label and list(last.tokens) == encode(label)


@pytest.mark.parametrize(("labels", "message"), [([], "empty"), (["a", ""], "empty"), (["a", "b", "a"], "twice")])
def test_bad_lists_are_refused(labels, message):
    with pytest.raises(EngineError, match=message):
        build_trie(labels, encode)


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"num_beams": 0}, {"temperature": -1.0}, {"num_beams": 2, "temperature": 0.5}],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(EngineError):
        Decoding(**settings)


def test_fused_parameters_are_replaced_whole():
    names = _with_fused(
        {"model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    )
    assert sorted(names, key=_layer_order) == [
        "lm_head.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    ]
