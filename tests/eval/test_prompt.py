import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bio.errors import DatasetError, PromptError, RecipeError
from mergekit_bio.eval.components import components
from mergekit_bio.eval.data.dataset import Dataset, DatasetRow
from mergekit_bio.eval.prompt import flags, instruction_prompt, query_prompt, shuffled
from mergekit_bio.eval.recipe.schema import DatasetChoice, Recipe, load_recipe
from mergekit_bio.eval.recipe.shipped import shipped_recipes
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.run.questions import options, questions, show_prompts

SLOT = "<Audio><AudioHere></Audio>"


def rendered(instruction) -> str:
    """As NatureLM-audio's own template has it."""
    return (
        f"<|start_header_id|>user<|end_header_id|>\n\n{instruction.text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def dataset(labels: list[str], **changes) -> Dataset:
    rows = tuple(DatasetRow(id=f"clip{number}", label=label) for number, label in enumerate(labels))
    values = {
        "name": "d", "task": "classification", "asked": rows, "examples": rows, "labels": len(set(labels)),
        "seconds": 10.0, "source": "made up", "recording": lambda clip_id: None,
    }  # fmt: skip
    return Dataset(**(values | changes))


EXPERIMENTS = {
    "closed_set_classification_2": "closed_set_2",
    "closed_set_classification_all": "closed_set",
    "zf-indiv": "zf_indiv",
}


def test_prompts_of_the_published_experiments_are_theirs_up_to_the_shuffled_order(published):
    compared = Counter()
    for cell in read_runs([published]):
        recipe = load_recipe(shipped_recipes()[EXPERIMENTS.get(cell.run, cell.run)]).recipe
        rows = tuple(DatasetRow(id=row.id, label=row.label) for row in cell.predictions)
        data = dataset([], name=cell.dataset, asked=rows, examples=rows)
        for row, question in zip(cell.predictions, questions(recipe, data, cell.query), strict=True):
            if row.prompt is not None:
                assert split(rendered(question.instruction)) == split(row.prompt)
                assert question.instruction.clips == (row.id,)
                compared[cell.run, cell.query] += 1
    assert len(compared) == 11 and min(compared.values()) >= 20


def test_queries_of_every_experiment_are_the_published_ones(published):
    """Those of which no predictions were published too."""
    queries: dict[str, list[str]] = {}
    for line in (published / "README.md").read_text().splitlines():
        # | recipe, recipe | dataset | species | 0 `query` 1 `query` |
        names, *_, column = line.strip("|").split(" | ") if " | " in line else ("", "")
        quoted = [text.replace("\\n", "\n") for text in re.findall("`(.*?)`", column)]
        if quoted and quoted[0] == "{examples}":  # the same with `{examples}` for `{audio_examples}`
            quoted = [queries["in_context_1"][0].replace(quoted[1], quoted[0])]
        queries |= dict.fromkeys(re.findall(r"\w+", names), quoted) if quoted else {}
    ours = {name: load_recipe(file).recipe for name, file in shipped_recipes().items() if not name.startswith("demo")}
    assert {name: list(recipe.queries) for name, recipe in ours.items() if recipe.queries} == queries


def split(text: str) -> tuple[str, list[str]]:
    """The text without the species list, and the list sorted."""
    before, found, after = text.partition("Output exactly one of: ")
    names, end, rest = after.partition("<|eot_id|>")
    return before + found + end + rest, sorted(names.split(", "))


SPECIES = ("Coruro", "Great Grig", "Wild Boar", "Crab-eating Frog")


def ask(query: str, clip: str = "clip0", seed: int = 0, **options):
    return query_prompt(query=query, clip=clip, key=(seed, "d", 0), **({"species": SPECIES} | options))


def test_the_clip_goes_in_front_unless_the_query_says_where():
    assert ask("What is it?\n").text == f"{SLOT} What is it?"
    assert ask(f"Audio: {SLOT}\nLabel:{{randomize}}").text == f"Audio: {SLOT}\nLabel:"
    assert ask("Which?").query_slot == 0


def test_species_are_listed_in_their_order_or_shuffled_for_every_clip():
    assert ask("One of: {species_list}").text == f"{SLOT} One of: Coruro, Great Grig, Wild Boar, Crab-eating Frog"
    orders = {ask("One of: {species_list}{randomize}", clip=f"c{number}").text for number in range(60)}
    assert len(orders) > 15


def test_descriptions_are_blocks_in_the_order_of_the_list():
    text = ask(
        "{species_list}\n\n{examples}{randomize}",
        species=("a", "b"),
        descriptions={"a": "[chirps]", "b": "[clicks]"},
    ).text
    names, *blocks = text.removeprefix(SLOT + " ").split("\n\n")
    assert blocks == [
        {"a": "Audio: [chirps]\nLabel: a", "b": "Audio: [clicks]\nLabel: b"}[name] for name in names.split(", ")
    ]


POOL = {"a": [f"a{number}" for number in range(6)], "b": [f"b{number}" for number in range(6)]}
IN_CONTEXT = "One of: {species_list}\n\n{audio_examples}\n\nAudio: " + SLOT + "\nLabel:{randomize}"


def test_audio_examples_come_with_their_clips_in_order_and_the_query_clip_last():
    prompt = ask(IN_CONTEXT, clip="a0", species=("a", "b"), pool=POOL, n_examples=2)
    blocks = prompt.text.split("\n\n")[1:]
    assert [block.split("Label: ")[1] for block in blocks[:-1]] == [clip[0] for clip in prompt.examples]
    assert sorted(clip[0] for clip in prompt.examples) == ["a", "a", "b", "b"]
    assert prompt.clips[-1] == "a0" and prompt.query_slot == 4
    assert prompt.text.count("<AudioHere>") == 5


def test_a_query_without_a_slot_of_its_own_hears_the_clip_first_and_then_the_examples():
    prompt = ask("Which?\n{audio_examples}", clip="a0", species=("a", "b"), pool=POOL, n_examples=1)
    assert prompt.text.startswith(f"{SLOT} Which?\nAudio: {SLOT}\nLabel: ")
    assert prompt.clips[0] == "a0" and prompt.query_slot == 0


@given(st.integers(0, 2**31), st.sampled_from([clip for clips in POOL.values() for clip in clips]), st.integers(1, 5))
def test_no_clip_is_among_its_own_examples_and_none_comes_twice(seed, clip, number):
    prompt = ask(IN_CONTEXT, clip=clip, seed=seed, species=("a", "b"), pool=POOL, n_examples=number)
    assert clip not in prompt.examples
    assert len(set(prompt.examples)) == len(prompt.examples) == 2 * number
    assert Counter(example[0] for example in prompt.examples) == {"a": number, "b": number}


def test_every_other_clip_is_drawn_about_equally_often():
    drawn = Counter(
        example
        for seed in range(600)
        for example in ask(IN_CONTEXT, clip="a0", seed=seed, species=("a", "b"), pool=POOL, n_examples=1).examples
    )
    assert set(drawn) == {*POOL["a"][1:], *POOL["b"]}
    assert all(80 < drawn[clip] < 165 for clip in POOL["a"][1:])


def test_too_few_clips_for_the_examples_is_said_so():
    with pytest.raises(DatasetError, match=r"d: 6 example\(s\) of 'a' are asked for, beside a0 there are 5"):
        ask(IN_CONTEXT, clip="a0", species=("a", "b"), pool=POOL, n_examples=6)


def test_a_name_is_text_flags_and_all_but_may_not_bring_a_slot():
    assert "{examples}" in ask("One of: {species_list}", species=("{examples}", "b")).text
    with pytest.raises(PromptError):
        ask("One of: {species_list}", species=("<AudioHere>", "b"))


@given(st.lists(st.text()), st.integers())
def test_a_shuffle_keeps_every_item_and_depends_on_its_key_alone(items, key):
    assert sorted(shuffled(items, key)) == sorted(items)
    assert shuffled(items, key, "a") == shuffled(items, key, "a")


def test_a_shuffle_is_the_same_on_every_machine():
    # Worked out once with sha256sum.
    assert shuffled(["a", "b", "c", "d"], 1, "d") == ["a", "d", "b", "c"]


SHOW = """
import sys
from pathlib import Path
from mergekit_bio.eval.run.questions import show_prompts
from mergekit_bio.eval.recipe.schema import load_recipe
for _, query, asked in show_prompts(load_recipe(Path(sys.argv[1])).recipe, 99):
    print(query, *asked, sep="\\n")
"""


def test_the_hash_seed_of_python_makes_no_difference(beans_zero, tmp_path):
    recipe = tmp_path / "all_flags.yaml"
    recipe.write_text(
        f"checkpoints: [x]\ndata: {beans_zero('parquet')}\ndatasets: [unseen-family-cmn]\ntop_k_species: 3\n"
        "n_examples: 1\nqueries:\n- '{species_list}{randomize} {audio_examples} Which?'\n- '{audio_examples} Which?'\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", SHOW, recipe],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "12345")
    ]
    assert printed[0] == printed[1]
    assert printed[0].count(b"Question(") == 2 * 11


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("{speces_list}", r"q: unknown flag '{speces_list}'; did you mean 'species_list'\?"),
        ("{audio_examples}{audio_examples}", "once"),
        ("<AudioHere><AudioHere>", "a query has one <AudioHere>"),
    ],
)
def test_a_wrong_flag_is_named(query, said):
    with pytest.raises(RecipeError, match=said):
        flags(query, "q")


