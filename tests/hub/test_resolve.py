"""Finding a base or an adapter on the hub: downloaded once, and refused in one line that says what to do."""

import hashlib
from pathlib import Path

import pytest
from hub.server import File, Hub, Repo

from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.checkpoint.source import missing_files, on_this_machine, resolve, stated_licence
from mergekit_bio.errors import SourceError

ID = "owl/Llama-tiny"
WEIGHTS = b"weights" * 1000
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


def published(hub: Hub, repo_id: str = ID, *, private: bool = False, gated: bool = False) -> Repo:
    """A repository with a config and a large file, and with what nobody wants to download."""
    repo = hub.create(repo_id, private=private, gated=gated)
    hub.objects[SHA256] = WEIGHTS
    large = File.large(SHA256, len(WEIGHTS))
    files = {"config.json": File.regular(b"{}"), "LICENSE": File.regular(b"Llama"), "model.safetensors": large}
    others = ("original/consolidated.00.pth", "consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
    unwanted = {**dict.fromkeys(others, large), "figure.png": File.regular(b"x")}
    repo.commit(repo.files() | files | unwanted)
    return repo


def refusal(source: str) -> str:
    with pytest.raises(SourceError) as failure:
        resolve(source)
    message = str(failure.value)
    assert "\n" not in message
    assert message.startswith(f"{source}: ")
    return message


def downloads(hub: Hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET /storage/") or "/resolve/" in request]


def test_a_hub_id_is_downloaded_and_known_by_its_commit(hub: Hub) -> None:
    repo = published(hub)
    source = resolve(ID)

    assert (source.id, source.revision, source.given) == (ID, repo.branches["main"], ID)
    assert source.name == "Llama-tiny"
    assert {path.name for path in source.path.iterdir()} == {"config.json", "LICENSE", "model.safetensors"}
    assert (source.path / "model.safetensors").read_bytes() == WEIGHTS


def test_an_old_lora_comes_with_its_bin_file_and_a_new_one_without(hub: Hub) -> None:
    repo = hub.create(ID)
    files = {name: File.regular(b"{}") for name in ("adapter_config.json", "adapter_model.bin", "COPYING")}
    repo.commit(files)
    assert {path.name for path in resolve(ID).path.iterdir()} == files.keys()

    repo.commit(files | {"adapter_model.safetensors": File.regular(b"{}")})
    assert {path.name for path in resolve(ID).path.iterdir()} == {*files, "adapter_model.safetensors"} - {
        "adapter_model.bin"
    }


def test_a_folder_of_a_repository_is_a_source_of_its_own(hub: Hub) -> None:
    """Training leaves an adapter in each checkpoint's folder."""
    repo = published(hub)
    names = ("adapter_config.json", "adapter_model.bin", "README.md", "optimizer.pt", "old/adapter_config.json")
    repo.commit(repo.files() | {f"run/checkpoint-500/{name}": File.regular(b"{}") for name in names})
    folder, commit = f"{ID}/run/checkpoint-500", repo.branches["main"]

    assert missing_files(folder).files == 4
    assert not [request for request in downloads(hub) if request.startswith("GET")]
    source = resolve(f"{folder}@main")
    assert (source.given, source.id, source.revision) == (f"{folder}@main", ID, commit)
    assert {path.name for path in source.path.iterdir()} == {*names[:3], "old"}
    assert source.path == on_this_machine(f"{folder}@{commit}", *names[:2])
    assert inside(source.path, "adapter_config.json").read_bytes() == b"{}"
    assert {path.name for path in source.path.parent.parent.iterdir()} == {"run"}

    assert refusal(f"{ID}/run/checkpoint-600").endswith(f"the repository {ID} has no folder run/checkpoint-600")


def test_shards_come_whatever_they_are_called(hub: Hub) -> None:
    repo = published(hub)
    names = ("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors")
    repo.commit(repo.files() | dict.fromkeys(names, repo.files()["model.safetensors"]))

    assert set(names) <= {path.name for path in resolve(ID).path.iterdir()}


def test_a_look_at_the_configuration_fetches_no_weights(hub: Hub) -> None:
    hub.create(ID).commit({name: File.regular(b"{}") for name in ("adapter_config.json", "adapter_model.bin")})

    assert [path.name for path in resolve(ID, patterns=("*config.json",)).path.iterdir()] == ["adapter_config.json"]


def test_the_second_time_nothing_is_downloaded(hub: Hub) -> None:
    published(hub)
    first = resolve(ID)
    assert downloads(hub)
    hub.requests.clear()

    assert resolve(ID) == first
    assert downloads(hub) == []


def test_a_known_commit_is_not_even_asked_for(hub: Hub) -> None:
    pinned = f"{ID}@{published(hub).branches['main']}"
    first = resolve(pinned)
    hub.requests.clear()

    assert resolve(pinned) == first
    assert hub.requests == []


def test_a_revision_is_a_branch_or_a_commit(hub: Hub) -> None:
    repo = published(hub)
    old = repo.branches["main"]
    repo.branches["v1"] = old
    new = repo.commit(repo.files() | {"config.json": File.regular(b'{"new": true}')})

    assert resolve(ID).revision == new
    assert resolve(f"{ID}@v1").revision == old
    assert resolve(f"{ID}@{old}").revision == old
    assert (resolve(f"{ID}@v1").path / "config.json").read_bytes() == b"{}"


def test_what_was_downloaded_is_found_again_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published(hub)
    first = resolve(ID)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()

    assert resolve(ID) == first
    assert hub.requests == []


def test_a_private_repository_opens_to_its_owner(hub: Hub) -> None:
    repo = published(hub, private=True)

    assert resolve(ID).revision == repo.branches["main"]


def test_a_directory_wins_over_a_hub_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(hub)
    monkeypatch.chdir(tmp_path)
    Path(ID).mkdir(parents=True)

    assert resolve(ID).id is None
    assert hub.requests == []


def test_a_snapshot_in_the_cache_still_knows_where_it_came_from(hub: Hub) -> None:
    published(hub)
    found = resolve(ID)
    again = resolve(found.path)

    assert (again.id, again.revision) == (found.id, found.revision)


def test_gated_says_what_to_accept(hub: Hub) -> None:
    published(hub, "bat/gated", gated=True)

    assert "gated" in (message := refusal("bat/gated"))
    assert "bat/gated and log in" in message


def test_gated_says_so_to_the_anonymous_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published(hub, "bat/gated", gated=True)
    monkeypatch.delenv("HF_TOKEN")

    assert "gated" in refusal("bat/gated")


@pytest.mark.parametrize("token", ["hf_owl", None])
def test_missing_says_that_it_may_be_private(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")

    assert "`hf auth login`" in (message := refusal("owl/nothing"))
    assert "no such repository" in message


def test_private_looks_like_missing_to_others(hub: Hub) -> None:
    published(hub, "bat/secret", private=True)

    assert "private one" in refusal("bat/secret")


def test_a_missing_revision_is_named(hub: Hub) -> None:
    published(hub)

    assert "no revision 'v9'" in refusal(f"{ID}@v9")


def test_a_token_that_the_hub_does_not_know(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")

    assert "`hf auth login`" in refusal(ID)


def test_offline_and_not_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published(hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert "not in the local cache, and the hub cannot be reached" in refusal(ID)


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    assert "the hub cannot be reached" in refusal(ID)


@pytest.mark.parametrize(
    "name",
    ["owl", "owl/", "/owl/tiny", "../owl/tiny", "owl/tiny//more", "owl/..", "owl tiny/x", "daten/vögel",
     "owl/llama--lora", "foo/bar-"],
)  # fmt: skip
def test_neither_a_directory_nor_a_hub_id(hub: Hub, name: str) -> None:
    assert "not a hub id" in refusal(name)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("license: mit", "mit"),
        ("license:\nlanguage: en", None),
        ("license:\n- mit\n- apache-2.0", "mit, apache-2.0"),
        ("license: {", None),
        ("license: mit\ndate: 2026-02-30", "mit"),
        ("license: cc-by-nc-sa-4.0\ntitle: Owls: a LoRA", "cc-by-nc-sa-4.0"),
        ("license:\ntitle: Owls: a LoRA", None),
        ("tags: [x]", None),
    ],
)
def test_the_stated_licence_is_the_cards(tmp_path: Path, metadata: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n\nOwls.\n")

    assert stated_licence(resolve(tmp_path)) == licence


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()

    assert "is a file" in refusal(str(tmp_path / "model.safetensors"))
