"""Lists to choose from, as people keep them, and the probabilities of what is on them."""

import math
from pathlib import Path

import pytest
from scipy.special import softmax

from mergekit_bio.engine.decoding.choices import likeliest, with_choices
from mergekit_bio.errors import PromptError
from mergekit_bio.listen.choices import read_choices


def read(tmp_path: Path, text: str, name: str = "birds.txt", column: str = "", none: bool = False):
    (tmp_path / name).write_text(text, encoding="utf-8")
    notes: list[str] = []
    return read_choices(f"{tmp_path / name}{column}", none=none, note=notes.append), notes


def test_a_list_has_a_choice_a_line_and_comments(tmp_path: Path) -> None:
    text = "\ufeff# birds of the marsh\nMarsh Wren\n\n  Sora  \r\n#Virginia Rail\nBird #2\n"

    assert read(tmp_path, text) == (("Marsh Wren", "Sora", "Bird #2"), [])


def test_none_of_these_is_the_last_choice(tmp_path: Path) -> None:
    assert read(tmp_path, "Sora\n", none=True)[0] == ("Sora", "none of these")


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("species\nSora\nMarsh Wren\n", ""),
        ("file_name,label\na.wav,Sora\nb.wav,Marsh Wren\nc.wav,Sora\n", ""),
        ("code,species\n1,Sora\n2,Marsh Wren\n", ":species"),
    ],
)
def test_a_column_of_a_table_is_a_list(tmp_path: Path, text: str, column: str) -> None:
    assert read(tmp_path, text, "birds.csv", column) == (("Sora", "Marsh Wren"), [])


def test_a_first_line_that_may_be_a_choice_is_told_to_be_none(tmp_path: Path) -> None:
    choices, (note,) = read(tmp_path, "Sora\nMarsh Wren\nDusk Pelin\n", "birds.csv")

    assert choices == ("Marsh Wren", "Dusk Pelin")
    assert note == f"{tmp_path / 'birds.csv'}: its first line, 'Sora', is taken for the column's name and is no choice"


def test_a_choice_that_stands_twice_in_a_list_counts_once_and_is_told(tmp_path: Path) -> None:
    choices, notes = read(tmp_path, "Sora\nMarsh Wren\nSora\n")

    assert choices == ("Sora", "Marsh Wren")
    assert notes == [f"{tmp_path / 'birds.txt'}: 1 of the choices stand in it more than once; each counts once"]


@pytest.mark.parametrize(
    ("text", "name", "column", "message"),
    [
        ("# nothing\n", "birds.txt", "", "birds.txt: no choice in it"),
        ("Sora\n", "birds.txt", "", "birds.txt: one choice in it"),
        ("Sora\nsora\n", "birds.txt", "", "'Sora' and 'sora' differ only in case"),
        ("code,species\n1,Sora\n", "birds.csv", "", "birds.csv:COLUMN; it has code, species"),
        ("code,species\n1,Sora\n", "birds.csv", ":bird", "birds.csv: has no column 'bird'; it has code, species"),
        ("Sora\n", "birds.txt", ":species", "only a table (.csv, .tsv, .jsonl) has columns"),
    ],
)
def test_a_list_that_is_no_use_is_refused(tmp_path: Path, text: str, name: str, column: str, message: str) -> None:
    with pytest.raises(PromptError) as error:
        read(tmp_path, text, name, column)

    assert message in str(error.value)


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"gone\.txt: cannot be read"):
        read_choices(str(tmp_path / "gone.txt"), none=False, note=print)


def test_probabilities_are_the_softmax_of_the_scores() -> None:
    scores = {"a": -700.5, "b": -699.0, "c": -702.25, "d": -701.0, "e": -math.inf}
    expected = dict(zip(scores, softmax([*scores.values()]), strict=True))

    ranked = likeliest(scores)

    assert [choice for choice, _ in ranked] == ["b", "a", "d"]
    assert dict(ranked) == pytest.approx({choice: expected[choice] for choice in "bad"})
    assert len(likeliest(scores, 10)) == 4


def test_the_prompt_may_hold_the_list() -> None:
    assert with_choices("One of: {species_list}?", ("Sora", "Marsh Wren")) == "One of: Sora, Marsh Wren?"
    assert with_choices("What is it?", ("Sora",)) == "What is it?"
    with pytest.raises(PromptError, match="--choices FILE"):
        with_choices("One of: {species_list}?", ())
