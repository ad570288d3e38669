"""``mergekit-bio demo`` and ``eval`` with real vLLM: what they do and their tables, and no warning, at 80 columns."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from demo.terminal import COLUMNS, PROGRAM, Shown, off_a_terminal, on_a_terminal
from documentation.pages import COMMANDS, ROOT

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

MOST_LINES = 80
TROUBLE = re.compile(r"warn|error|traceback|fail|deprecat", re.IGNORECASE)
MODELS = [f"--model=sweep/alpha-{alpha}" for alpha in ("0.00", "0.60", "1.00")]
#: Compiling takes minutes, which a model this small does not earn back.
EAGER = "--engine-option=enforce_eager=true"


def check(lines: list[str]) -> None:
    """No warning, and no line that a terminal would break."""
    assert [line for line in lines if TROUBLE.search(line)] == []
    assert [line for line in lines if len(line) > COLUMNS] == []


def kept_paths(stderr: str, folder: Path) -> list[Path]:
    """The paths in the commands that were shown, with what the shell makes of an asterisk."""
    commands = re.findall(r"^   \$ ((?:.*\\\n)*.*)$", stderr, re.MULTILINE)
    words = [word for command in commands for word in shlex.split(command) if word.startswith(str(folder))]
    assert len(words) >= 10
    return [path for word in words for path in (Path(word).parent.glob("*") if word.endswith("*") else [Path(word)])]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first commands") / "the demo"


@pytest.fixture(scope="module")
def demo(kept: Path) -> subprocess.CompletedProcess[str]:
    """Off a terminal, with everything kept."""
    return off_a_terminal("demo", "--out", kept, cwd=kept.parent)


@pytest.fixture(scope="module")
def demo_on_a_terminal() -> Shown:
    """As README.md has it, where these tests run in the environment that make builds."""
    (command,) = (command for command in COMMANDS if command.words[:2] == ["make", "demo"])
    made = Path(sys.prefix) == ROOT / ".venv"
    return on_a_terminal(*(command.words if made else (PROGRAM, "demo")), cwd=ROOT)


def test_off_a_terminal_the_demo_says_what_it_does_and_its_table_in_eighty_lines(demo):
    stdout, stderr = demo.stdout.splitlines(), demo.stderr.splitlines()
    assert len(stdout) + len(stderr) <= MOST_LINES
    assert [line for line in stdout + stderr if TROUBLE.search(line)] == []
    assert re.search(r"^ *0\.6 +0\.\d\d \[", demo.stdout, re.MULTILINE)
    stages = re.findall(r"^(\d)\. ", demo.stderr, re.MULTILINE)
    assert stages == [str(number) for number in range(1, 9)]


def test_the_commands_that_the_demo_shows_name_what_is_there_afterwards(demo, kept):
    assert [path for path in kept_paths(demo.stderr, kept) if not path.exists()] == []


def test_a_command_that_the_demo_shows_runs_as_it_is_copied(demo, kept):
    (command,) = re.findall(r"^   \$ (mergekit-bio verify (?:.*\\\n)*.*)$", demo.stderr, re.MULTILINE)
    path = f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and "alpha-0.60" in done.stdout, done.stderr


@pytest.mark.soak
def test_on_a_terminal_the_demo_fits_eighty_columns_and_eighty_lines(demo_on_a_terminal):
    check(demo_on_a_terminal.lines)
    assert 20 < demo_on_a_terminal.left <= MOST_LINES
    assert any(re.match(r" *0\.6 +0\.\d\d \[", line) for line in demo_on_a_terminal.lines)


@pytest.mark.soak
def test_a_demo_that_keeps_nothing_shows_no_path_of_what_it_had(demo_on_a_terminal):
    shown = "\n".join(demo_on_a_terminal.lines)
    assert "mergekit-bio-demo" not in shown and "/tmp" not in shown


def test_off_a_terminal_an_evaluation_says_how_far_it_is_and_its_table(demo, kept, tmp_path):
    """vLLM in processes of its own, as it runs by default."""
    done = off_a_terminal("eval", kept / "demo.yaml", *absolute(kept), "--limit=2", EAGER, cwd=tmp_path)
    assert [line for line in (done.stdout + done.stderr).splitlines() if TROUBLE.search(line)] == []
    assert len((done.stdout + done.stderr).splitlines()) <= MOST_LINES
    assert [line.split()[0] for line in re.findall(r"^[01]\S* +\d.*", done.stdout, re.MULTILINE)] == ["0", "0.6", "1"]
    assert "[3/3] alpha-1.00, unheard, query 0: 2 of 2; run 6 of 6" in done.stderr


def test_on_a_terminal_an_evaluation_fits_eighty_columns_and_eighty_lines(demo, kept, tmp_path):
    shown = on_a_terminal(
        PROGRAM, "eval", kept / "demo.yaml", *absolute(kept), "--limit=2", EAGER, cwd=tmp_path,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )  # fmt: skip
    check(shown.lines)
    assert 10 < shown.left <= MOST_LINES


def test_a_warning_that_concerns_the_user_is_shown_and_json_stays_one_document(demo, kept, tmp_path):
    """Of numbers that are rounded otherwise, by the logger that also has something to say at every start."""
    done = off_a_terminal(
        "eval", kept / "demo.yaml", absolute(kept)[0], "--limit=1", EAGER, "--engine-option=dtype=float16", "--json",
        cwd=tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )  # fmt: skip
    assert "Casting torch.bfloat16 to torch.float16" in done.stderr
    assert "mm_device_do_normalize" not in done.stderr
    assert json.loads(done.stdout)["cells"][0]["answered"] == 1


@pytest.mark.soak
def test_quiet_prints_bare_results_and_not_even_a_warning(demo, kept, tmp_path):
    done = off_a_terminal(
        "eval", kept / "demo.yaml", absolute(kept)[0], "--limit=1", EAGER, "--engine-option=dtype=float16", "--quiet",
        cwd=tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["runs/demo", "runs/demo/report/report.html"]


def absolute(folder: Path) -> list[str]:
    return [model.replace("sweep/", f"{folder}/sweep/") for model in MODELS]
