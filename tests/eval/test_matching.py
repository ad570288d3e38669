import unicodedata

import pytest
from eval.beans_zero_tool import edits
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.scoring.matching import birds_counted, match_exactly, match_lists, nearest_labels, normalised
from mergekit_bio.eval.scoring.scorers import SCORERS

WORDS = st.text("abcN ", max_size=8)


@given(st.lists(WORDS, max_size=5), st.lists(WORDS, min_size=1, max_size=5))
def test_the_nearest_labels_are_those_of_the_recurrence_in_sorted_order(texts, labels):
    for text, match in zip(texts, nearest_labels(texts, labels), strict=True):
        distances = {label: edits(text, label) for label in sorted(set(labels))}
        assert match.edits == min(distances.values())
        assert list(match.nearest) == [label for label, distance in distances.items() if distance == match.edits]


def test_text_after_the_end_token_does_not_count_and_the_limit_is_five_edits():
    near, far = nearest_labels(["Corurooooo<|end_of_text|>x", "Corurooooooo"], ["Coruro", "Great Grig"])
    assert (near.within(5), far.within(5), far.nearest[0]) == ("Coruro", "None", "Coruro")


def test_case_counts_in_the_nearest_label():
    assert nearest_labels(["ab"], ["AB", "xb"])[0].nearest == ("xb",)


def test_a_list_is_matched_part_by_part_and_none_wins_a_tie():
    assert match_lists(["owl, wombat wombat,wren ", "Nonl"], ["owl", "wren", "Nonlx"]) == ["owl, None, wren", "None"]


@pytest.mark.parametrize(
    ("dataset", "text", "cleaned"),
    [
        (
            "unseen-family-cmn",
            "The common name for the focal species in the audio is Coruro, I think",
            " Coruro, I think",
        ),
        ("watkins", "The common name for the focal species in the audio is Fin, Finback Whale", " Fin"),
        ("cbi", "The scientific name for the focal species in the audio is Spinus tristis, a", " Spinus tristis"),
        ("zf-indiv", "One, or more", "One, or more"),
    ],
)
def test_the_papers_cleaning(dataset, text, cleaned):
    row = Prediction(prediction=text, label="", id="1", dataset_name=dataset)
    assert SCORERS["paper"].clean(row, dataset) == cleaned


@pytest.mark.parametrize(
    ("text", "label"),
    [("0", "One"), ("1", "One"), ("2", "More"), ("9" * 5000, "More"), ("²", "²"), ("1.", "1."), ("One", "One")],
)
def test_a_number_of_birds_is_one_or_more(text, label):
    assert birds_counted(text) == label


LABELS = ["Coruro", "Dall's Porpoise", "Great Grig", "More", "One", "Lynx lynx : Lynx"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Coruro", "Coruro"),
        (" coruro. \n\nIt sings.", "Coruro"),
        ('"Great  Grig".', "Great Grig"),
        ("The common name for the focal species in the audio is the Coruro.", "Coruro"),
        ("The animals are: “Dall's Porpoise”", "Dall's Porpoise"),
        ("Answer: **one**", "One"),
        ("lynx lynx : lynx", "Lynx lynx : Lynx"),
        ("Coruro<|end_of_text|> or not", "Coruro"),
        ("Coruros", ""),
        ("It is not a Coruro", ""),
        ("Coruro, Great Grig", ""),
        ("", ""),
    ],
)
def test_exact_sees_through_wrapping_only(text, label):
    assert match_exactly(text, LABELS) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Marsh Wren", "Marsh Wren"),
        ("Marsh wren", "Marsh wren"),
        ("The answer is 'Marsh  wren'.", "Marsh wren"),
        (" Marsh Wren", " Marsh Wren"),
        ("MARSH WREN", " Marsh Wren"),
        ("...", "..."),
        ("", ""),
    ],
)
def test_of_labels_that_differ_in_case_or_white_space_the_one_to_the_letter_is_taken(text, label):
    assert match_exactly(text, ["Marsh wren", "Marsh Wren", " Marsh Wren", "..."]) == label


