"""A directory appears complete or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_bio.checkpoint.publish import staged
from mergekit_bio.errors import OutputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_the_block_ends(tmp_path):
    with staged(tmp_path / "deep" / "out", mark="mark") as folder:
        (folder / "mark").touch()
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["mark"]


def test_nothing_stays_of_a_failure(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out", mark="mark") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert names(tmp_path) == []


def test_an_existing_output_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="out"), staged(tmp_path / "out", mark="mark", overwrite=overwrite):
            raise AssertionError("the block must not run")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("mark", ["mark", "alpha-0.50/mark"])
def test_our_own_output_is_replaced_on_request(tmp_path, mark):
    (tmp_path / "out" / mark).parent.mkdir(parents=True)
    (tmp_path / "out" / mark).touch()
    with staged(tmp_path / "out", mark="mark", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("other", ["thesis.tex", "recordings/wren.wav"])
def test_what_lies_beside_our_own_output_is_not_overwritten(tmp_path, other):
    for file in ("half/mark", other):
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file).touch()
    with pytest.raises(OutputError, match=other.split("/")[0]), staged(tmp_path / "out", mark="mark", overwrite=True):
        raise AssertionError("the block must not run")
    assert (tmp_path / "out" / other).exists() and (tmp_path / "out/half/mark").exists()


def test_what_a_stranger_put_into_our_own_output_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("mark", "owls.gguf"):
        (tmp_path / "out" / name).touch()

    def stranger(folder):
        return next((name for name in names(folder) if name != "mark"), None)

    with (
        pytest.raises(OutputError, match=r"owls\.gguf: no merge has written it"),
        staged(tmp_path / "out", mark="mark", foreign_file=stranger, overwrite=True),
    ):
        raise AssertionError("the block must not run")
    assert names(tmp_path / "out") == ["mark", "owls.gguf"]


def test_an_interruption_between_the_two_renames_leaves_the_old_output(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").write_text("old")
    rename = Path.rename

    def interrupted(path, target):
        rename(path, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", mark="mark", overwrite=True) as folder:
        (folder / "mark").write_text("new")
        monkeypatch.setattr(Path, "rename", interrupted)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "mark").read_text() == "old"


def test_an_old_output_that_a_killed_process_had_set_aside_gets_its_name_back(tmp_path):
    for name in (".out.old", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mark").write_text(name)
    with pytest.raises(OutputError, match="exists already"), staged(tmp_path / "out", mark="mark"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "out" / "mark").read_text() == ".out.old"
    with staged(tmp_path / "out", mark="mark", overwrite=True) as folder:
        (folder / "mark").write_text("new")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "mark").read_text() == "new"


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputError, match="not empty"), staged(tmp_path / "out", mark="mark") as folder:
        (folder / "mark").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["thesis.tex"]


def test_an_empty_directory_is_filled_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with staged(Path(), mark="mark") as folder:
        (folder / "new").touch()
        (folder / "mark").touch()
    assert names(Path()) == ["mark", "new"] and names(tmp_path) == ["out"]


def test_what_appears_meanwhile_in_an_empty_directory_stays_and_nothing_is_added(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"README\.md: appeared"), staged(tmp_path / "out", mark="mark") as folder:
        (folder / "README.md").write_text("ours")
        (folder / "mark").touch()
        (tmp_path / "out" / "README.md").write_text("theirs")
    assert names(tmp_path / "out") == ["README.md"] and (tmp_path / "out" / "README.md").read_text() == "theirs"


def test_a_move_that_fails_is_undone_and_no_more_than_that(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def fails_at_b(path, target):
        if path.name == "b":
            target.write_text("theirs")
            raise KeyboardInterrupt
        rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_at_b)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", mark="mark") as folder:
        for name in ("a", "b", "mark"):
            (folder / name).write_text("ours")
    assert names(tmp_path / "out") == ["b"] and (tmp_path / "out" / "b").read_text() == "theirs"


def test_what_is_put_into_our_own_output_meanwhile_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").touch()

    def stranger(folder):
        return next((name for name in names(folder) if name != "mark"), None)

    with (
        pytest.raises(OutputError, match=r"owls\.gguf: no merge has written it"),
        staged(tmp_path / "out", mark="mark", foreign_file=stranger, overwrite=True),
    ):
        (tmp_path / "out" / "owls.gguf").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["mark", "owls.gguf"]


def test_what_file_systems_and_we_leave_behind_makes_a_directory_no_less_empty(tmp_path):
    for name in ("lost+found", ".out.partial"):
        (tmp_path / "out" / name).mkdir(parents=True)
    with staged(tmp_path / "out", mark="mark") as folder:
        assert names(folder) == []
        (folder / "mark").touch()
    assert names(tmp_path / "out") == ["lost+found", "mark"]


def test_an_empty_directory_stays_empty_where_the_work_fails(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError), staged(tmp_path / "out", mark="mark") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert names(tmp_path / "out") == [] and names(tmp_path) == ["out"]


def test_a_mount_point_is_filled(tmp_path):
    program = (
        "import sys; from pathlib import Path; from mergekit_bio.checkpoint.publish import staged\n"
        "with staged(Path(sys.argv[1]), mark='mark') as folder:\n"
        "    (folder / 'mark').touch()\n"
        "print(*(path.name for path in Path(sys.argv[1]).iterdir()))\n"
        "with staged(Path(sys.argv[1]), mark='mark', overwrite=True) as folder:\n"
        "    raise AssertionError('the block must not run')"
    )
    (tmp_path / "out").mkdir()
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$1" && exec "$2" -c "$3" "$1"', "sh"]
    done = subprocess.run([*mount, tmp_path / "out", sys.executable, program], capture_output=True, text=True)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip("mounting is not allowed here")
    assert done.stdout == "mark\n" and "out: is a mount point" in done.stderr, done.stderr


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mark").touch()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError), staged(tmp_path / "out", mark="mark", overwrite=True):
        raise AssertionError("the block must not run")
    assert names(tmp_path / "elsewhere") == ["mark"]


def test_only_one_writes_at_a_time(tmp_path):
    with staged(tmp_path / "out", mark="mark") as folder:
        with pytest.raises(OutputError, match="another process"), staged(tmp_path / "out", mark="mark"):
            raise AssertionError("the block must not run")
        (folder / "mark").touch()
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from mergekit_bio.checkpoint.publish import staged\n"
        "with staged(Path(sys.argv[1]), mark='mark') as folder:\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "out"], check=False)
    assert names(tmp_path) == [".out.lock", ".out.partial"]
    with staged(tmp_path / "out", mark="mark") as folder:
        assert names(folder) == []
        (folder / "mark").touch()
    assert names(tmp_path) == ["out"]


def test_work_that_was_cut_off_is_told_of_by_its_own_output_only(tmp_path):
    scratch = [".out.0123abcd.partial", ".out.5.0123abcd.partial", ".out.5.partial", ".out.v2.partial"]
    for name in scratch:
        (tmp_path / name).mkdir()
    notes: list[str] = []
    with staged(tmp_path / "out", mark="mark", key="00000000", note=notes.append) as folder:
        (folder / "mark").touch()
    assert len(notes) == 1 and f"{tmp_path / scratch[0]}: holds" in notes[0]
    assert names(tmp_path) == sorted([*scratch, "out"])


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), staged(tmp_path / "file" / "out", mark="mark"):
        raise AssertionError("the block must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_parent_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"), staged(tmp_path / "out", mark="mark"):
        raise AssertionError("the block must not run")
