"""``eval --fetch-only``: what a run needs comes from the hub, its size is said before, and then no hub is needed."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from eval.conftest import beans_zero_rows
from hub.server import File, Hub
from tiny_naturelm import make_base, make_naturelm

from mergekit_bio.eval.records.predictions import read_predictions

BASE, ADAPTER, DATA = "owl/llama", "owl/naturelm", "owl/BEANS-Zero"
CARD = b"---\nconfigs:\n- config_name: BEANS-Zero\n  data_files:\n  - split: test\n    path: shard*\n---\n"
#: Rows of another component lie between those of the one that is asked about, and the first shard has Coruros only.
SHARDS = [
    {"unseen-family-cmn": ["Coruro"] * 4, "watkins": ["Walrus"] * 3},
    {"hiceas": ["None"] * 3},
    {"unseen-family-cmn": ["Coruro", "Dall's Porpoise", "Coruro"], "watkins": ["Walrus"] * 3},
]
ON_CPU = ("--engine", "transformers", "--engine-option", "device=cpu", "--no-report")
Command = Callable[..., tuple[int, str, str]]


def shards() -> list[bytes]:
    """Parquet files of small row groups, in which components are mixed; ids are unique over all of them."""
    import datasets
    import pyarrow.parquet

    contents = []
    for number, components in enumerate(SHARDS):
        rows = beans_zero_rows(components)
        rows = sorted(rows, key=lambda row: int(row["id"].rsplit("-", 1)[1]))
        for row in rows:
            row["id"] = f"{number}-{row['id']}"
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(datasets.Dataset.from_list(rows).data.table, buffer, row_group_size=2)
        contents.append(buffer.getvalue())
    return contents


def recording_bytes(contents: list[bytes], *, holding: Callable[[dict], bool]) -> int:
    """What the chunks of audio and metadata take, by the footers, in those row groups that hold such a row."""
    import pyarrow.parquet

    size = 0
    for content in contents:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        for number in range(file.num_row_groups):
            rows = file.read_row_group(number, columns=["id", "dataset_name", "output"]).to_pylist()
            if any(map(holding, rows)):
                group = file.metadata.row_group(number).to_dict()["columns"]
                size += sum(
                    chunk["total_compressed_size"]
                    for chunk in group
                    if chunk["path_in_schema"].startswith(("audio", "metadata"))
                )
    return size


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base")
    return {BASE: base, ADAPTER: make_naturelm(folder / "adapter", base=base)}


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    return shards()


@pytest.fixture
def stocked(
    hub: Hub, models: dict[str, Path], contents: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Hub:
    """A hub that has everything, and empty caches here. All files but configurations and the card are large."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    for name, folder in models.items():
        files = {
            file.name: (File.regular if file.name.endswith("config.json") else hub.keep)(file.read_bytes())
            for file in folder.iterdir()
        }
        hub.create(name).commit(files)
    files = {f"shard-{number}.parquet": hub.keep(content) for number, content in enumerate(contents)}
    hub.create(DATA).commit({"README.md": File.regular(CARD), **files})
    return hub


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "cmn.yaml"
    data = {
        "merge": {"base": BASE, "adapter": ADAPTER, "alphas": [0.0, 1.0]},
        "data": DATA,
        "datasets": ["unseen-family-cmn"],
        "queries": ["What is it?"],
        "generate": {"max_new_tokens": 4, "num_beams": 1},
    }
    file.write_text(yaml.safe_dump(data))
    return file


def no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, and whatever is asked for all the same gets no answer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    hub.lose_connection(after_bytes=0, for_good=True)
    hub.receive(b"")
    assert hub.down
    hub.requests.clear()


def answers(out: Path) -> dict[str, dict[str, tuple]]:
    """File -> clip -> what was generated."""
    return {
        file.name: {row.id: (row.label, tuple(row.generated_ids)) for row in read_predictions(file)}
        for file in sorted(out.glob("*.jsonl"))
    }


def document(command_line: Command, recipe: Path, *options: object) -> dict:
    code, stdout, stderr = command_line("eval", recipe, "--json", "--engine", "transformers", "--fetch-only", *options)
    assert code == 0, stderr
    return json.loads(stdout)


