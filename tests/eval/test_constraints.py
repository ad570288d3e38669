"""Whether an answer keeps its format: pairs of answers and verdicts, written by hand."""

import json
import re

import pytest

from mergekit_bio.eval.recipe.shipped import shipped_recipes
from mergekit_bio.eval.scoring.constraints import KINDS, SCRIPTS, followed, parse_constraint

#: Constraint, answers that keep it as they are written, answers that keep it by the loose rule only, and that do not.
VERDICTS = [
    ("one_of: Yes | No", ["Yes", " No\n"], ["**Yes**", "Here is my answer:\nNo"], ["yes", "Yes.", "Yes or No", ""]),
    ("one_of: Red Fox | Wolf", ["Red Fox"], ["Red Fox\n\nHope that helps!"], ["Fox", "It is a Wolf", "Red Fox Wolf"]),
    (
        "number: 0 | 20",
        ["7", "0", "20"],
        ["*7*", "The count is:\n7"],
        ["21", "-1", "07", "-0", "seven", "7 calls", "7.0", "٣"],
    ),
    ("number: -5 | 5", ["-5"], ["**-5**"], ["--5", "- 5", "9" * 5000]),
    ("number", ["1889", "-3", "0"], ["In:\n1889"], ["01995", "1889.5", "1,889"]),
    (
        "words: 3",
        ["A soft trill", "rising, rising, rising", "low-pitched distant hum"],
        ["Sure, in three words:\nA soft trill", "a soft trill\n\n(as you asked)"],
        ["trill", "a very soft trill", "a - trill", ""],
    ),
    ("words: 1", ["Wren", "Wren!", "— Wren"], ["The word is\nWren"], ["Marsh Wren", "!"]),
    ("upper_case", ["A WREN SINGS.", "ÉTOURNEAU", "3 OWLS"], ["Sure:\nA WREN SINGS."], ["A WREN SINGs", "123", "..."]),
    ("lower_case", ["a wren sings.", "étourneau", "3 owls"], ["Sure:\na wren sings."], ["A wren", "123", ""]),
    (
        "quotes",
        ['"A wren."', "“A wren.”"],
        ['**"A wren."**', 'Here:\n"A wren."'],
        ["'A wren.'", '"A wren', '""', '"', '" "'],
    ),
    (
        "ends_with: That is all.",
        ["A wren. That is all.", "That is all."],
        ["A wren. **That is all.**", "A wren. That is all.\nDo you want more?"],
        ["A wren. That is all", "That is all. A wren.", "A wren. that is all."],
    ),
    ("ends_with: END", ["A wren END", "the\nEND"], ["A wren **END**"], ["At the WEEKEND", "END.", "end"]),
    ("ends_with: (1)", ["Two birds sing (1)"], ["*Two birds sing (1)*"], ["Two birds sing (1).", "(1) Two birds"]),
    (
        "without: the",
        ["A wren", "There"],
        ["In the reeds:\na wren", "in the\nreeds"],
        ["THE wren", "the\nthe"],
    ),
    ("without: , | ;", ["A wren. A frog."], ["Well, here:\nA wren."], ["A wren, a frog", "A wren; a frog", "鷦鷯，蛙"]),
    ("without: bird | birds", ["A birdlike song"], ["Bird:\na wren"], ["BIRDS sing", "a bird's song", "_birds_ sing"]),
    (
        "bullets: 2",
        ["- a wren\n- a frog", "* a wren\n* a frog", "Heard:\n- a wren\n- a frog", "• a\n  - b"],
        ["- a\n- b\n- c"],
        ["- a wren", "1. a wren\n2. a frog", "-a\n-b", "- \n- a", "**a**\n**b**", "* * *\n- a"],
    ),
    ("bullets: 2 | -", ["- a\n- b"], ["- a\n- b\n* c"], ["* a\n* b", "• a\n• b", "- a\n* b", "- a"]),
    ("bullets: 1", ["- a", "+ a\n\nb"], ["- a\n- b"], ["-\na", "---", "- - -"]),
    (
        "parts: 2 | ;",
        ["Gray wolf; Canis lupus"],
        ["Here:\nGray wolf; Canis lupus"],
        ["Wolf", "a;b;c", "a;", "a;\nb"],
    ),
    ("parts: 2 | ->", ["Owl -> Mouse"], ["**Owl** -> Mouse\nas asked"], ["Owl, Mouse", "Owl -> Mouse -> Seed"]),
    (
        "languages: English | Hindi",
        [
            "A peacock is a bird.\nमोर एक पक्षी है।",
            "Peacock\nमोर (mora, Pavo cristatus)",
            "Peacock\n\nमोर (Pavo) एक पक्षी है",
        ],
        ["Sure, in two lines:\nA peacock.\nमोर"],
        ["A peacock. मोर", "मोर\nA peacock.", "A peacock.\nUn paon.", "A peacock.", "मोर", "1\n2"],
    ),
    ("languages: Russian | English", ["Это птица\nA bird"], ["Ответ:\nЭто птица\nA bird"], ["A bird\nЭто птица"]),
]


