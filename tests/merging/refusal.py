"""The command line, in this process, on input that it has to refuse."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from mergekit_bio.cli.app import main


def refused(*arguments: object, watch: Path) -> str:
    """Run ``mergekit-bio`` with ``arguments`` and make sure that it refuses as it promises.

    That is: exit code 1, one line on stderr, nothing on stdout, and everything under ``watch`` as it was.

    Returns:
        The line, without its ``error: ``.
    """
    before = _snapshot(watch)
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["mergekit-bio", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as exit_,
    ):
        main()
    assert exit_.value.code == 1, err.getvalue()
    assert out.getvalue() == ""
    lines = err.getvalue().splitlines()
    assert len(lines) == 1, lines
    assert _snapshot(watch) == before, "something was left behind"
    return lines[0].removeprefix("error: ")


def _snapshot(root: Path) -> dict[Path, bytes | str | None]:
    """Everything under ``root``: contents of files, targets of links, None for directories."""
    return {
        path: str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }
