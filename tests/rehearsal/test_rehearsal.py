"""The rehearsal asks for what it needs first, and leaves nothing behind. What it proves, it proves when it is run."""

import os
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import pytest

rehearsal = pytest.importorskip("rehearsal", reason="eval/ is not on the path")
published_pair = pytest.importorskip("published_pair", reason="eval/ is not on the path")

SCRIPT = Path(rehearsal.__file__)


def refusal(*words: object) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    line = refusal("--scratch", tmp_path / "scratch", "--layers", 100_000_000)
    assert "GB of disk" in line
    assert not (tmp_path / "scratch").exists()


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    assert "is there already" in refusal("--scratch", tmp_path, "--layers", 1)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("layers", [1, 2, 32])
def test_the_disk_asked_for_holds_the_pair_and_a_merge_with_its_tower(layers: int) -> None:
    base = published_pair.base_tensors(layers)
    adapter = published_pair.adapter_tensors(layers)
    assert rehearsal.base_bytes(layers) == sum(tensor.nbytes for tensor in base)
    tower = sum(tensor.nbytes for tensor in adapter if not tensor.name.startswith("llama"))
    merged = sum(tensor.nbytes for tensor in base) + tower
    pair = sum(tensor.nbytes for tensor in [*base, *adapter])
    assert pair + merged < rehearsal.disk_needed(layers, sweep=False) < pair + merged + 1e9


def test_at_full_size_35_gb_are_enough() -> None:
    assert rehearsal.disk_needed(32, sweep=False) < 35e9


@pytest.mark.parametrize("error", [KeyboardInterrupt, rehearsal.RehearsalError, OSError])
def test_whatever_goes_wrong_the_scratch_is_removed(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), rehearsal.scratch_folder(tmp_path / "scratch", keep=False) as scratch:
        (scratch / "large").write_text("of the pair")
        raise error
    assert not (tmp_path / "scratch").exists()


def test_keep_keeps_it(tmp_path: Path) -> None:
    with rehearsal.scratch_folder(tmp_path / "scratch", keep=True) as scratch:
        (scratch / "large").write_text("of the pair")
    assert (scratch / "large").exists()


def test_a_command_that_fails_is_named_with_its_own_words(tmp_path: Path) -> None:
    step = rehearsal.Step("`cp`", ["cp", tmp_path / "absent", tmp_path / "there"])
    with pytest.raises(rehearsal.RehearsalError, match=r"`cp`: .*\n.*No such file"):
        rehearsal.Rehearsal(tmp_path, 1).run(step)


STOPPED = """
import sys
from pathlib import Path
import rehearsal
with rehearsal.scratch_folder(Path(sys.argv[1]), keep=False) as scratch:
    step = rehearsal.Step("a long command", ["sh", "-c", 'echo $$ > "$0"; exec sleep 60', sys.argv[2]])
    rehearsal.Rehearsal(scratch, 1).run(step)
"""


def test_stopped_in_a_long_command_it_ends_that_and_removes_the_scratch(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    scratch, child = tmp_path / "scratch", tmp_path / "child"
    process = subprocess.Popen([sys.executable, "-c", STOPPED, scratch, child], env=environment)
    while process.poll() is None and not (child.exists() and child.read_text().strip()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not scratch.exists()
    while _runs(int(child.read_text())):  # until whoever inherits it has noticed
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_page_has_every_command_and_says_where_the_pair_is_smaller(tmp_path: Path) -> None:
    small, real = rehearsal.Rehearsal(tmp_path, 2), rehearsal.Rehearsal(tmp_path, 32)
    for each in (small, real):
        each.run(rehearsal.Step("`true`", ["true"]))
        each.note("No GPU.")
        assert "| `true` |" in each.page()
        assert "- No GPU." in each.page()
    assert "2 layers of Llama instead of 32" in small.page()
    assert "instead of 32" not in real.page()


def test_of_commands_that_took_turns_the_page_has_the_medians(tmp_path: Path) -> None:
    each = rehearsal.Rehearsal(tmp_path, 2, 3)
    for wall in (3.0, 1.0, 2.0):
        each.rows.append(("`cp`", rehearsal.Cost(wall, 10 * wall, 0, 0, 0)))
        each.rows.append(("`merge`", rehearsal.Cost(2 * wall, 0, 0, 0, 0)))
    page = each.page()
    assert page.count("| `cp` |") == 1 and "| `cp` | 2.0 s | 20.0 s |" in page
    assert "| `merge` | 4.0 s |" in page and "took turns 3 times" in page


def test_the_recording_is_ten_seconds_of_sound(tmp_path: Path) -> None:
    rehearsal.write_recording(tmp_path / "recording.wav")
    with wave.open(str(tmp_path / "recording.wav")) as recording:
        assert recording.getnframes() / recording.getframerate() == 10