@pytest.mark.parametrize(("constraint", "strict", "loose", "neither"), VERDICTS, ids=[row[0] for row in VERDICTS])
def test_answers_and_verdicts(constraint, strict, loose, neither):
    assert {answer: followed(answer, constraint) for answer in strict} == dict.fromkeys(strict, (True, True))
    assert {answer: followed(answer, constraint) for answer in loose} == dict.fromkeys(loose, (False, True))
    assert {answer: followed(answer, constraint) for answer in neither} == dict.fromkeys(neither, (False, False))


def test_every_kind_has_answers_that_keep_it_and_that_do_not():
    assert {constraint.split(":")[0] for constraint, *_ in VERDICTS} | {"json"} == set(KINDS)


JSON = [
    ('{"species": "Wren", "confidence": 0.9}', True),
    ('{"confidence": null, "species": ["a", {"b": "}"}]}', True),
    ('{\n  "species": "Wren",\n  "confidence": 1\n}', True),
    ('{"species": "Wren"}', False),
    ('{"species": "Wren", "confidence": 1, "more": 2}', False),
    ('{"species": "Wren", "confidence": 1}.', False),
    ('[{"species": "Wren", "confidence": 1}]', False),
    ('"species confidence"', False),
    ("{'species': 'Wren', 'confidence': 1}", False),
    ('{"species": "Wren", "confidence": 1,}', False),
    ('{"species": {"species": 1, "confidence": 2}}', False),
]


@pytest.mark.parametrize(("answer", "keeps"), JSON)
def test_json_is_what_the_json_module_reads_as_an_object_with_the_keys(answer, keeps):
    try:
        read = json.loads(answer)
    except ValueError:
        read = None
    assert keeps == (isinstance(read, dict) and sorted(read) == ["confidence", "species"])
    assert followed(answer, "json: species | confidence")[0] == keeps


def test_json_that_only_python_reads_is_none():
    """RFC 8259: no NaN; names within an object should be unique."""
    for answer in ('{"low_hz": NaN}', '{"low_hz": -Infinity}', '{"low_hz": 1, "low_hz": 2}', "[" * 100_000):
        assert followed(answer, "json: low_hz") == (False, False)


def test_a_key_may_have_to_hold_a_list():
    assert followed('{"animals": ["bee"]}', "json: animals[]") == (True, True)
    assert followed('{"animals": "bee"}', "json: animals[]") == (False, False)


def test_letters_count_as_they_are_read_however_they_are_encoded():
    assert followed("Cafe\u0301", "one_of: Café | Tea") == (True, True)
    assert followed("a cafe\u0301", "without: café") == (False, False)


def test_json_in_a_code_fence_is_kept_loosely():
    assert followed('```json\n{"animal": "wren"}\n```', "json: animal") == (False, True)
    assert followed('Sure:\n```json\n{"animal": "wren"}\n```', "json: animal") == (False, False)


