"""Repeats the tests that interrupt or fuzz as often as they should be repeated, when it matters.

    python eval/soak.py --list
    python eval/soak.py merge-kills                # as often as the list says
    python eval/soak.py server-bodies --count 500

Each soak is one or more tests of the suite: the same code, more often. How it ended and what it cost is written into
eval/results/soak.md, a line a soak; tests that need data that is not at hand are counted as skipped.
"""

import argparse
import datetime
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from machine import describe
from process import measure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval/results/soak.md"
HEADER = """# Soaks: what the suite does a few times, many times

`python eval/soak.py NAME --count N` runs one and writes its line.

| soak | what it promises | times | outcome | wall, min | CPU, min | date | machine |
|---|---|---:|---|---:|---:|---|---|
"""


@dataclass(frozen=True)
class Soak:
    """Tests of the suite, and how often.

    Attributes:
        promise: What holds afterwards.
        tests: pytest's names of files or tests.
        count: How often each test repeats unless the command line says otherwise; None for one that is only long.
    """

    promise: str
    tests: tuple[str, ...]
    count: int | None


SERVER = "tests/serve/test_server.py::test_no"
SOAKS = {
    "merge-kills": Soak(
        "a merge killed at a random moment leaves all or nothing, and the next one ends the same to the byte",
        ("tests/merging/test_crash.py::test_kill_at_a_random_moment",),
        100,
    ),
    "run-kills": Soak(
        "a run killed again and again ends with the predictions of an undisturbed one",
        ("tests/eval/test_run_loop.py::test_a_run_killed_many_times_ends_with_the_same_predictions",),
        100,
    ),
    "worker-kills": Soak(
        "a run by two workers, each time with workers and driver killed, ends with the predictions of one engine",
        ("tests/eval/test_workers.py::test_runs_with_workers_and_drivers_killed_end_the_same",),
        10,
    ),
    "archive-kills": Soak(
        "an archive asked about, killed again and again (50 recordings of 30 s a kill), has every window once, in the "
        "same memory",
        ("tests/listen/test_kills.py",),
        20,
    ),
    "archive-memory": Soak(
        "an archive of 4,000 recordings of 30 s leaves vLLM's processes and ours as large as its first third",
        ("tests/listen/test_memory.py",),
        4_000,
    ),
    "embedding-ends": Soak(
        "an archive embedded by two workers, its command killed, terminated and interrupted, ends with the rows of "
        "one; its processes end too",
        ("tests/eval/test_workers.py::test_embedding_is_gone_on_with_whatever_ends_its_driver",),
        None,
    ),
    "bench-gpu": Soak(
        "the benchmark for machines with a GPU runs whole on a CPU, and finds its results right",
        ("tests/rehearsal/test_bench_gpu.py",),
        None,
    ),
    "cluster-scripts": Soak(
        "the scripts of docs/cluster.md run as they stand: one node, an array over alphas, a cluster of Ray",
        ("tests/documentation/test_long_commands.py::test_a_clusters_scripts_run_one_after_the_other_as_they_stand",),
        None,
    ),
    "server-bodies": Soak(
        "whatever is sent to the server, it answers and stays up (times: requests of each of three kinds)",
        (f"{SERVER}_body_makes_predict_fail", f"{SERVER}_body_makes_chat_fail", f"{SERVER}_bytes_make_the_server_fail"),
        10_000,
    ),
    "dial-ranks": Soak(
        "two processes that hold half of Llama each answer at several strengths as the merges do",
        ("tests/engine/test_tensor_parallel.py::test_two_ranks_answer_at_every_strength_as_merges_do",),
        None,
    ),
    "dial-strengths": Soak(
        "eleven strengths at once answer as eleven merges do, on the reference's model and the demo's too",
        ("tests/engine/test_dial.py",),
        None,
    ),
    "dial-memory": Soak(
        "requests at 500 strengths, and clients that leave, make the server's processes no larger",
        ("tests/serve/test_server.py::test_many_strengths_leave_the_server_as_large_as_it_was",),
        10_000,
    ),
    "random-prompts": Soak(
        "on random prompts vLLM's answers are Transformers' (greedy, beams, closed lists, label scores)",
        ("tests/engine/test_engines_random.py",),
        200,
    ),
    "beams": Soak(
        "on random prompts vLLM's beam searches are Transformers', with all kinds of settings, offline and online",
        ("tests/engine/test_beams.py",),
        500,
    ),
    "interruptions": Soak(
        "an interruption while vLLM starts ends all of its processes, by Ctrl-C and by a scheduler's signal",
        ("tests/engine/test_vllm_start.py::test_an_interruption_ends_the_start_of_vllm_and_all_of_its_processes",),
        None,
    ),
    "terminal": Soak(
        "demo and eval on a terminal and off it show what they do, their tables, no warning, no path that is gone",
        ("tests/demo/test_first_commands.py",),
        None,
    ),
    "installations": Soak(
        "every installation that the pages name works, with all extras",
        (
            "tests/documentation/test_long_commands.py::test_pip_installs_as_it_stands",
            "tests/documentation/test_long_commands.py::test_make_installs_as_it_stands",
        ),
        None,
    ),
    "evaluations": Soak(
        "every evaluation that the pages show runs as it stands with vLLM",
        ("tests/documentation/test_long_commands.py::test_an_evaluation_runs_as_it_stands_with_vllm",),
        None,
    ),
    "demo-model": Soak(
        "the demo's model, trained anew, has the shape of the shipped one",
        (
            "tests/documentation/test_long_commands.py::test_make_demo_model_trains_a_model_whose_middle_beats_both_ends",
        ),
        None,
    ),
}


