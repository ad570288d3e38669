"""Pushing to a hub that speaks the real protocol, with the real client, and getting the same bytes back."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub.server import File, Hub
from huggingface_hub import snapshot_download
from merging.example import write_example

import mergekit_bio
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import HubError, MergekitBioError, VerificationError
from mergekit_bio.hub.push import PushedFile, push, push_sweep
from mergekit_bio.merging.verify import verify

REPO = "owl/Llama-tiny-owls"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def bytes_of(directory: Path, pattern: str) -> list[int]:
    return [path.stat().st_size for path in sorted(directory.glob(pattern))]


def one_line(failure: pytest.ExceptionInfo[MergekitBioError]) -> str:
    message = str(failure.value)
    assert "\n" not in message
    return message


def test_pushed_checkpoint_downloads_byte_for_byte_and_verifies(hub: Hub, checkpoint: Path) -> None:
    hub.part_bytes = min(bytes_of(checkpoint, "*.safetensors"))
    report = push(checkpoint, REPO)
    downloaded = Path(snapshot_download(REPO))

    fetched = contents(downloaded)
    del fetched[".gitattributes"]
    assert fetched == contents(checkpoint)
    verify(downloaded)
    assert report.url == f"{hub.url}/{REPO}"
    assert report.commit == downloaded.name == hub.repos[REPO].branches["main"]
    assert {file.path: file.bytes for file in report.files} == {name: len(data) for name, data in fetched.items()}
    assert {file.state for file in report.files} == {"uploaded"}
    asked = {request.rsplit("/", 1)[-1] for request in hub.requests}
    # Some shards went in one piece and some in parts, and all through the hub's LFS protocol.
    assert {"create", "batch", "verify", "complete", "1", "2", "main"} <= asked
    assert any(re.fullmatch(r"PUT /storage/\w{64}", request) for request in hub.requests)


def test_everything_appears_in_one_commit(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint, REPO)

    assert len(hub.repos[REPO].commits) == 2, "the empty repository, then the checkpoint"


def test_progress_reports_each_file_when_it_has_arrived(hub: Hub, checkpoint: Path) -> None:
    seen: list[PushedFile] = []
    report = push(checkpoint, REPO, progress=seen.append)

    assert tuple(seen) == report.files


def test_pushing_again_sends_and_commits_nothing(hub: Hub, checkpoint: Path) -> None:
    first = push(checkpoint, REPO)
    sent = hub.uploaded_bytes
    second = push(checkpoint, REPO)

    assert hub.uploaded_bytes == sent
    assert second.commit == first.commit
    assert {file.state for file in second.files} == {"unchanged"}


def test_only_what_changed_is_sent(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint, REPO)
    sent = hub.uploaded_bytes
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n\nMy owls.\n")
    report = push(checkpoint, REPO)

    assert hub.uploaded_bytes == sent
    assert [file.path for file in report.files if file.state == "uploaded"] == ["README.md"]
    assert hub.repos[REPO].files()["README.md"].content == (checkpoint / "README.md").read_bytes()


def test_a_connection_dropped_once_is_survived(hub: Hub, checkpoint: Path) -> None:
    first, second, *_ = bytes_of(checkpoint, "*.safetensors")
    hub.lose_connection(after_bytes=first + second // 2, for_good=False)
    push(checkpoint, REPO)

    fetched = contents(Path(snapshot_download(REPO)))
    assert {name: fetched[name] for name in contents(checkpoint)} == contents(checkpoint)


def test_a_push_cut_off_is_resumed_by_the_next(hub: Hub, checkpoint: Path) -> None:
    first, second, *rest = bytes_of(checkpoint, "*.safetensors")
    hub.lose_connection(after_bytes=first + second // 2, for_good=True)
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO)
    assert "run the same command again" in one_line(failure)
    assert set(hub.repos[REPO].files()) == {".gitattributes"}, "nothing half-done is visible"

    hub.restore_connection()
    before = hub.uploaded_bytes
    push(checkpoint, REPO)
    assert hub.uploaded_bytes - before == second + sum(rest), "the first shard was there and is not sent again"
    verify(Path(snapshot_download(REPO)))


def test_a_push_killed_in_the_middle_is_resumed_by_the_next(hub: Hub, checkpoint: Path) -> None:
    first, *rest = bytes_of(checkpoint, "*.safetensors")
    code = (
        "import os, signal, sys\n"
        "from mergekit_bio.hub.push import push\n"
        "die = lambda file: file.path.startswith('model-00001') and os.kill(os.getpid(), signal.SIGKILL)\n"
        "push(sys.argv[1], sys.argv[2], progress=die)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    killed = subprocess.run([sys.executable, "-c", code, checkpoint, REPO], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert hub.uploaded_bytes == first

    push(checkpoint, REPO)
    assert hub.uploaded_bytes == first + sum(rest)


def test_weights_of_an_earlier_push_do_not_linger(hub: Hub, checkpoint: Path) -> None:
    repo = hub.create(REPO)
    stale = {"model.safetensors": File.regular(b"old"), "model-00009-of-00009.safetensors": File.regular(b"old")}
    kept = ("adapter_model.safetensors", "figure.png", "models/whale/detector.safetensors", "model_card.safetensors",
            "model-gguf/model.safetensors")  # fmt: skip
    others = {name: File.regular(b"x") for name in kept}
    repo.commit(repo.files() | stale | others)
    report = push(checkpoint, REPO)

    assert report.removed == ("model-00009-of-00009.safetensors", "model.safetensors")
    assert set(repo.files()) == {".gitattributes", *others, *contents(checkpoint)}


def test_hidden_unfinished_and_locked_files_stay_at_home(hub: Hub, checkpoint: Path) -> None:
    published = contents(checkpoint)
    for name in (".env", ".cache/huggingface/x", "out.lock", "model.safetensors.partial", "x.incomplete", "x.tmp"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("secret")
    report = push(checkpoint, REPO)

    assert set(hub.repos[REPO].files()) == {".gitattributes", *published}
    assert report.left_out == (".cache", ".env", "model.safetensors.partial", "out.lock", "x.incomplete", "x.tmp")


def test_a_link_is_refused_by_name(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO)

    assert "notes.txt: is a link" in one_line(failure)
    assert not hub.requests


def test_a_linked_folder_is_refused_by_name(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "figures").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO)

    assert "figures: is a link" in one_line(failure)


def test_a_directory_that_does_not_verify_is_refused(hub: Hub, checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(VerificationError) as failure:
        push(checkpoint, REPO)

    assert shard.name in one_line(failure)
    assert not hub.requests


def test_a_sweep_is_no_single_checkpoint_and_its_checkpoints_are_named(
    hub: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    for alpha in ("alpha-0.00", "alpha-0.50"):
        shutil.copytree(checkpoint, tmp_path / "sweep" / alpha)
    with pytest.raises(HubError) as failure:
        push(tmp_path / "sweep", REPO)

    message = one_line(failure)
    assert "holds 2 checkpoints (alpha-0.00, alpha-0.50)" in message
    assert f"mergekit-bio push {tmp_path / 'sweep' / 'alpha-0.00'} {REPO}-alpha-0.00" in message
    assert not hub.requests


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three strengths that share files by hard links."""
    base, adapter = write_example(tmp_path)
    mergekit_bio.merge(base=base, adapter=adapter, alphas=["0:1:0.5"], out=tmp_path / "sweep", device="cpu")
    return tmp_path / "sweep"


