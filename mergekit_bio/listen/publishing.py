"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_bio.errors import OutputError


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``file`` when the block ends well and vanishes when it does not.

    Raises:
        OutputError: The disk is full or refuses.
    """
    partial = file.with_name(f".{file.name}.partial")
    with problems_with(file):
        try:
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def problems_with(file: Path) -> Iterator[None]:
    """The system's errors in the block as one of ours about ``file``."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror or error})") from error
