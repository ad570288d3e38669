"""The command line as a whole: its help, its start, its completion."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from mergekit_bio.cli.app import app

PROGRAM = Path(sys.executable).with_name("mergekit-bio")


def commands() -> Iterator[tuple[str, ...]]:
    for name, command in get_command(app).commands.items():
        yield from ((name, inner) for inner in command.commands) if hasattr(command, "commands") else ((name,),)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([PROGRAM, *words], env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_fits_a_terminal_and_has_two_examples_that_can_be_typed(words: tuple[str, ...]) -> None:
    shown = run(*words, "--help", COLUMNS="80").stdout

    assert [line for line in shown.splitlines() if len(line) > 80] == []
    (block,) = re.findall(r"^  Examples:\n((?:    .+\n)+)", shown, re.MULTILINE)
    examples = block.replace("\\\n", "").splitlines()
    assert len(examples) >= 2
    for example in examples:
        typed = shlex.split(example.split(" && ")[0])
        command = get_command(app)
        for name in words:
            command = command.commands[name]
        assert tuple(typed[: len(words) + 1]) == ("mergekit-bio", *words)
        command.make_context(words[-1], typed[len(words) + 1 :])


def test_help_imports_nothing_that_takes_time() -> None:
    program = "import sys; from mergekit_bio.cli.app import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)

    assert "Commands:" in done.stdout
    heavy = {"torch", "numpy", "transformers", "vllm", "pydantic", "yaml", "huggingface_hub", "httpx"}
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize(
    ("typed", "offered"), [("mergekit-bio in", "inspect"), ("mergekit-bio merge --rou", "--rounding")]
)
def test_the_shell_completes_commands_and_options(typed: str, offered: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}

    assert offered in run(_MERGEKIT_BIO_COMPLETE="complete_bash", **words).stdout.split()
    assert "complete_bash" in run(_MERGEKIT_BIO_COMPLETE="source_bash").stdout


def test_a_package_of_an_extra_that_is_missing_is_named_with_what_brings_it(make_run) -> None:
    program = "import sys; sys.modules['rapidfuzz'] = None; from mergekit_bio.cli.app import main; main()"
    command = [sys.executable, "-c", program, "report", str(make_run()), "--scorer", "paper"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr == "error: this needs rapidfuzz; install it with: pip install 'mergekit-bio[eval]'\n"


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("push", "--dry-run", "owl/owls")])
def test_what_the_system_says_of_a_file_is_one_line(command: tuple[str, ...]) -> None:
    done = run(*command[:1], "x" * 300, *command[1:])

    assert done.returncode == 1
    assert re.fullmatch(r"error: .*x{300}.*\n", done.stderr)


@pytest.mark.parametrize("encoding", ["utf-8:strict", "latin-1", "ascii"])
def test_what_the_terminals_encoding_lacks_is_shown_escaped(encoding: str) -> None:
    text = "\udcff \xe9 \u9ce5 \U0001f438"
    program = (
        "import sys; from mergekit_bio.cli.console import Output; output = Output(as_json='json' in sys.argv)\n"
        f"output.note({text!r}); output.result([{text!r}], lambda console: console.print({text!r}))"
    )

    def run(*words: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        return subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, check=True)

    expected = text.encode(encoding.partition(":")[0], "backslashreplace") + b"\n"
    assert (run().stdout, run().stderr) == (expected, expected)
    # JSON has no half of a surrogate pair.
    assert json.loads(run("json").stdout.decode(encoding.partition(":")[0])) == [text.replace("\udcff", "\\udcff")]


def test_a_bug_is_a_traceback(make_run) -> None:
    hidden = "import sys; sys.modules['mergekit_bio.eval.records.read'] = None"
    program = f"{hidden}; from mergekit_bio.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "report", str(make_run())], capture_output=True, text=True)

    assert "Traceback" in done.stderr