def large_bytes(sweep: Path) -> int:
    """Bytes of weights, those with several names counted once."""
    return sum({path.stat().st_ino: path.stat().st_size for path in sweep.rglob("*.safetensors")}.values())


ALPHAS = ["alpha-0.00", "alpha-0.50", "alpha-1.00"]


def test_a_sweep_goes_to_branches_of_one_repository_and_what_is_shared_is_sent_once(hub: Hub, sweep: Path) -> None:
    reports = push_sweep(sweep, REPO)

    assert hub.uploaded_bytes == large_bytes(sweep)
    assert [report.url for report in reports] == [f"{hub.url}/{REPO}/tree/{alpha}" for alpha in ALPHAS]
    for alpha, report in zip(ALPHAS, reports, strict=True):
        assert report.commit == hub.repos[REPO].branches[alpha]
        downloaded = Path(snapshot_download(REPO, revision=alpha))
        fetched = contents(downloaded)
        del fetched[".gitattributes"]
        assert fetched == contents(sweep / alpha)
        verify(downloaded)
    assert {file.state for file in reports[0].files} == {"uploaded"}
    shared = [file.path for file in reports[2].files if file.state == "shared"]
    assert shared == sorted(path.name for path in (sweep / ALPHAS[2]).iterdir() if path.stat().st_nlink > 1)
    assert len(shared) == 2