def test_what_was_fetched_is_asked_offline_with_the_answers_of_a_run_with_the_hub(
    stocked: Hub, recipe: Path, command_line: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command_line("eval", recipe, "--out", tmp_path / "online", *ON_CPU)[0] == 0
    for cache in ("hf-cache", "datasets-cache"):
        (tmp_path / cache).rename(tmp_path / f"{cache}-of-before")
    code, stdout, stderr = command_line("eval", recipe, "--out", tmp_path / "offline", "--fetch-only", *ON_CPU)
    assert code == 0, stderr
    assert "to fetch: owl/llama" in stderr and "HF_HUB_OFFLINE=1" in stdout
    assert not (tmp_path / "offline").exists()  # nothing is merged or asked
    no_hub(stocked, monkeypatch)
    code, _, stderr = command_line("eval", recipe, "--out", tmp_path / "offline", *ON_CPU)
    assert code == 0, stderr
    assert not stocked.requests
    online = answers(tmp_path / "online")
    assert len(online) == 2 and all(len(rows) == 7 for rows in online.values())
    assert answers(tmp_path / "offline") == online


def test_the_size_that_is_said_is_what_is_sent(
    stocked: Hub, recipe: Path, command_line: Command, contents: list[bytes], models: dict[str, Path]
) -> None:
    said = document(command_line, recipe, "--dry-run")
    assert not said["fetched"]
    (recordings,) = said["recordings"]
    asked = recording_bytes(contents, holding=lambda row: row["dataset_name"] == "unseen-family-cmn")
    assert recordings["bytes"] == asked and recordings["clips"] == 7
    assert [model["source"] for model in said["models"]] == [BASE, ADAPTER]
    assert said["models"][0]["bytes"] >= (models[BASE] / "model.safetensors").stat().st_size
    assert said["bytes"] == asked + sum(model["bytes"] for model in said["models"])
    before = stocked.sent_bytes
    done = document(command_line, recipe)
    assert done == said | {"fetched": True}
    assert stocked.sent_bytes - before == said["bytes"]
    again = document(command_line, recipe)
    assert again["bytes"] == 0 and stocked.sent_bytes - before == said["bytes"]


@pytest.mark.parametrize(
    ("change", "options", "holding"),
    [
        ({"species": [{"name": "Dall's Porpoise"}]}, (), lambda row: row["output"] == "Dall's Porpoise"),
        ({}, ("--limit", "1"), lambda row: row["id"] == "0-unseen-family-cmn-0"),
        ({"top_k_species": 1}, ("--limit", "3"), lambda row: row["id"] in [f"0-unseen-family-cmn-{n}" for n in "012"]),
        (
            {
                "top_k_species": 2,
                "n_examples": 1,
                "queries": ["{audio_examples} What is <AudioHere>?"],
                "generate": {"num_beams": 1},
            },
            ("--limit", "1"),
            None,
        ),
    ],
    ids=["species", "limit", "species and limit", "examples"],
)
def test_only_row_groups_with_a_clip_that_is_heard_are_fetched(
    stocked: Hub,
    recipe: Path,
    command_line: Command,
    contents: list[bytes],
    change: dict,
    options: tuple[str, ...],
    holding: Callable[[dict], bool] | None,
) -> None:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | change))
    if holding is None:
        shown = json.loads(command_line("eval", recipe, "--show-prompts", "1", "--json")[1])
        heard = shown["prompts"][0]["audios"]
        assert len(heard) == 3
        holding = lambda row: row["id"] in heard  # noqa: E731
    (recordings,) = document(command_line, recipe, *options, "--dry-run")["recordings"]
    assert recordings["bytes"] == recording_bytes(contents, holding=holding)
    everything = recording_bytes(contents, holding=lambda row: True)
    assert 0 < recordings["bytes"] < everything