def test_the_loose_rule_is_the_one_of_ifeval():
    """Section 2.2 of arXiv:2311.07911: Markdown's asterisks, the first line, the last line, and all combinations."""
    kept = ["Wren", "*Wren*", "a\nWren", "Wren\nb", "a\nWren\nb", "a\n**Wren**\nb", "**Wren**\nb"]
    assert [followed(answer, "one_of: Wren | Owl") for answer in kept] == [(True, True)] + [(False, True)] * 6
    for answer in ("a\nb\nWren", "Wren\nb\nc", "_Wren_", "a\nb\n\nWren"):
        assert followed(answer, "one_of: Wren | Owl") == (False, False), answer


def test_nothing_left_keeps_nothing():
    for constraint in ("without: the", "bullets: 1", "lower_case"):
        assert followed(" \n\n ", constraint) == (False, False)
    assert followed("the\n**\nthe", "without: the") == (False, True)  # without its first and last line
    assert followed("the **", "lower_case") == (True, True) and followed("**", "lower_case") == (False, False)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("word: 3", "unknown constraint 'word'; did you mean 'words'?"),
        ("words", "'words': write words: NUMBER"),
        ("words: three", "write words: NUMBER"),
        ("words: 0", "write words: NUMBER"),
        ("words: 3 | 4", "write words: NUMBER"),
        ("upper_case: yes", "write upper_case$"),
        ("one_of: Yes", r"write one_of: Yes \| No"),
        ("one_of: Yes | ", r"write one_of: Yes \| No"),
        ("number: 5 | 1", r"write number: LOWEST \| HIGHEST"),
        ("bullets: 2 | #", "write bullets: NUMBER"),
        ("json", r"write json: KEY \| KEY"),
        ("languages: English | French", "two or more of Arabic, English"),
        ("", "unknown constraint ''"),
    ],
)
def test_a_constraint_that_is_none_is_answered_with_what_it_takes(constraint, message):
    with pytest.raises(ValueError, match=message):
        parse_constraint(constraint)


def test_scripts_are_told_by_the_letters_of_words_in_the_languages():
    words = {
        "Arabic": "جمل", "English": "camel", "Greek": "καμήλα", "Hindi": "ऊँट", "Korean": "낙타", "Russian": "верблюд",
        "Thai": "อูฐ",
    }  # fmt: skip
    assert words.keys() == SCRIPTS.keys()
    for language, word in words.items():
        other = "Russian" if language != "Russian" else "Thai"
        assert followed(f"{word}\n{words[other]}", f"languages: {language} | {other}") == (True, True)
        assert followed(f"{words[other]}\n{word}", f"languages: {language} | {other}") == (False, False)


def test_the_prompts_are_two_hundred_of_every_kind_and_say_what_they_want():
    rows = [json.loads(line) for line in prompts().read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows) == 200
    assert sum("file_name" in row for row in rows) == 100
    for audio in (False, True):
        kinds = [row["constraint"].split(":")[0] for row in rows if ("file_name" in row) == audio]
        assert set(kinds) == KINDS.keys() and min(map(kinds.count, KINDS)) >= 8
    for row in rows:  # what a code looks for stands in the prompt, so that a reader can know it
        kind, _, arguments = row["constraint"].partition(": ")
        wanted = arguments.split(" | ")
        if kind in ("one_of", "json", "languages", "ends_with"):
            assert all(argument.removesuffix("[]") in row["prompt"] for argument in wanted), row
        if kind == "number" and wanted[0] and "four digits" not in row["prompt"]:
            assert all(re.search(rf"\b{bound}\b", row["prompt"]) for bound in wanted), row
        if kind == "bullets" and len(wanted) > 1:
            assert f'"{wanted[1]} "' in row["prompt"] or (wanted[1] == "-" and "a dash" in row["prompt"]), row
        if kind == "parts":
            names = {"/": "slashes", ";": "semicolon", ":": "colon", ",": "comma"}
            assert wanted[1] in row["prompt"] or names[wanted[1]] in row["prompt"], row
        if kind in ("words", "bullets"):
            number = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"][int(wanted[0]) - 1]
            assert re.search(rf"\b({number}|single)\b", row["prompt"]), row


def prompts():
    return shipped_recipes()["instructions"].parent / "instructions" / "v1" / "metadata.jsonl"
