"""Fixtures of the merge tests."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a tiny model of ``tiny.BASES``, written once."""
    from merging.tiny import write_base

    root = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            write_base(name, directory)
        return directory

    return make
