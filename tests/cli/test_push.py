"""``mergekit-bio push`` as a user runs it: a process, its output and its exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.server import Hub, running_hub
from merging.tiny import Case, train, write_base

import mergekit_bio

REPO = "owl/Llama-tiny-owls"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli-push")
    write_base("llama", root / "base")
    train(Case.of("owls"), root / "base", root / "owls")
    (merged,) = mergekit_bio.merge(
        base=root / "base", adapter=root / "owls", alphas=[0.5], out=root / "owls-alpha-0.50", device="cpu"
    )
    return merged.path


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def run(
    hub: Hub, *arguments: object, token: str | None = "hf_owl", home: Path, command: str = "push"
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    if token:
        environment["HF_TOKEN"] = token
    program = "from mergekit_bio.cli.app import main; main()"
    words = [sys.executable, "-c", program, command, *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


def test_pushes_and_prints_what_and_where(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    done = run(hub, checkpoint, REPO, home=tmp_path)

    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in checkpoint.iterdir())
    assert sorted(hub.repos[REPO].files()) == [".gitattributes", *files]
    assert f"sent {len(files)} files" in done.stdout
    assert f"{hub.url}/{REPO}/commit/{hub.repos[REPO].branches['main']}" in done.stdout
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [["uploaded", name] for name in files]


def test_json_is_one_document_with_every_file(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    done = run(hub, checkpoint, REPO, "--json", "--private", home=tmp_path)

    document = json.loads(done.stdout)
    assert document["url"] == f"{hub.url}/{REPO}"
    assert document["commit"] == hub.repos[REPO].branches["main"]
    assert {file["path"]: file["bytes"] for file in document["files"]} == {
        path.name: path.stat().st_size for path in checkpoint.iterdir()
    }
    assert hub.repos[REPO].private


def test_quiet_prints_the_address_only(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    done = run(hub, checkpoint, REPO, "--quiet", home=tmp_path)

    assert done.returncode == 0
    assert done.stdout == f"{hub.url}/{REPO}\n"
    assert done.stderr == ""


def test_dry_run_lists_sizes_without_a_token(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    done = run(hub, checkpoint, REPO, "--dry-run", token=None, home=tmp_path)

    assert done.returncode == 0, done.stderr
    for path in checkpoint.iterdir():
        assert path.name in done.stdout
    assert "would send" in done.stdout
    assert not hub.requests


def test_a_merge_that_is_pushed_is_as_quiet_as_a_push(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    base, adapter = checkpoint.parent / "base", checkpoint.parent / "owls"
    options = ["--alpha", 0.5, "--device", "cpu", "--out", tmp_path / "merged", "--push", REPO, "--quiet"]
    done = run(hub, "--base", base, "--adapter", adapter, *options, home=tmp_path, command="merge")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{hub.url}/{REPO}\n", "")


def test_a_sweep_and_its_receipts(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    sources = checkpoint.parent
    sweep = tmp_path / "sweep"
    mergekit_bio.merge(base=sources / "base", adapter=sources / "owls", alphas=[0, 1], out=sweep, device="cpu")
    done = run(hub, sweep, REPO, "--receipt", "--json", home=tmp_path)

    assert done.returncode == 0, done.stderr
    documents = json.loads(done.stdout)
    assert [document["url"] for document in documents] == [
        f"{hub.url}/{REPO}/tree/alpha-{alpha}" for alpha in ("0.00", "1.00")
    ]
    assert set(hub.repos[REPO].files("alpha-1.00")) == {".gitattributes", "README.md", "merge.json"}
    assert "owls is known by its directory only" in done.stderr
    tried = run(hub, sweep, REPO, "--dry-run", home=tmp_path)
    rows = [line.split() for line in tried.stdout.splitlines() if line.strip().startswith("alpha-")]
    assert [row[0] for row in rows] == ["alpha-0.00", "alpha-1.00"] and len(tried.stdout.splitlines()) < 12
    refused = run(hub, sweep, REPO, "--revision", "v1", home=tmp_path)
    assert refused.returncode == 1 and "has a branch of its own" in refused.stderr


@pytest.mark.parametrize(
    ("token", "repo_id", "options", "said"),
    [
        (None, REPO, [], "not logged in"),
        ("hf_expired", REPO, [], "does not accept your token"),
        ("hf_bat", REPO, [], "may not write here"),
        ("hf_owl", "owls", [], "expected USER/REPO"),
        ("hf_owl", REPO, ["--revision", "v1"], "has no branch 'v1'"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(
    hub: Hub, checkpoint: Path, tmp_path: Path, token: str | None, repo_id: str, options: list[str], said: str
) -> None:
    done = run(hub, checkpoint, repo_id, *options, token=token, home=tmp_path)

    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_lost_connection_is_one_line_that_says_how_to_go_on(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.lose_connection(after_bytes=1, for_good=True)
    # The client tries six times, with half a minute of waiting that nothing depends on.
    patch = "import huggingface_hub.utils._http as http; http.time.sleep = lambda _: None; "
    command = [sys.executable, "-c", patch + "from mergekit_bio.cli.app import main; main()"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_owl"}
    environment |= {"HF_HOME": str(tmp_path)}
    done = subprocess.run([*command, "push", checkpoint, REPO, "-q"], env=environment, capture_output=True, text=True)

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "run the same command again" in line
