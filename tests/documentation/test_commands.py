"""README.md and docs/: every command of ours that takes seconds runs as it stands, in this process.

What starts vLLM, make or pip is in test_long_commands.py.
"""

import re
import runpy
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from documentation.pages import CLIENTS, COMMANDS, Block, starts_an_engine
from documentation.standins import write_recipes

#: What scores the paper's files again takes more than ten seconds, and so does doctor's import of vLLM.
LONG = r"published|\bdoctor\b"


def cases(commands: list[Block]) -> list:
    return [
        pytest.param(command, id=str(command), marks=pytest.mark.long if re.search(LONG, command.text) else ())
        for command in commands
    ]


OURS = [command for command in COMMANDS if command.words[0] == "mergekit-bio" and not starts_an_engine(command)]
SCRIPTS = [command for command in COMMANDS if command.words[0] == "python" and command not in CLIENTS]


def _remove_outputs(words: list[str]) -> None:
    """What a command is about to make is not there yet."""
    named = [after for word, after in pairwise(words) if word in ("--out", "-o")]
    for output in map(Path, named + (words[-1:] if words[1:3] == ["recipes", "copy"] else [])):
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)


def _skip_without_published(command: Block, here: Path) -> None:
    if "published" in command.text and not (here / "published").exists():
        pytest.skip("the published predictions are not at hand (MERGEKIT_BIO_SHARED)")


@pytest.mark.parametrize("command", cases(OURS))
def test_a_command_of_ours_runs_as_it_stands(
    command: Block, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergekit_bio.cli.app import main

    _skip_without_published(command, here)
    write_recipes(command.page, here)
    _remove_outputs(command.words)
    monkeypatch.setattr(sys, "argv", command.words)
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code in (0, None), capsys.readouterr().err
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("command", cases(SCRIPTS))
def test_a_script_runs_as_it_stands(command: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _skip_without_published(command, here)
    monkeypatch.setattr(sys, "argv", command.words[1:])
    try:
        runpy.run_path(command.words[1], run_name="__main__")
    except SystemExit as ending:
        assert not ending.code, ending.code
