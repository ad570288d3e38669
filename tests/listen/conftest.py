"""One archive, asked about once for all tests of this folder."""

from pathlib import Path

import pytest
from listen.archive import ask, write_archive


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive") / "recordings")


@pytest.fixture(scope="session")
def answered(archive: Path, merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished table and its journal."""
    folder = tmp_path_factory.mktemp("answered")
    ask(merged, archive, folder / "birds.csv")
    return folder
