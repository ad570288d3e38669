"""One reader for what others write: what values are read as, and where faults are said to be."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from mergekit_bio.errors import RecipeError
from mergekit_bio.outside_data import FORBID_EXTRA, Document, parse_yaml, read_rows, read_yaml, to_yaml


def read(text: str) -> Any:
    return parse_yaml(text, source="x.yaml", error=RecipeError).data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # The core schema of YAML 1.2, sections 10.2 and 10.3.2.
        ("~", None), ("null", None), ("", None), ("true", True), ("FALSE", False), ("12", 12), ("-3", -3), ("010", 10),
        ("1.", 1.0), (".5", 0.5), ("1e3", 1000.0), ("-.inf", float("-inf")), ("12e03", 12000.0), ("-2E+05", -200000.0),
        # What the reference's recipes are written for.
        ("yes", True), ("No", False), ("on", True), ("OFF", False),
        # What YAML 1.1 takes for something else.
        ("0:1:0.1", "0:1:0.1"), ("2026-01-01", "2026-01-01"), ("1_000", "1_000"), ("0x1f", "0x1f"), ("y", "y"),
        ("'yes'", "yes"), ('"1"', "1"), ("!!str 1", "1"), ("!!int '1'", 1), ("[0:1:0.1]", ["0:1:0.1"]),
        ("{a: b, c: [d, {e: f}]}", {"a": "b", "c": ["d", {"e": "f"}]}), ("a: |\n  b\n  c\n", {"a": "b\nc\n"}),
    ],
)  # fmt: skip
def test_a_scalar_is_what_it_looks_like(text, value):
    assert read(text) == value and type(read(text)) is type(value)


def values(excluded: str) -> st.SearchStrategy:
    texts = st.text(st.characters(codec="utf-8", exclude_characters=excluded))
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
        lambda parts: (
            st.lists(parts, max_size=4) | st.dictionaries(st.text("abnoy1:- ", max_size=4), parts, max_size=4)
        ),
        max_leaves=12,
    )


@given(values(""))
@example("\x85")
@example(["a\u2028b", {"-": "\u2029 "}])
def test_what_is_written_is_read_back(value):
    assert read(to_yaml(value)) == value


@given(values("\x85\u2028\u2029"))  # which are line breaks in YAML 1.1 and none in 1.2
def test_what_pyyaml_writes_is_read(value):
    assert read(yaml.safe_dump(value, allow_unicode=True)) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [1\n", "x.yaml:3: not YAML: "),
        ("a: 1\n---\nb: 1\n", "x.yaml:2: not YAML: there is a second document in it"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "x.yaml:4: the key 'c' stands twice"),
        ("a: &x 1\nb: *x\n", "x.yaml:2: not YAML: aliases are not used here"),
        ("? [a]\n: 1\n", "x.yaml:1: a key must be a text"),
        ("\n" + "[" * 10000, "x.yaml:2: not YAML: nested too deeply"),
        ("a: !!python/name:os.system x", "x.yaml:1: not YAML: could not determine a constructor for the tag"),
        ("a: " + "9" * 5000, "x.yaml: not YAML: "),
    ],
)
def test_what_is_no_yaml_of_ours_is_one_line(text, said):
    with pytest.raises(RecipeError) as error:
        read(text)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@dataclass(frozen=True)
class Part:
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    strength: float | str | None = None


@dataclass(frozen=True)
class Whole:
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    parts: str | tuple[str | Part, ...]
    table: dict[str, Part] | None = None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parts:\n- name: a\n  stength: 1\n", "x.yaml:3: parts[0].stength: unknown key; did you mean 'strength'?"),
        ("parts:\n- a\n- name: 1\n", "x.yaml:3: parts[1].name: input should be a valid string, not 1"),
        ("parts:\n- strength: 1\n", "x.yaml:2: parts[0].name: is missing"),
        ("table: {a: {nam: b}}\nparts: a\n", "x.yaml:1: table.a.nam: unknown key; did you mean 'name'?"),
        ("prts: a\n", "x.yaml:1: prts: unknown key; did you mean 'parts'?"),
        ("- a\n", "x.yaml:1: input should be an object"),
    ],
)
def test_a_fault_is_named_with_line_and_key_through_unions_lists_and_tables(text, said):
    with pytest.raises(RecipeError) as error:
        parse_yaml(text, source="x.yaml", error=RecipeError).checked(Whole)
    assert str(error.value) == said


def test_half_a_character_is_named_with_its_key():
    with pytest.raises(RecipeError, match=r"^f: parts\[1\]: holds half of a surrogate pair"):
        Document("f", {"parts": ["a", "\ud800"]}, RecipeError).checked(Whole)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in (("a.csv", "a,b\n1,2\n"), ("a.jsonl", '{"a": "1", "b": "2"}\n'), ("a.yaml", "a: '1'\nb: '2'\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (csv_row,) = read_rows(tmp_path / "a.csv", error=RecipeError)
    (json_row,) = read_rows(tmp_path / "a.jsonl", error=RecipeError)
    document = read_yaml(tmp_path / "a.yaml", error=RecipeError)
    assert csv_row.data == json_row.data == document.data == {"a": "1", "b": "2"}
    assert (csv_row.line(), json_row.line(), document.line(("b",))) == (
        f"{tmp_path / 'a.csv'}:2",
        f"{tmp_path / 'a.jsonl'}:1",
        f"{tmp_path / 'a.yaml'}:2",
    )
