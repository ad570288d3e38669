"""README.md and docs/: what starts vLLM, make or pip runs as it stands, in a shell."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from documentation.pages import COMMANDS, PAGES, ROOT, SCRIPTS, Block, starts_an_engine
from documentation.standins import write_recipes

VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
MADE = ROOT / ".venv"
PYTHONS = Path(sys.executable).parent


def named(*words: str) -> list[Block]:
    return [command for command in COMMANDS if command.words[: len(words)] == [*words]]


#: In blocks and in prose.
ENVIRONMENTS = sorted(
    {line for page in PAGES for line in re.findall(r"(?:^|`)(make env EXTRAS=\S+?)[ `]", page.read_text(), re.M)}
)


def environment(folder: Path = PYTHONS) -> dict[str, str]:
    """A shell's in which the programs of a virtual environment come first, and that no make has started."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return kept | {"PATH": f"{folder}:{os.environ['PATH']}"}


def shell(line: str, *, programs: Path = PYTHONS, cwd: Path | None = None, **more: str) -> str:
    """What a line prints; a failure of the test with all of it if it fails."""
    done = subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=environment(programs) | more, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}"
    return done.stdout


EVALUATIONS = [command for command in named("mergekit-bio", "eval") if starts_an_engine(command)]
ASKED = [command for command in named("mergekit-bio", "ask") if starts_an_engine(command)]
PROBES = [command for command in EVALUATIONS if "--probe" in command.words]


def once_each(commands: Iterable[Block]) -> Iterator[Any]:
    """Of commands that differ in a variable, in where they write or what they ask, the first; the others are soaks."""
    run: set[tuple[str, ...]] = set()
    for command in commands:
        words = command.words[command.words.index("mergekit-bio") :]
        kind = tuple(word for before, word in pairwise(["", *words]) if not {"--out", "--model"} & {before, word})
        yield pytest.param(command, marks=pytest.mark.soak if kind in run else pytest.mark.long)
        run.add(kind)


@VLLM
@pytest.mark.parametrize("command", once_each(one for one in EVALUATIONS if one not in PROBES), ids=str)
def test_an_evaluation_runs_as_it_stands_with_vllm(command: Block, here: Path) -> None:
    write_recipes(command.page, here)
    shutil.rmtree("runs")
    shell(command.text)
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "run.json").read_text())["environment"]["engine"]["name"] == "vllm"
    assert (run / "report/report.html").exists()


