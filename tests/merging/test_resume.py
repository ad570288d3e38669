"""A merge that was killed is gone on with by the same merge, and left alone by another."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from merging.example import write_example
from safetensors.torch import load_file, save_file

from mergekit_bio.merging.fold import Folder
from mergekit_bio.merging.journal import JOURNAL
from mergekit_bio.merging.merge import carry_out, plan_merge
from mergekit_bio.merging.request import AdapterEntry, MergeRequest

#: Merges, and kills itself when half of the folded bytes are written, or when all is and is sent to the disk.
DIES = """
import json, os, signal, sys
from mergekit_bio import MergeRequest, carry_out, plan_merge
from mergekit_bio.merging.request import AdapterEntry
from mergekit_bio.checkpoint import publish
base, adapters, alphas, out, at_the_end = map(json.loads, sys.argv[1:])
adapters = [AdapterEntry(*adapter) for adapter in adapters]
plan = plan_merge(MergeRequest(base=base, adapter=adapters, alphas=alphas, out=out, device="cpu"))
left = plan.bytes_on_disk - plan.bytes_folded // 2
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def progress(count):
    global left
    left -= count
    if left < 0 and not at_the_end:
        die()
publish._sync_tree = die
carry_out(plan, progress=progress)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    base, adapter = write_example(folder)
    for source, vocabulary in ((base, {"owl": 0}), (adapter, {"owl": 0, "wren": 1})):
        (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def die(base: Path, adapters: list[tuple], out: Path, *, at_the_end: bool = False) -> None:
    """Merge in a process that is killed halfway, or at the end."""
    arguments = [json.dumps(argument, default=str) for argument in (base, adapters, (0.4, 0.6), out, at_the_end)]
    assert subprocess.run([sys.executable, "-c", DIES, *arguments]).returncode == -9


def merge(sources: Path, out: Path, *alphas: float, **options) -> tuple[list[str], Path]:
    """Merge; what is noted, and where it is."""
    notes: list[str] = []
    alphas = alphas or (0.4, 0.6)
    request = {"base": sources / "base", "adapter": sources / "adapter", "alphas": alphas, "out": out, "device": "cpu"}
    carry_out(plan_merge(MergeRequest(**request | options)), note=notes.append)
    return notes, out


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(sources, tmp_path_factory.mktemp("undisturbed") / "out")[1]


@pytest.fixture(scope="module")
def died(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed merge leaves, in a directory of its own."""
    folder = tmp_path_factory.mktemp("died")
    die(sources / "base", [(sources / "adapter",)], folder / "out")
    return folder


@pytest.fixture
def place(died: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(died, tmp_path / "place", symlinks=True))


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are folded from now on, by the real folder."""
    names: list[str] = []
    fold = Folder.fold
    monkeypatch.setattr(Folder, "fold", lambda self, job: (names.append(job.name), fold(self, job))[1])
    return names


def scratch(place: Path) -> Path:
    (found,) = place.glob(".out.*.partial")
    return found


def journal(place: Path) -> list[dict]:
    return [json.loads(line) for line in (scratch(place) / JOURNAL).read_text().splitlines() if line]


def contents(out: Path) -> dict[str, bytes]:
    """Every file, but those that tell the time."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in ("merge.json", "README.md"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def recorded(out: Path) -> list[dict]:
    manifests = (json.loads((checkpoint / "merge.json").read_text()) for checkpoint in sorted(out.iterdir()))
    return [manifest | {"created": None} for manifest in manifests]


def test_it_does_what_was_left_to_do_and_comes_out_the_same(sources, undisturbed, place, folds):
    finished = [entry["folded"] for entry in journal(place) if "folded" in entry]
    notes, out = merge(sources, place / "out")
    assert 0 < len(finished) < 16 and sorted(finished + folds) == sorted({*finished, *folds}) and len(folds) < 16
    assert len(notes) == 1 and "goes on with a merge that was cut off; 0.00" in notes[0]
    assert contents(out) == contents(undisturbed)
    assert recorded(out) == recorded(undisturbed)  # hashes, and figures of what was folded before too
    assert list(place.iterdir()) == [out]


def test_another_merge_names_it_says_its_size_and_leaves_it_alone(sources, undisturbed, place, folds):
    left = contents(scratch(place))
    notes, out = merge(sources, place / "out", 0.7)
    assert len(folds) == 16
    (note,) = notes
    assert f"{scratch(place)}: holds 0.0" in note and "is left alone" in note
    assert contents(scratch(place)) == left
    shutil.rmtree(out)
    merge(sources, out)
    assert contents(out) == contents(undisturbed)


def test_sources_that_were_changed_make_another_merge_of_it(sources, undisturbed, place, folds):
    file = sources / "adapter/adapter_model.safetensors"
    before = file.stat()
    os.utime(file)  # as a change of its values leaves it: with the same size and header
    try:
        notes, _ = merge(sources, place / "out")
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "is left alone" in notes[0] and len(folds) == 16 and scratch(place).is_dir()


@pytest.fixture(scope="module")
def died_at_the_end(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("died")
    die(sources / "base", [(sources / "adapter",)], folder / "out", at_the_end=True)
    return folder


@pytest.mark.parametrize("tokenizer", ["auto", "base"])
def test_what_was_killed_at_its_end_needs_no_fold_and_has_what_is_asked_for_now(
    sources, died_at_the_end, folds, tmp_path, tokenizer
):
    """The files beside the weights were written with ``auto``: the adapter's tokenizer, with its chat template."""
    place = Path(shutil.copytree(died_at_the_end, tmp_path / "place", symlinks=True))
    notes, out = merge(sources, place / "out", tokenizer=tokenizer)
    assert "goes on with a merge that was cut off" in notes[0] and folds == []
    _, fresh = merge(sources, tmp_path / "fresh", tokenizer=tokenizer)
    assert contents(out) == contents(fresh) and recorded(out) == recorded(fresh)
    assert (out / "alpha-0.40/chat_template.jinja").exists() == (tokenizer == "auto")
    assert list(place.iterdir()) == [out]


def test_adapters_that_change_places_make_another_merge_of_it(sources, tmp_path):
    other = Path(shutil.copytree(sources / "adapter", tmp_path / "other"))
    file = other / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    strengths = (0.9, 0.1)
    die(sources / "base", list(zip((sources / "adapter", other), strengths, strict=True)), tmp_path / "out")
    exchanged = [AdapterEntry(*pair) for pair in zip((other, sources / "adapter"), strengths, strict=True)]
    for out in ("out", "undisturbed"):
        merge(sources, tmp_path / out, adapter=exchanged)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_after_the_system_has_started_anew_nothing_is_trusted(sources, undisturbed, place, folds):
    lines = [entry | {"boot": "another"} if "boot" in entry else entry for entry in journal(place)]
    (scratch(place) / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    notes, out = merge(sources, place / "out")
    assert (notes, len(folds)) == ([], 16)
    assert contents(out) == contents(undisturbed)


def test_a_line_that_was_being_written_counts_for_nothing(sources, undisturbed, place, folds):
    file = scratch(place) / JOURNAL
    finished = [entry["folded"] for entry in journal(place) if "folded" in entry]
    file.write_bytes(file.read_bytes()[:-20])
    _, out = merge(sources, place / "out")
    assert len(folds) == 16 - len(finished) + 1
    assert contents(out) == contents(undisturbed)