def test_the_main_branch_of_a_sweep_says_which_strengths_there_are(hub: Hub, sweep: Path) -> None:
    push_sweep(sweep, REPO)

    files = hub.repos[REPO].files()
    assert set(files) == {".gitattributes", "README.md"}
    card = (files["README.md"].content or b"").decode()
    assert all(f"[`{alpha}`](https://huggingface.co/{REPO}/tree/{alpha})" in card for alpha in ALPHAS)
    assert f"{REPO}@alpha-1.00" in card and "α" in card


def test_a_sweep_that_was_cut_off_goes_on_and_a_second_push_sends_nothing(hub: Hub, sweep: Path) -> None:
    hub.lose_connection(after_bytes=large_bytes(sweep) - 1000, for_good=True)  # in the last strength
    with pytest.raises(HubError) as failure:
        push_sweep(sweep, REPO)
    assert "run the same command again" in one_line(failure)

    hub.restore_connection()
    before = hub.uploaded_bytes
    push_sweep(sweep, REPO)
    last = sum(path.stat().st_size for path in (sweep / ALPHAS[2]).glob("*.safetensors") if path.stat().st_nlink == 1)
    assert hub.uploaded_bytes - before == last
    before = hub.uploaded_bytes
    commits = len(hub.repos[REPO].commits)
    again = push_sweep(sweep, REPO)
    assert (hub.uploaded_bytes, len(hub.repos[REPO].commits)) == (before, commits)
    assert {file.state for report in again for file in report.files} == {"unchanged"}


