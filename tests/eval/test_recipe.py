import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.errors import OutputError, RecipeError
from mergekit_bio.eval.components import components
from mergekit_bio.eval.label_map import read_label_map
from mergekit_bio.eval.recipe.schema import (
    DatasetChoice,
    Generate,
    Recipe,
    Species,
    load_recipe,
)
from mergekit_bio.eval.recipe.shipped import copy_shipped, find_label_map, find_recipe, shipped_recipes
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.merging.request import MergeRequest

SWEEP = tuple(number / 10 for number in range(11))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(str(tmp_path) + "/")


SMALL = "checkpoints: [model]\ndatasets: [watkins]\n"


def test_the_recipes_of_the_paper_are_there():
    assert set(shipped_recipes()) == {
        "closed_set", "closed_set_2", "in_context_1", "in_context_5", "textual_in_context", "watkins", "cbi",
        "zf_indiv", "beans_zero", "instructions", "demo", "demo_named", "demo_combined", "demo_in_context",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_has_the_papers_settings(name):
    recipe = load_recipe(shipped_recipes()[name]).recipe
    assert recipe.name == name
    if not name.startswith("demo"):
        assert recipe.merge.alphas == ((1.0,) if name in ("zf_indiv", "beans_zero") else SWEEP)
        greedy = Generate(max_new_tokens=256, num_beams=1)
        assert recipe.generate == (greedy if name == "instructions" else Generate(max_new_tokens=100, num_beams=2))
        assert recipe.data == "EarthSpeciesProject/BEANS-Zero"
    assert "\t" not in shipped_recipes()[name].read_text()


def test_the_first_recipe_names_every_key_with_its_type_and_default():
    text = shipped_recipes()["closed_set"].read_text()
    run_decides = {"out", "overwrite", "text_only"}
    for kind in (Recipe, MergeRequest, Generate, DatasetChoice, Species):
        for key in {field.name for field in fields(kind)} - run_decides:
            assert re.search(rf"\b{key}:", text), key


def test_beans_zero_is_all_of_it():
    recipe = load_recipe(shipped_recipes()["beans_zero"]).recipe
    assert [choice.name for choice in recipe.datasets] == list(components())
    assert sum(component.rows for component in components().values()) == 91_965


LABELS = shipped_recipes()["watkins"].parent / "labels"
NOT_FOUND = "Scientific name not found"


@pytest.mark.parametrize(
    ("name", "missing", "not_found"),
    [
        ("watkins", set(), 5),
        ("watkins_corrected", set(), 0),
        ("cbi", {"Scott's Oriole"}, 1),
        ("cbi_corrected", set(), 0),
    ],
)
def test_label_maps_have_every_label_that_the_published_ones_have(name, missing, not_found):
    names = read_label_map(LABELS / f"{name}.csv")
    assert set(components()[name.removesuffix("_corrected")].labels) - set(names) == missing
    assert sum(scientific == NOT_FOUND for scientific in names.values()) == not_found
    assert all(re.fullmatch(rf"[A-Z][a-z]+ [a-z]+|{NOT_FOUND}", text) for text in names.values())


@pytest.mark.parametrize(
    ("name", "list_", "names", "clips"),
    [("watkins", "watkins/names.jsonl", 5, 52), ("cbi", "cbi_names_published.jsonl", 30, 399)],
)
def test_the_map_of_a_recipe_is_the_published_one_and_the_corrected_one_tells_what_is_wrong_with_it(
    published, name, list_, names, clips
):
    ours, corrected = read_label_map(LABELS / f"{name}.csv"), read_label_map(LABELS / f"{name}_corrected.csv")
    assert ours == load_recipe(shipped_recipes()[name]).recipe.label_map == read_label_map(published / list_)
    wrong = {label for label in corrected if ours.get(label) != corrected[label]}
    (cell, *_) = read_runs([published / name / f"beans_zero_eval_{name}_query0_lora100.jsonl.gz"])
    assert (len(wrong), sum(row.label in wrong for row in cell.predictions)) == (names, clips)
    assert wrong >= {label for label in corrected if ours.get(label, NOT_FOUND) == NOT_FOUND}


def test_defaults_and_paths_beside_the_recipe(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "names.csv").write_text("label,scientific\nWalrus,Odobenus rosmarus\n")
    loaded = load_recipe(
        write(
            tmp_path,
            "checkpoints: [model, someone/else]\ndata: ./data\ndatasets: [watkins, {path: frogs/}]\n"
            "queries: [What]\ntargets: [scientific]\nlabel_map: names.csv\n",
        )
    )
    recipe = loaded.recipe
    assert loaded.notes == ()
    assert recipe.name == "mine" and recipe.scorer == "paper" and recipe.generate == Generate()
    assert recipe.checkpoints == (str(tmp_path / "model"), "someone/else")
    assert recipe.data == str(tmp_path / "data")
    assert recipe.datasets[1] == DatasetChoice(name="frogs", path=str(tmp_path / "frogs"))
    assert recipe.label_map == {"Walrus": "Odobenus rosmarus"}
    assert recipe.target(0, "watkins") == "scientific"


def test_the_data_can_be_elsewhere_than_the_recipe_says(tmp_path, monkeypatch):
    recipe = write(tmp_path, SMALL + "data: ./here\n")
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    assert load_recipe(recipe, data=".").recipe.data == str(tmp_path / "copy")
    assert load_recipe(recipe, data="someone/BEANS").recipe.data == "someone/BEANS"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: a\nadapter: b\nalphas: [0.5]\n", "mine.yaml:1: is a recipe of 'mergekit-bio merge'; one of 'eval' has"),
        (SMALL + "querys: [a]\n", "mine.yaml:3: querys: unknown key; did you mean 'queries'?"),
        (SMALL + "generate:\n  num_beam: 2\n", "mine.yaml:4: generate.num_beam: unknown key; did you mean 'num_beams'"),
        (SMALL + "generate: {num_beams: two}\n", "mine.yaml:3: generate.num_beams: input should be a valid integer"),
        (SMALL + "generate: {num_beams: 0}\n", "generate.num_beams: input should be greater than or equal to 1"),
        (SMALL + "seed: '1'\n", "mine.yaml:3: seed: input should be a valid integer"),
        (SMALL + "streaming: 1\n", "mine.yaml:3: streaming: input should be a valid boolean"),
        ("checkpoints: [m]\ndatasets: [watkins, hiceas]\ndecoding: loglikelihood\n", "mine.yaml:3: decoding: 'logli"),
        ("checkpoints: [m]\ndatasets:\n- {path: x, task: detection}\nqueries: [a]\ndecoding: choice\n", "'x' is det"),
        (SMALL + "scorer: papr\n", "mine.yaml:3: scorer: input should be 'paper', 'beans-zero', 'exact', 'choice',"),
        (SMALL + "seed: 1\nseed: 2\n", "mine.yaml:4: the key 'seed' stands twice"),
        (SMALL + "1: 2\n", "mine.yaml:3: a key must be a text"),
        ("checkpoints: [model]\n", "mine.yaml:1: datasets: is missing"),
        ("datasets: [watkins]\n", "mine.yaml:1: merge: give either merge or checkpoints"),
        (SMALL + "merge: {alphas: [0]}\n", "mine.yaml:3: merge: give either merge or checkpoints"),
        ("merge: {alphas: []}\ndatasets: [watkins]\n", "mine.yaml:1: merge.alphas:"),
        ("merge: {alphas: q_proj=0.5}\ndatasets: [watkins]\n", "merge.alphas: a recipe's strengths are numbers"),
        ("merge: {alphas: [0, 0]}\ndatasets: [watkins]\n", "merge.alphas: 0.00 is given twice"),
        ("merge: {alphas: 0.5, out: here}\ndatasets: [watkins]\n", "mine.yaml:1: merge.out: the run decides"),
        ("merge: {alphas: [.nan]}\ndatasets: [watkins]\n", "merge.alphas[0]: input should be a finite number"),
        ("checkpoints: [m]\ndatasets:\n  - cbi\n  - watkin\n", "mine.yaml:4: datasets: unknown component 'watkin'"),
        ("checkpoints: [m]\ndatasets: [cbi, cbi]\n", "datasets: 'cbi' stands twice"),
        ("checkpoints: [m]\ndatasets:\n  - {path: x, tsk: a}\n", "mine.yaml:3: datasets[0].tsk: unknown key; did you"),
        (SMALL + "top_k_species: 2\nspecies: [{name: a}]\n", "mine.yaml:3: top_k_species: give either species or"),
        ("checkpoints: [m]\ndatasets: [cbi, watkins]\ntop_k_species: 2\n", "for exactly one dataset, not 2"),
        (SMALL + "queries: ['{species_list}']\n", "mine.yaml:3: queries: the flags for species need species or"),
        (SMALL + "top_k_species: 2\nqueries:\n- a\n- '{specis_list}'\n", "mine.yaml:6: queries[1]: unknown flag"),
        (SMALL + "top_k_species: 2\nqueries: ['{examples}']\n", "{examples} needs species with a description each"),
        (SMALL + "top_k_species: 2\nqueries: ['{audio_examples}']\n", "{audio_examples} needs n_examples of 1 or more"),
        ("checkpoints: [m]\ndatasets:\n  - cbi\n  - path: frogs/\n", "mine.yaml:4: datasets: the folder 'frogs'"),
        (SMALL + "queries:\n- a\n- ' {randomize}'\n", "mine.yaml:5: queries: query 1 asks nothing beside its flags"),
        (SMALL + "queries: ['<Audio><AudioHere></Audio> ']\n", "mine.yaml:3: queries: query 0 asks nothing beside"),
        (SMALL + "top_k_species: 2\nqueries: ['{species_list}']\n", "mine.yaml:4: queries: query 0 asks nothing"),
        (SMALL + "queries: ['{randomize}<AudioHere>']\n", "mine.yaml:3: queries: query 0 asks nothing beside"),
        (SMALL + "queries: [a, b]\ntargets: [label]\n", "mine.yaml:4: targets: 1 targets for 2 queries"),
        (SMALL + "queries: [a]\ntargets: [scientific]\n", "scientific and combined names need a label_map"),
        (SMALL + "label_map: nowhere.csv\n", "nowhere.csv: cannot be read (No such file"),
        (SMALL + "generate: {temperature: 0.5}\n", "sampling (temperature above 0) needs num_beams: 1"),
        (SMALL + "generate: {temperature: 1.0e-300, num_beams: 1}\n", "generate: a temperature above 0 is 0.01 or"),
        (SMALL + "generate: {temperature: 1.0e+300, num_beams: 1}\n", "temperature: input should be less"),
        (SMALL + "generate: {length_penalty: 1.0e+300}\n", "generate.length_penalty: input should be less"),
        (SMALL + f"generate: {{num_beams: {2**70}}}\n", "generate.num_beams: input should be less"),
        (SMALL + f"seed: {2**64}\ngenerate: {{temperature: 1.0, num_beams: 1}}\n", "mine.yaml:3: seed: sampling needs"),
        (SMALL + "seed: -1\ngenerate: {temperature: 1.0, num_beams: 1}\n", "mine.yaml:3: seed: sampling needs"),
        (SMALL + "queries: [a\n", "mine.yaml:4: not YAML"),
        (SMALL + "a: &x 1\nb: *x\n", "mine.yaml:4: not YAML: aliases are not used here"),
        ("[" * 300, "mine.yaml:1: not YAML: nested too deeply"),
        ("- a\n", "mine.yaml:1: a recipe is a mapping of keys to values"),
        ("", "mine.yaml:1: a recipe is a mapping of keys to values"),
        (SMALL + "name: !!python/object:os.system x\n", "mine.yaml:3: not YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_line_with_line_key_and_suggestion(tmp_path, text, said):
    assert said in refused(tmp_path, text)


def test_a_recipe_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")


REFERENCE = r"""
model:
  llama_path: meta-llama/Meta-Llama-3.1-8B-Instruct
  ckpt: EarthSpeciesProject/NatureLM-audio
  freeze_beats: true
  use_audio_Qformer: true
  max_txt_len: 160
  prompt_template: TEMPLATE
generate:
  max_new_tokens: 100
  num_beams: 2
  do_sample: false
  min_length: 1
  temperature: 0.1
  repetition_penalty: 1.0
  length_penalty: 1.0
extended:
  datasets: [unseen-family-cmn]
  lora_scales: [0.0, 0.5, 1.0]
  species:
    - name: "Spotted Elachura"
      description: "[bird-like chirping and trilling]"
    - name: "Dall's Porpoise"
      description: "[high-pitched clicks and whistles]"
  n_examples: 5
  queries:
    - "One of: {species_list}\n\n{audio_examples}\n\nAudio: <Audio><AudioHere></Audio>\nLabel:{randomize}"
""".replace("TEMPLATE", json.dumps(LLAMA3_TEMPLATE))


def test_the_references_recipe_is_translated_and_said_to_be(tmp_path):
    loaded = load_recipe(write(tmp_path, REFERENCE))
    assert loaded.recipe == Recipe(
        name="mine",
        merge=MergeRequest(
            base="meta-llama/Meta-Llama-3.1-8B-Instruct",
            adapter="EarthSpeciesProject/NatureLM-audio",
            alphas=(0.0, 0.5, 1.0),
        ),
        datasets=(DatasetChoice(name="unseen-family-cmn"),),
        species=(
            Species(name="Spotted Elachura", description="[bird-like chirping and trilling]"),
            Species(name="Dall's Porpoise", description="[high-pitched clicks and whistles]"),
        ),
        n_examples=5,
        queries=("One of: {species_list}\n\n{audio_examples}\n\nAudio: <Audio><AudioHere></Audio>\nLabel:{randomize}",),
    )  # fmt: skip
    assert "translated" in loaded.notes[0]
    assert "model.freeze_beats, model.max_txt_len, model.use_audio_Qformer" in loaded.notes[1]


def test_the_references_own_defaults(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "model: {}\ngenerate: {merging_alpha: 0.4, do_sample: true, num_beams: 1, temperature: 0.7}\n")
    )
    assert recipe.recipe.merge.alphas == (0.4,)
    assert recipe.recipe.generate == Generate(num_beams=1, temperature=0.7)
    assert len(recipe.recipe.datasets) == 22


@pytest.mark.parametrize("no", ["no", "No", "off", "OFF", "false"])
def test_no_is_false_as_where_the_references_recipes_are_read(tmp_path, no):
    text = f"model: {{}}\ngenerate: {{merging_alpha: 0.4, do_sample: {no}, num_beams: 1, temperature: 0.7}}\n"
    assert load_recipe(write(tmp_path, text)).recipe.generate == Generate(num_beams=1)
    assert load_recipe(write(tmp_path, SMALL + f"streaming: {no}\n")).recipe.streaming is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("lora_scales", "lora_scale"), "mine.yaml:19: extended.lora_scale: unknown key; did you mean 'lora_scales'?"),
        (("num_beams", "numbeams"), "mine.yaml:11: generate.numbeams: unknown key; did you mean 'num_beams'?"),
        (
            ("extended:", "extende:\n  a: 1\nextended:"),
            "mine.yaml:17: extende: unknown section; did you mean 'extended'?",
        ),
        (("user<|end", "system<|end"), "mine.yaml:8: model.prompt_template: only NatureLM-audio's own chat template"),
        (("[0.0, 0.5, 1.0]", "half"), "mine.yaml:19: extended.lora_scales: 'half' is not a number"),
        (("[unseen-family-cmn]", "[unseen-family]"), "extended.datasets: unknown component 'unseen-family'; did"),
        (("1.0]", "x]"), "mine.yaml:19: extended.lora_scales[2]: 'x' is not a number"),
        (("{audio_examples}", "{audio_example}"), "mine.yaml:27: extended.queries[0]: unknown flag '{audio_example}'"),
        (("llama_path: meta", "llama_path: 3 #"), "mine.yaml:3: model.llama_path: input should be a valid string"),
        (("      description", "      descriptio"), "mine.yaml:22: extended.species[0].descriptio: unknown key; "),
    ],
)
def test_a_wrong_reference_recipe_is_one_line(tmp_path, change, said):
    assert said in refused(tmp_path, REFERENCE.replace(*change))