def run(soak: Soak, count: int | None, kept: Path | None) -> tuple[str, float, float]:
    """Run a soak's tests; what they print goes into the file ``kept``, if one is given.

    Returns:
        pytest's last line without its time, wall minutes and processor minutes.

    Raises:
        RuntimeError: A test failed; the message ends with pytest's last lines.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--timeout=0", "--hypothesis-profile=random", "-rsP", *soak.tests]
    command += ["--count", str(count)] if count else []
    with tempfile.TemporaryDirectory() as folder:
        log = kept or Path(folder) / "log"
        cost = measure(command, log=log, env={"OMP_NUM_THREADS": "1"})
        outcome = re.sub(r" in [\d.]+s.*", "", log.read_text().strip().splitlines()[-1])
    return outcome.strip("= "), cost.wall / 60, cost.cpu / 60


def record(name: str, line: str) -> None:
    """Put a soak's line in its place among the results."""
    before = RESULTS.read_text().removeprefix(HEADER).splitlines() if RESULTS.exists() else []
    lines = {row.split("|")[1].strip(): row for row in before} | {name: line}
    RESULTS.write_text(HEADER + "".join(f"{lines[soak]}\n" for soak in SOAKS if soak in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=SOAKS, metavar="NAME")
    parser.add_argument("--count", type=int, help="how often each test repeats")
    parser.add_argument("--list", action="store_true", help="name the soaks and end")
    parser.add_argument(
        "--log", type=lambda name: Path(name).resolve(), help="keep what the tests print, sizes and so on"
    )
    given = parser.parse_args()
    if given.list or given.name is None:
        for name, soak in SOAKS.items():
            print(f"{name:16} {soak.count or '':>6}  {soak.promise}")
        return
    soak = SOAKS[given.name]
    if given.count and soak.count is None:
        parser.error(f"{given.name} takes no --count")
    os.chdir(ROOT)
    count = given.count or soak.count
    try:
        outcome, wall, cpu = run(soak, count, given.log)
    except RuntimeError as error:
        raise SystemExit(f"{given.name} failed, and is not recorded:\n{error}") from None
    today = datetime.date.today().isoformat()
    cells = [given.name, soak.promise, f"{count:,}" if count else "", outcome, f"{wall:.1f}", f"{cpu:.1f}", today]
    record(given.name, f"| {' | '.join([*cells, describe(ROOT)])} |")
    print(f"{given.name}: {outcome}, {wall:.1f} min, recorded in {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
