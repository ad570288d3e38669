"""A small merged checkpoint to put on the hub."""

import shutil
from pathlib import Path

import pytest
from merging.tiny import Case, train, write_base

import mergekit_bio


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