def test_a_merge_at_several_strengths_is_pushed_as_its_sweep_would_be(
    hub: Hub, sweep: Path, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    sources = ["--base", sweep.parent / "base", "--adapter", sweep.parent / "adapter", "--device", "cpu"]
    options = ["--alpha", "0:1:0.5", "--out", sweep.parent / "again", "--push", REPO]
    code, out, err = command_line("merge", *sources, *options, "--json")

    assert code == 0, err
    assert json.loads(out)["pushed"] == [f"{hub.url}/{REPO}/tree/{alpha}" for alpha in ALPHAS]
    assert set(hub.repos[REPO].branches) == {"main", *ALPHAS}


def test_a_receipt_is_no_model_and_says_how_to_make_one(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint, REPO, receipt=True)
    with pytest.raises(MergekitBioError) as failure:
        Checkpoint.open(resolve(REPO).path)

    assert "it has a receipt: mergekit-bio rebuild " in one_line(failure)


def test_a_sweep_is_not_pushed_over_a_checkpoint(hub: Hub, checkpoint: Path, sweep: Path) -> None:
    push(checkpoint, REPO)
    with pytest.raises(HubError) as failure:
        push_sweep(sweep, REPO)

    assert "its main branch holds a checkpoint" in one_line(failure)


def test_what_a_killed_merge_left_is_no_strength_of_a_sweep(hub: Hub, sweep: Path) -> None:
    shutil.copytree(sweep / ALPHAS[0], sweep / ".alpha-0.25.0123abcd.partial")  # killed when all was written
    assert [report.url.rsplit("/")[-1] for report in push_sweep(sweep, REPO)] == ALPHAS
    assert set(hub.repos[REPO].branches) == {"main", *ALPHAS}


@pytest.mark.parametrize(
    ("options", "differing"),
    [
        ({"base": "other/base"}, "base"),
        ({"adapter": "other/adapter"}, "adapters"),
        ({"seed": 1}, "seed"),
        ({"dtype": "float32", "rounding": "nearest"}, "dtype and rounding"),
    ],
    ids=str,
)
def test_checkpoints_of_other_sources_are_no_sweep(
    hub: Hub, sweep: Path, tmp_path: Path, options: dict, differing: str
) -> None:
    (tmp_path / "other").mkdir()
    write_example(tmp_path / "other", seed=1)
    request = {"base": "base", "adapter": "adapter"} | options
    request |= {source: tmp_path / request[source] for source in ("base", "adapter")}
    mergekit_bio.merge(**request, alphas=[0.7], out=sweep / "alpha-0.70", device="cpu", fsync=False)
    with pytest.raises(HubError) as failure:
        push_sweep(sweep, REPO)

    assert f"alpha-0.00 and alpha-0.70 were merged with different {differing};" in one_line(failure)
    assert not hub.requests


def test_the_card_of_a_sweep_has_every_licence_that_its_sources_state(hub: Hub, sweep: Path) -> None:
    base = Path(shutil.copytree(sweep.parent / "base", sweep.parent / "published"))
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (sweep.parent / "adapter/README.md").write_text("---\nlicense: mit\n---\n")
    adapter = sweep.parent / "adapter"
    mergekit_bio.merge(base=base, adapter=adapter, alphas=[0.7], out=sweep / "alpha-0.70", device="cpu", fsync=False)
    push_sweep(sweep, REPO)

    card = (hub.repos[REPO].files()["README.md"].content or b"").decode()
    assert {"mit", "cc-by-nc-4.0"} == set(card.split("license_name: ")[1].split("\n")[0].split("-and-"))
    assert "`published`: [" in card.split("## Licences")[1] and "`adapter`: [" in card.split("## Licences")[1]


def test_a_dry_run_of_a_sweep_counts_what_is_shared_once(hub: Hub, sweep: Path) -> None:
    reports = push_sweep(sweep, REPO, dry_run=True)

    planned = [file for report in reports for file in report.files if file.state == "planned"]
    assert sum(file.bytes for file in planned if file.path.endswith(".safetensors")) == large_bytes(sweep)
    assert not hub.requests


def test_a_receipt_is_published_without_weights(hub: Hub, checkpoint: Path) -> None:
    report = push(checkpoint, REPO, receipt=True)

    files = hub.repos[REPO].files()
    assert set(files) == {".gitattributes", "README.md", "merge.json"}
    assert files["merge.json"].content == (checkpoint / "merge.json").read_bytes()
    assert sum(file.size for file in files.values()) < 20_000 and hub.uploaded_bytes == 0
    card = (files["README.md"].content or b"").decode()
    assert f"mergekit-bio rebuild {REPO} --out" in card
    assert "from_pretrained" not in card and "library_name" not in card
    assert [note.split(" is ")[0] for note in report.notes] == ["base", "owls"]  # nobody else has these directories


def test_a_receipt_does_not_replace_a_checkpoint(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint, REPO)
    before = hub.repos[REPO].files()
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO, receipt=True)

    assert "holds a checkpoint's weights" in one_line(failure)
    assert hub.repos[REPO].files() == before


def test_a_receipt_of_an_older_format_is_refused(hub: Hub, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "merge.json").read_text())
    for key in ("arithmetic", "tokenizer", "sweep"):
        del manifest[key]
    (checkpoint / "merge.json").write_text(json.dumps(manifest | {"format": "mergekit-bio/merge@2"}))
    push(checkpoint, REPO)  # whole, it is as good as any
    with pytest.raises(HubError) as failure:
        push(checkpoint, "owl/receipt", receipt=True)

    assert "format 'mergekit-bio/merge@2', from which a checkpoint cannot be rebuilt" in one_line(failure)


