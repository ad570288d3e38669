"""Fixtures that more than one folder of tests uses."""

import os
from pathlib import Path

import pytest


def _shared(folder: str) -> Path:
    root = os.environ.get("MERGEKIT_BIO_SHARED")
    if not root:
        pytest.skip("MERGEKIT_BIO_SHARED is not set: the reference data is not at hand")
    return Path(root) / folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference tensors, tokens and tiny checkpoints made by the reference implementation."""
    return _shared("golden")


@pytest.fixture(scope="session")
def published() -> Path:
    """The paper's published predictions and the scores they must give."""
    return _shared("published")