def test_braces_around_anything_else_are_text():
    assert flags('Answer as {"name": 1} {} {randomize}', "q") == {"randomize"}
    assert ask('Answer as {"name": 1} {}').text == f'{SLOT} Answer as {{"name": 1}} {{}}'


def test_without_queries_the_datasets_own_instruction_is_asked():
    prompt = instruction_prompt(clip="c", instruction=f"{SLOT} What is it?", task="classification", labels=300)
    assert prompt.text == f"{SLOT} What is it?" and prompt.clips == ("c",)


@pytest.mark.parametrize("name", ["enabirds", "hiceas", "rfcx", "gibbons", "dcase"])
def test_detection_with_more_than_eight_labels_gets_the_general_question(name):
    component = components()[name]
    prompt = instruction_prompt(
        clip="c", instruction=f"{SLOT} Own.", task="detection", labels=len(component.labels or ())
    )
    general = f"{SLOT} What are the common names for the species in the audio, if any?"
    assert prompt.text == (f"{SLOT} Own." if name in ("hiceas", "gibbons") else general)


def recipe(**changes) -> Recipe:
    values = {"name": "r", "datasets": (DatasetChoice(name="watkins"),), "checkpoints": ("x",), "top_k_species": 2}
    return Recipe(**(values | {"queries": ("{species_list}{randomize}",)} | changes))