@VLLM
@pytest.mark.soak
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_clusters_scripts_run_one_after_the_other_as_they_stand(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Slurm's variables for this machine, and without the machines that its srun would start."""
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    slurm = {"SLURM_GPUS": "2", "SLURM_ARRAY_TASK_ID": "4", "SLURM_NNODES": "1", "SECONDS_FOR_THE_OTHERS": "0"}
    with tempfile.TemporaryDirectory(prefix="ray-") as sockets:  # their paths must be short
        loopback = {"HEAD_ADDRESS": "127.0.0.1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TMPDIR": sockets}
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        shell("mergekit-bio merge --alpha 0.4 --alpha 0.5 --out merged/sweep")
        shutil.rmtree("runs")
        one_node, a_task, report, cluster = SCRIPTS
        shell(one_node.text, **slurm, **quiet)
        record = json.loads(Path("runs/closed_set/run.json").read_text())
        assert record["environment"]["workers"] == 2 and len(record["cells"]) > 1
        for task in ("4", "5"):
            shell(a_task.text, **slurm | {"SLURM_ARRAY_TASK_ID": task}, **quiet)
        shell(report.text)
        scores = json.loads(Path("runs/array/report/scores.json").read_text())
        assert {len(sweep["cells"]) for sweep in scores["sweeps"]} == {2}
        shutil.rmtree("runs/closed_set")
        shell(cluster.text, **slurm, **quiet, **loopback)
        record = json.loads(Path("runs/closed_set/run.json").read_text())
        assert record["environment"]["workers"] == 1
        assert Path("runs/closed_set/report/report.html").exists()


@VLLM
@pytest.mark.long
@pytest.mark.parametrize("command", PROBES, ids=str)
def test_a_probe_says_hours_as_it_stands_with_vllm(command: Block, here: Path) -> None:
    write_recipes(command.page, here)
    shutil.rmtree("runs")
    said = shell(command.text)
    assert "for the run with one engine, merging not counted" in said and "a question" in said
    assert not Path("runs").exists()


@VLLM
@pytest.mark.long
def test_a_folder_becomes_a_table_in_two_commands_as_they_stand_and_other_formats_without_a_model(here: Path) -> None:
    shutil.rmtree("merged")
    merge, (first, *others) = named("mergekit-bio", "merge", "--alpha", "0.5", "--out")[0], ASKED
    shell(f"{merge.text}\n{first.text}")
    with Path("birds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["recording"] for row in rows] == ["recordings/1.wav", "recordings/2.flac"]
    for command in others:
        shell(command.text)
        assert Path(command.words[command.words.index("--out") + 1]).exists()
    assert sqlite3.connect("birds.journal").execute("SELECT count(*) FROM windows").fetchone() == (2,)


@contextmanager
def served(line: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["bash", "-c", f"exec {line}"], env=environment())
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()


@VLLM
@pytest.mark.long
@pytest.mark.parametrize("command", named("mergekit-bio", "serve"), ids=str)
def test_a_server_serves_as_it_stands(command: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    words = command.words
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("another program uses port 8000")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    key = {"authorization": f"Bearer {words[words.index('--api-key') + 1]}"} if "--api-key" in words else {}
    deadline = time.monotonic() + 240
    with served(command.text) as process, httpx.Client(base_url="http://127.0.0.1:8000", headers=key) as client:
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                models = client.get("/v1/models").raise_for_status().json()["data"]
                break
            except httpx.ConnectError:
                time.sleep(0.5)
        wanted = [Path(word).name for word in words[2:] if (here / word).is_dir()]
        if not wanted:
            wanted = ["NatureLM-audio", *(f"NatureLM-audio@{n / 10:g}" for n in range(11))]
        assert [model["id"] for model in models] == wanted
        question = {"model": wanted[-1], "max_tokens": 4, "messages": [{"role": "user", "content": "What is it?"}]}
        client.post("/v1/chat/completions", json=question, timeout=60).raise_for_status()
        if "--page" in words:
            client.get("/page/login").raise_for_status()
    assert process.returncode == 0


made = pytest.mark.skipif(Path(sys.prefix) != MADE, reason="these tests were not started by `make test`")


@pytest.mark.long
@made
def test_make_test_runs_as_it_stands() -> None:
    """It is what is running; pytest only collects, so that it ends."""
    (command,) = named("make", "test")
    shown = shell(command.text, cwd=ROOT, PYTEST_ADDOPTS="--collect-only")
    assert Path(__file__).name in shown


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_installations_name_extras_that_exist() -> None:
    for line in [command.text for command in named("pip", "install")] + ENVIRONMENTS:
        asked = re.search(r"\[(.+)\]|EXTRAS=(\S+)", line)
        assert asked is None or set((asked[1] or asked[2]).split(",")) <= extras(), line


def left_out() -> list[str]:
    """What uv is told not to install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return project["tool"]["uv"]["exclude-dependencies"]


def check(programs: Path = PYTHONS) -> None:
    """Nothing is missing or of another version, but what is left out of vLLM's requirements."""
    lines = set(shell("pip check || true", programs=programs).strip().splitlines())
    known = rf"vllm(-cpu)? \S+ requires ({'|'.join(left_out())}), which is not installed\."
    assert [line for line in lines - {"No broken requirements found."} if not re.fullmatch(known, line)] == []


@made
def test_the_environment_lacks_nothing_but_what_the_installation_page_says_is_left_out() -> None:
    check()
    audio, codec, vision = left_out()
    assert [name for name in (audio, codec, vision) if find_spec(name)] == []
    page = " ".join((ROOT / "docs/install.md").read_text().split())
    assert f"vLLM lists {audio}, {vision} and {codec} among its requirements" in page


def test_completion_installs_as_it_stands(tmp_path: Path) -> None:
    (line,) = {line for page in PAGES for line in re.findall(r"`(mergekit-bio --install-\S+)`", page.read_text())}
    shell(f"{line}; :", HOME=str(tmp_path))  # a second command, or bash would not stay as the shell that asks
    assert "mergekit-bio" in (tmp_path / ".bashrc").read_text()


def copy_of_the_tree(folder: Path) -> Path:
    hidden = shutil.ignore_patterns(".git", ".venv", "build", "dist", ".*_cache", "__pycache__")
    return shutil.copytree(ROOT, folder, ignore=hidden)


def try_out(programs: Path) -> None:
    """An environment is consistent, and what was installed into it merges, and asks where it can."""
    check(programs)
    shell("mergekit-bio doctor", programs=programs)
    (merging,) = (one for one in named("mergekit-bio", "merge", "--alpha") if one.words[3:] == ["0.5"])
    shell(merging.text, programs=programs)
    if "transformers" in shell("pip list", programs=programs):
        shell(named("mergekit-bio", "ask")[0].text, programs=programs)


@pytest.mark.soak  # a minute, or gigabytes
@pytest.mark.parametrize("command", named("pip", "install"), ids=str)
def test_pip_installs_as_it_stands(command: Block, here: Path, tmp_path: Path) -> None:
    programs = tmp_path / "environment/bin"
    shell(f"{sys.executable} -m venv {programs.parent}")
    # Beside a GPU nobody keeps a CPU's build of torch at hand; on other machines that of PyPI merges and asks, too.
    builds = {"PIP_FIND_LINKS": str(tmp_path)} if "[vllm]" in command.text else {}
    shell(command.text, programs=programs, cwd=copy_of_the_tree(tmp_path / "clone"), **builds)
    try_out(programs)
    shutil.rmtree(programs.parent)  # gigabytes


@pytest.mark.soak
@pytest.mark.parametrize("line", ENVIRONMENTS)
def test_make_installs_as_it_stands(line: str, here: Path, tmp_path: Path) -> None:
    clone = copy_of_the_tree(tmp_path / "clone")
    shell(line, cwd=clone)
    try_out(clone / ".venv/bin")
    shutil.rmtree(clone / ".venv")


@pytest.mark.soak
@made
def test_make_demo_model_trains_a_model_whose_middle_beats_both_ends(tmp_path: Path) -> None:
    clone = copy_of_the_tree(tmp_path / "clone")
    (clone / ".venv").symlink_to(MADE)
    (line,) = {line for page in PAGES for line in re.findall(r"`(make demo-model)`", page.read_text())}
    shown = shell(line, cwd=clone)
    rows = re.findall(r"^ (\d\.\d\d)  .* \[(\d\.\d\d), (\d\.\d\d)\]", shown, re.MULTILINE)
    ends = max(float(high) for alpha, _, high in rows if alpha in ("0.00", "1.00"))
    assert len(rows) == 11 and max(float(low) for _, low, _ in rows) > ends, shown
    shipped, trained = ROOT / "mergekit_bio/demo/model", clone / "build/demo-model"
    assert {file.relative_to(trained) for file in trained.rglob("*")} >= {
        file.relative_to(shipped) for file in shipped.rglob("*.safetensors")
    }
