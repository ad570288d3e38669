"""What somebody who is not root may do, also where tests run as root."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def for_everybody(folder: Path) -> Iterator[Path]:
    """A copy of a folder that others than root can reach, and write beside."""
    with tempfile.TemporaryDirectory() as beside:
        copy = shutil.copytree(folder, Path(beside) / "copy")
        Path(beside).chmod(0o777)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield copy


@contextmanager
def unprivileged() -> Iterator[None]:
    """Not root, whom permissions do not stop."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
