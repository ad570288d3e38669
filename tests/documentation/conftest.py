"""A folder in which the pages' commands find what they name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    from documentation.standins import write_standins

    folder = tmp_path_factory.mktemp("documentation")
    write_standins(folder, make_run)
    return folder


@pytest.fixture
def here(standins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for one command, and no network, in this process and in those it starts."""
    import datasets
    from huggingface_hub import constants

    folder = shutil.copytree(standins, tmp_path / "here", copy_function=os.link, symlinks=True)
    cache = f"{standins}-datasets"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)
    return folder
