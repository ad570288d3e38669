"""A directory appears complete or not at all."""

import os
import subprocess
import sys

import pytest

from mergekit_bio.checkpoint.publish import staged
from mergekit_bio.errors import OutputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_the_block_ends(tmp_path):
    with staged(tmp_path / "deep" / "out", ours="mark") as folder:
        (folder / "mark").touch()
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["mark"]


def test_nothing_stays_of_a_failure(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out", ours="mark") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert names(tmp_path) == []


def test_an_existing_output_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="out: "), staged(tmp_path / "out", ours="mark", overwrite=overwrite):
            raise AssertionError("the block must not run")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("mark", ["mark", "alpha-0.50/mark"])
def test_our_own_output_is_replaced_on_request(tmp_path, mark):
    (tmp_path / "out" / mark).parent.mkdir(parents=True)
    (tmp_path / "out" / mark).touch()
    with staged(tmp_path / "out", ours="mark", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_an_empty_directory_is_no_hindrance(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", ours="mark") as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == ["new"]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mark").touch()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError), staged(tmp_path / "out", ours="mark", overwrite=True):
        raise AssertionError("the block must not run")
    assert names(tmp_path / "elsewhere") == ["mark"]


def test_only_one_writes_at_a_time(tmp_path):
    with staged(tmp_path / "out", ours="mark") as folder:
        with pytest.raises(OutputError, match="another process"), staged(tmp_path / "out", ours="mark"):
            raise AssertionError("the block must not run")
        (folder / "mark").touch()
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from mergekit_bio.checkpoint.publish import staged\n"
        "with staged(Path(sys.argv[1]), ours='mark') as folder:\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "out"], check=False)
    assert names(tmp_path) == [".out.lock", ".out.partial"]
    with staged(tmp_path / "out", ours="mark") as folder:
        assert names(folder) == []
        (folder / "mark").touch()
    assert names(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), staged(tmp_path / "file" / "out", ours="mark"):
        raise AssertionError("the block must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_parent_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"), staged(tmp_path / "out", ours="mark"):
        raise AssertionError("the block must not run")