def test_a_limit_and_the_other_clips_do_not_change_a_clips_prompt():
    data = dataset(["a", "b", "a", "b", "b", "c"])
    whole = list(questions(recipe(), data, 0))
    assert list(questions(recipe(), data, 0, 2)) == whole[:2]
    assert [question.row.id for question in whole] == [row.id for row in data.asked]
    assert "Here></Audio> b, a" in whole[0].instruction.text or "Here></Audio> a, b" in whole[0].instruction.text


def test_another_seed_asks_otherwise():
    data = dataset(["a", "b"] * 20)
    assert list(questions(recipe(seed=1), data, 0)) != list(questions(recipe(), data, 0))


def test_the_options_are_the_targets():
    data = dataset(["walrus", "narwhal", "walrus"])
    names = {"walrus": "Odobenus rosmarus", "narwhal": "Monodon monoceros"}
    asked = recipe(queries=("a", "b"), targets=("label", "combined"), label_map=names)
    assert options(asked, data, 0) == ["narwhal", "walrus"]
    assert options(asked, data, 1) == ["Monodon monoceros : narwhal", "Odobenus rosmarus : walrus"]


def test_a_label_without_a_scientific_name_is_no_option():
    data = dataset(["walrus", "narwhal", "walrus"])
    asked = recipe(queries=("a",), targets=("scientific",), label_map={"walrus": "Odobenus rosmarus"})
    assert options(asked, data, 0) == ["Odobenus rosmarus"]
    with pytest.raises(RecipeError, match="no scientific name for the label 'narwhal' or any other"):
        options(replace(asked, label_map={"wren": "Troglodytes troglodytes"}), data, 0)


def test_prompts_are_shown_without_decoding_a_recording(beans_zero):
    shown = list(
        show_prompts(
            recipe(data=str(beans_zero("parquet")), queries=("One of {species_list}?", "Which?"), top_k_species=9), 2
        )
    )
    assert [(data.name, query, len(asked)) for data, query, asked in shown] == [("watkins", 0, 2), ("watkins", 1, 2)]
    assert shown[0][2][0].instruction.text == f"{SLOT} One of Walrus, Fin, Finback Whale?"
    own = replace(recipe(data=str(beans_zero("parquet"))), queries=(), top_k_species=None)
    ((_, _, (question,)),) = show_prompts(own, 1)
    assert question.instruction.text == f"{SLOT} What is it, watkins?"
