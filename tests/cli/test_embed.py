"""``mergekit-bio embed`` as a user types it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from tiny_naturelm import make_base

from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.recording import read_windows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(command_line: Run) -> Run:
    return lambda *arguments: command_line("embed", *arguments, "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recordings, of 3 s and 54 s (six windows, so several batches), and one file that is none."""
    root = tmp_path / "recordings"
    (root / "deep").mkdir(parents=True)
    for name, seconds in (("a.wav", 3), ("deep/b.flac", 54)):
        soundfile.write(root / name, np.random.default_rng(seconds).uniform(-0.5, 0.5, seconds * 16_000), 16_000)
    (root / "text.wav").write_text("no audio")
    return root


def read(file: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    if file.suffix == ".npz":
        arrays = dict(np.load(file))
        return arrays, arrays.pop("recordings").tolist()
    with safe_open(file, "np") as held:
        return {name: held.get_tensor(name) for name in held.keys()}, json.loads(held.metadata()["recordings"])  # noqa: SIM118


@pytest.mark.parametrize("name", ["e.safetensors", "e.npz"])
def test_writes_prefix_and_pooled_encoder_of_every_window(run: Run, folder: Path, merged: Path, name: str) -> None:
    out = folder.parent / name

    code, stdout, err = run(merged, folder, "--out", out, "--json")

    assert code == 0, err
    document = json.loads(stdout)
    assert (document["clips"], document["recordings"]) == (7, 2)
    assert [failure["recording"] for failure in document["failed"]] == [str(folder / "text.wav")]
    assert "1 of 3 recordings could not be used" in err

    arrays, recordings = read(out)
    assert recordings == [str(folder / "a.wav"), str(folder / "deep/b.flac")]
    assert arrays["recording"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert arrays["start"].tolist() == [0, 0, 10, 20, 30, 40, 50]
    assert arrays["end"].tolist() == [3, 10, 20, 30, 40, 50, 54]
    prefix = AudioPrefix.from_pretrained(merged)
    windows = [window for recording in recordings for window in read_windows(recording)]
    with torch.inference_mode():
        for row, window in enumerate(windows):
            encoded = prefix.encode(prefix.features(window.waveform[None]))
            seconds = window.end - window.start
            heard = encoded[0, : int((seconds * 100 - 1.5) // 16) * 8]  # whole patches of 16 frames of 10 ms
            assert np.abs(arrays["prefix"][row] - prefix.project(encoded)[0].numpy()).max() < 1e-5
            assert np.abs(arrays["encoder"][row] - heard.mean(0).numpy()).max() < 1e-5


def test_a_recording_that_breaks_midway_counts_with_the_rows_it_has(run: Run, folder: Path, merged: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 64 * 16_000)
    samples[63 * 16_000] = np.nan
    soundfile.write(folder / "broken.wav", samples, 16_000, subtype="DOUBLE")
    out = folder.parent / "e.npz"

    code, stdout, err = run(merged, folder / "a.wav", folder / "broken.wav", "--out", out, "--json")

    assert code == 0, err
    document, (arrays, recordings) = json.loads(stdout), read(out)
    assert recordings == [str(folder / "a.wav"), str(folder / "broken.wav")]
    assert (document["clips"], document["recordings"]) == (len(arrays["start"]), 2)
    assert [failure["recording"] for failure in document["failed"]] == [recordings[1]]


def test_the_original_checkpoint_gives_the_same(run: Run, folder: Path, merged: Path) -> None:
    first, second = folder.parent / "1.npz", folder.parent / "2.npz"

    run(merged, folder / "a.wav", "--out", first)
    run(merged.parent / "naturelm", folder / "a.wav", "--out", second)

    assert np.array_equal(np.load(first)["prefix"], np.load(second)["prefix"])


def test_an_existing_file_is_kept_unless_told_otherwise(run: Run, folder: Path, merged: Path) -> None:
    out = folder.parent / "e.npz"
    out.write_text("mine")

    code, _, err = run(merged, folder / "a.wav", "--out", out)
    assert code == 1
    assert "exists already" in err
    assert out.read_text() == "mine"

    code, _, _ = run(merged, folder / "a.wav", "--out", out, "--overwrite")
    assert code == 0
    assert "prefix" in np.load(out)


@pytest.mark.parametrize(
    ("audio", "out", "message"),
    [
        ("a.wav", "e.csv", "must end in .safetensors or .npz"),
        ("a.wav", "gone/e.npz", "no such folder"),
        ("text.wav", "e.npz", "cannot be decoded as audio"),
        ("empty", "e.npz", "holds no recordings"),
    ],
)
def test_mistakes_get_one_clear_line_and_leave_nothing(
    run: Run, folder: Path, merged: Path, audio: str, out: str, message: str
) -> None:
    (folder / "empty").mkdir()

    code, stdout, err = run(merged, folder / audio, "--out", folder.parent / out)

    assert code == 1
    assert not stdout
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert [path.name for path in folder.parent.iterdir()] == ["recordings"]


def test_workers_without_ray_are_refused_in_one_line_and_leave_nothing(
    run: Run, folder: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    code, stdout, err = run(merged, folder / "a.wav", "--out", folder.parent / "e.npz", "--workers", 2)

    assert (code, stdout) == (1, "")
    assert err == "error: --workers 2 needs Ray; install it with: pip install 'mergekit-bio[cluster]'\n"
    assert [path.name for path in folder.parent.iterdir()] == ["recordings"]


def test_a_model_without_ears_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "llama")

    code, _, err = run(tmp_path / "llama", folder / "a.wav", "--out", tmp_path / "e.npz")

    assert code == 1
    assert "has no audio tower" in err