def test_a_directory_without_manifest_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(HubError) as failure:
        push(tmp_path / "base", REPO)

    assert "it has no merge.json" in one_line(failure)


def test_a_missing_directory_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError) as failure:
        push(tmp_path / "nowhere", REPO)

    assert one_line(failure) == f"{tmp_path / 'nowhere'}: no such directory"


def test_dry_run_lists_files_and_sizes_and_asks_nobody(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    report = push(checkpoint, REPO, dry_run=True)

    assert {file.path: file.bytes for file in report.files} == {k: len(v) for k, v in contents(checkpoint).items()}
    assert {file.state for file in report.files} == {"planned"}
    assert report.commit is None
    assert not hub.requests


def test_private_makes_the_repository_private(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint, REPO, private=True)

    assert hub.repos[REPO].private


def test_private_is_not_uploaded_to_a_public_repository(hub: Hub, checkpoint: Path) -> None:
    hub.create(REPO)
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO, private=True)

    assert "exists and is public" in one_line(failure)
    assert hub.uploaded_bytes == 0


def test_revision_pushes_to_that_branch(hub: Hub, checkpoint: Path) -> None:
    repo = hub.create(REPO)
    repo.branches["v1/owls"] = repo.branches["main"]
    report = push(checkpoint, REPO, revision="v1/owls")

    assert report.commit == repo.branches["v1/owls"]
    assert set(repo.files("v1/owls")) == {".gitattributes", *contents(checkpoint)}
    assert set(repo.files("main")) == {".gitattributes"}


def test_a_missing_branch_names_the_command_that_makes_it(hub: Hub, checkpoint: Path) -> None:
    hub.create(REPO)
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO, revision="v1")

    assert one_line(failure) == f"{REPO}: has no branch 'v1'; create it with: hf repos branch create {REPO} v1"


@pytest.mark.parametrize(
    "repo_id", ["owls", "owl/a/b", "owl/.owls", "owl/ow ls", "owl/owls@main", "https://x.y/owl/owls", ""]
)
def test_an_impossible_repository_name_is_refused(hub: Hub, checkpoint: Path, repo_id: str) -> None:
    with pytest.raises(HubError) as failure:
        push(checkpoint, repo_id)

    assert "expected USER/REPO" in one_line(failure)
    assert not hub.requests


def test_not_logged_in(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO)

    assert f"not logged in to {hub.url}: run 'hf auth login'" in one_line(failure)
    assert not hub.requests


def test_a_token_that_the_hub_does_not_know(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO)

    assert "does not accept your token; run 'hf auth login'" in one_line(failure)


def test_somebody_elses_name_space(hub: Hub, checkpoint: Path) -> None:
    with pytest.raises(HubError) as failure:
        push(checkpoint, "bat/Llama-tiny-owls")

    assert "your token may not write here" in one_line(failure)


def test_somebody_elses_repository(hub: Hub, checkpoint: Path) -> None:
    hub.create("bat/Llama-tiny-owls")
    with pytest.raises(HubError) as failure:
        push(checkpoint, "bat/Llama-tiny-owls")

    assert "bat/Llama-tiny-owls: your token may not write here" in one_line(failure)
    assert hub.uploaded_bytes == 0


def test_somebody_elses_gated_repository(hub: Hub, checkpoint: Path) -> None:
    hub.create("bat/gated", gated=True)
    with pytest.raises(HubError) as failure:
        push(checkpoint, "bat/gated")

    assert f"is gated; accept its terms at {hub.url}/bat/gated" in one_line(failure)


def test_a_card_that_the_hub_refuses(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: other\n---\n")
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO)

    assert "Invalid metadata in README.md" in one_line(failure)


def test_offline(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO)

    assert "HF_HUB_OFFLINE is set" in one_line(failure)


def test_nobody_answers(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError) as failure:
        push(checkpoint, REPO)

    assert "run the same command again" in one_line(failure)
