"""A hub on this machine, and a small merged checkpoint to put there."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.server import Hub, running_hub
from merging.tiny import Case, train, write_base

import mergekit_bio


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process' huggingface_hub talks to, logged in as ``owl``, with an empty cache."""
    from huggingface_hub import constants

    with running_hub() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_owl")
        # The client waits for seconds between its retries.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield hub


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merged")
    write_base("llama", root / "base")
    train(Case.of("owls"), root / "base", root / "owls")
    (checkpoint,) = mergekit_bio.merge(
        base=root / "base", adapter=root / "owls", alphas=[0.5], out=root / "owls-alpha-0.50", device="cpu"
    )
    return checkpoint.path


@pytest.fixture
def checkpoint(merged: Path, tmp_path: Path) -> Path:
    """A merged checkpoint of its own for one test."""
    return shutil.copytree(merged, tmp_path / merged.name)