READ_AS_LABELS = ["Pig", "Red Fox", "Red-tailed Hawk", "Dall's Porpoise", "Système", "Vulpes lagopus", "Pig (male)"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (unicodedata.normalize("NFD", "Système"), "Système"),
        ("Dall’s porpoise", "Dall's Porpoise"),
        ("Dall`s Porpoise", "Dall's Porpoise"),
        ("Red\N{NON-BREAKING HYPHEN}tailed\N{NO-BREAK SPACE}hawk", "Red-tailed Hawk"),
        ("Red\N{EN DASH}tailed\N{NARROW NO-BREAK SPACE}Hawk", "Red-tailed Hawk"),
        ("Red\N{ZERO WIDTH SPACE} \N{WORD JOINER}Fo\N{SOFT HYPHEN}x\N{ZERO WIDTH NO-BREAK SPACE}", "Red Fox"),
        ("Ｒｅｄ　Ｆｏｘ", "Red Fox"),
        ("Pig!", "Pig"),
        ("(Pig)", "Pig"),
        ("[Pig].", "Pig"),
        ("- Pig", "Pig"),
        ("* Pig", "Pig"),
        ("• **Pig**!", "Pig"),
        ("1. Pig", "Pig"),
        ("Answer: (1) Pig", "Pig"),
        (r"\boxed{Pig}", "Pig"),
        (r"$\boxed{\text{Red Fox}}$.", "Red Fox"),
        ("It hops, and so\nI conclude \\boxed{Pig}, as asked.", "Pig"),
        ("Red Fox (Vulpes vulpes)", "Red Fox"),
        ("The animal is the *Red Fox* (Vulpes vulpes).", "Red Fox"),
        ("Arctic Fox (Vulpes lagopus)", "Vulpes lagopus"),
        ("Pig (male)", "Pig (male)"),
        ("Pig (female)", "Pig"),
        ("No, it is a Pig", "Pig"),
        ("There is no doubt that it is a Pig", "Pig"),
        ("Without any doubt it is a Pig", "Pig"),
        ("I cannot be certain but it is Pig", "Pig"),
        ("The bird that never sings is Pig", "Pig"),
        ("The animal that doesn’t move is the Pig", "Pig"),
        ("False Pig Wolf (Vulpes lagopus)", "Vulpes lagopus"),
        ("The common name is False Fox and the scientific name is Vulpes lagopus", "Vulpes lagopus"),
        ("The wrong answer is Pig", ""),
        ("I doubt it is Pig", ""),
        ("It is doubtful whether it is a Pig", ""),
        ("I do not think it is Pig", ""),
        ("Nothing here is Pig", ""),
        ("This is incorrect: Pig", ""),
        ("Impossible: Pig", ""),
        ("This is unlike: Pig", ""),
        ("Is it: Pig", ""),
        ("It is definitely not: Pig", ""),
        ("It isn't: Pig", ""),
        ("It isn’t: Pig", ""),
        ("It cannot be what it looks like: Pig", ""),
        (r"It is not \boxed{Pig}", ""),
        ("not Pig (Red Fox)", ""),
        ("Pig (Red Fox)", ""),
        ("Pig?", ""),
        ("A. Pig", ""),
        ("Pig, or Red Fox", ""),
        ("()", ""),
        ("**", ""),
    ],
)
def test_exact_takes_what_a_reader_takes_for_the_label(text, label):
    assert match_exactly(text, READ_AS_LABELS) == label


@given(st.text(st.sampled_from("aB -.!'’()[]{}*_$\\1\u200b\u00a0é"), max_size=14))
def test_what_a_label_is_compared_by_is_settled_at_once(text):
    assert normalised(normalised(text)) == normalised(text)


@given(st.sampled_from(LABELS), st.sampled_from(["{}", "'{}'", "{}...", "  {}\n", "The answer is {}.", "Label: {}"]))
def test_exact_finds_every_label_in_every_wrapping(label, wrapping):
    assert match_exactly(wrapping.format(label.upper()), LABELS) == label