def test_a_wrong_alpha_outside_of_a_sweep_is_named_where_it_stands(tmp_path):
    said = "mine.yaml:2: generate.merging_alpha: 'half' is not a number"
    assert said in refused(tmp_path, "model: {}\ngenerate: {merging_alpha: half}\n")


def test_recipes_are_found_by_name_by_path_and_as_the_readme_writes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = shipped_recipes()["watkins"]
    assert find_recipe("watkins") == find_recipe("recipes/watkins.yaml") == find_recipe("watkins.yaml") == shipped
    write(tmp_path, SMALL)
    assert find_recipe("mine.yaml") == Path("mine.yaml")
    with pytest.raises(RecipeError, match="watkin: no such recipe; did you mean 'watkins'"):
        find_recipe("watkin")
    assert find_label_map(Path("watkins_corrected.csv")).is_file()


def test_a_copied_recipe_works_where_it_is(tmp_path):
    files = copy_shipped("watkins", tmp_path)
    assert files == [tmp_path / "watkins.yaml", tmp_path / "labels" / "watkins.csv"]
    assert load_recipe(files[0]).recipe == load_recipe(shipped_recipes()["watkins"]).recipe
    with pytest.raises(OutputError, match="exists already"):
        copy_shipped("watkins", tmp_path)
    assert copy_shipped("watkins", f"{tmp_path}/new/folder/")[0] == tmp_path / "new/folder/watkins.yaml"
    assert copy_shipped("watkins", tmp_path / "whales.yaml")[0].read_text() == files[0].read_text()
    with pytest.raises(RecipeError, match="no such recipe; did you mean 'cbi'"):
        copy_shipped("cbii", tmp_path)


def test_every_shipped_recipe_is_plain_yaml():
    for file in shipped_recipes().values():
        assert isinstance(yaml.safe_load(file.read_text()), dict)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("label,name\na,b\n", "map.csv:1: the column 'scientific' is missing"),
        ("label,scientific\na,\n", "map.csv:2: a line needs a label and a scientific name"),
        ("label,scientific\na\n", "map.csv:2: fewer values than columns"),
        ("label,scientific\na,b\na,c\n", "map.csv:3: the label 'a' stands in the file twice"),
        ("label,scientific\n", "no label in it"),
        ('label,scientific\n"a,b\n', "damaged"),
    ],
)
def test_a_wrong_label_map_is_one_line(tmp_path, content, said):
    (tmp_path / "map.csv").write_text(content)
    with pytest.raises(RecipeError) as error:
        read_label_map(tmp_path / "map.csv")
    assert said in str(error.value)


def test_a_name_that_no_file_can_hold_is_named_with_its_line(tmp_path):
    (tmp_path / "names.jsonl").write_text('{"label": "a", "scientific_name": "\\ud800"}')
    with pytest.raises(RecipeError, match=r"names.jsonl:1: the names must be texts without a lone surrogate"):
        read_label_map(tmp_path / "names.jsonl")