def test_a_fetch_that_was_cut_off_goes_on_with_what_is_missing(
    stocked: Hub, recipe: Path, command_line: Command, tmp_path: Path
) -> None:
    said = document(command_line, recipe, "--dry-run")
    whole = said["recordings"][0]
    models = sum(model["bytes"] for model in said["models"])
    stocked.sends_at_most = stocked.sent_bytes + models + whole["bytes"] // 2
    code, stdout, stderr = command_line("eval", recipe, "--fetch-only", "--engine", "transformers")
    assert code == 1 and not stdout
    assert stderr.splitlines()[-1].startswith(f"error: {DATA}: cannot be fetched from the Hub")
    assert not list((tmp_path / "datasets-cache").rglob("*.part"))
    stocked.sends_at_most = stocked.sent_bytes + whole["bytes"]
    rest = document(command_line, recipe)
    assert all(model["bytes"] == 0 for model in rest["models"])
    assert 0 < rest["recordings"][0]["row_groups"] < whole["row_groups"]
    assert document(command_line, recipe)["bytes"] == 0


def test_a_licence_that_is_not_accepted_is_said_before_the_data_is_asked_for(
    stocked: Hub, recipe: Path, command_line: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bat")
    stocked.repos[ADAPTER].gated = True
    code, _, stderr = command_line("eval", recipe, "--fetch-only", "--engine", "transformers")
    assert code == 1 and "accept its licence at https://huggingface.co/owl/naturelm" in stderr
    assert not any("BEANS" in request for request in stocked.requests)


def test_checkpoints_on_the_hub_are_fetched_instead_of_what_would_be_merged(
    stocked: Hub, recipe: Path, merged: Path, command_line: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {file.name: stocked.keep(file.read_bytes()) for file in merged.iterdir()}
    stocked.create("owl/half").commit(files)
    options = ("--model", "owl/half", "--limit", "1")
    before = stocked.sent_bytes
    (model,) = document(command_line, recipe, *options, "--dry-run")["models"]
    of_weights = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    assert model["source"] == "owl/half" and model["bytes"] >= of_weights
    assert stocked.sent_bytes - before < of_weights
    document(command_line, recipe, *options)
    no_hub(stocked, monkeypatch)
    code, _, stderr = command_line("eval", recipe, *options, "--out", tmp_path / "run", *ON_CPU)
    assert code == 0, stderr
    assert not stocked.requests and len(answers(tmp_path / "run")) == 1


def test_a_recipe_that_keeps_nothing_is_not_prepared(stocked: Hub, recipe: Path, command_line: Command) -> None:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"streaming": True}))
    code, _, stderr = command_line("eval", recipe, "--fetch-only", "--engine", "transformers")
    assert code == 1 and "streaming keeps no recording on this machine" in stderr


def test_whoever_asks_servers_fetches_no_model(stocked: Hub, recipe: Path, command_line: Command) -> None:
    code, stdout, _ = command_line(
        "eval", recipe, "--json", "--fetch-only", "--dry-run", "--engine", "http", "--server", "http://127.0.0.1:9"
    )
    assert code == 0 and json.loads(stdout)["models"] == []


def test_of_a_local_copy_nothing_is_fetched(
    stocked: Hub, recipe: Path, models: dict[str, Path], contents: list[bytes], command_line: Command, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    for number, content in enumerate(contents):
        (tmp_path / "copy" / f"shard-{number}.parquet").write_bytes(content)
    data = yaml.safe_load(recipe.read_text())
    data["merge"] |= {"base": str(models[BASE]), "adapter": str(models[ADAPTER])}
    recipe.write_text(yaml.safe_dump(data))
    said = document(command_line, recipe, "--data", tmp_path / "copy")
    assert said["bytes"] == 0 and not stocked.requests


def test_a_local_file_that_was_replaced_is_read_again(contents: list[bytes], tmp_path: Path) -> None:
    from mergekit_bio.eval.components import components
    from mergekit_bio.eval.data.beans_zero import open_component

    file = tmp_path / "shard.parquet"
    heard = []
    for content in (contents[0], contents[2]):
        file.write_bytes(content)
        dataset = open_component(components()["unseen-family-cmn"], source=str(file))
        heard.append([(row.id, dataset.audio(row.id)[0].tolist()) for row in dataset.asked])
    assert [len(rows) for rows in heard] == [4, 3]
    assert heard[0][1][1] == heard[1][1][1]  # the recording tells the row's number
