"""Embeddings of an archive: in parts, gone on with, in one file at the end."""

import json
import random
import shutil
import tempfile
from collections import Counter
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listen.archive import WINDOWS, Listening, write_recording
from permissions import for_everybody, unprivileged
from safetensors import safe_open
from safetensors.numpy import load_file

from mergekit_bio.audio.finding import find_recordings
from mergekit_bio.engine.pool import Finished
from mergekit_bio.errors import AudioError, OutputError, RunError
from mergekit_bio.listen import embeddings, parts
from mergekit_bio.listen.embeddings import Embedded, EmbedRequest, embed_archive
from mergekit_bio.listen.parts import FORMATS, EmbeddedWindow, Parts
from mergekit_bio.listen.stretches import Stretch


def embed(model: Path, folder: Path, out: Path, *, listener=None, **more) -> Embedded:
    request = EmbedRequest(**{"model": str(model), "out": out, "window": 10.0, "hop": 10.0, "device": "cpu"} | more)
    return embed_archive(request, find_recordings([folder]).recordings, listener or Listening())


def recordings_of(file: Path) -> list[str]:
    with safe_open(file, "np") as held:
        return json.loads(held.metadata()["recordings"])


@pytest.fixture(scope="module")
def whole(archive: Path, merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an undisturbed start."""
    out = tmp_path_factory.mktemp("embedded") / "birds.safetensors"
    embed(merged, archive, out)
    return out


@pytest.fixture
def parts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is a part."""
    monkeypatch.setattr(parts, "_PART_SECONDS", 0.0)


class Stopping(Listening):
    """Stops it after so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches

    def standing(self, standing) -> None:
        self.batches -= 1
        if not self.batches:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["birds.safetensors", "birds.npz"])
def test_what_was_stopped_ends_as_what_was_not(
    archive: Path, merged: Path, whole: Path, tmp_path: Path, parts_at_once, name: str
) -> None:
    out, folder = tmp_path / name, tmp_path / f"{name}.parts"
    with pytest.raises(KeyboardInterrupt):
        embed(merged, archive, out, listener=Stopping(2))
    published = sorted(folder.glob("*.safetensors"))
    assert len(published) == 2 and not out.exists()
    first = load_file(published[0])
    assert {key: len(values) for key, values in first.items()} == dict.fromkeys(first, 4), "a file of the same kind"
    listening = Listening()
    done = embed(merged, archive, out, listener=listening)
    assert (done.recordings, done.clips, done.prefixes) == (4, len(WINDOWS), True)
    assert sum(1 for _ in listening.heard) == 1, "one window was left"
    expected, found = load_file(whole), load_file(out) if name.endswith("safetensors") else dict(np.load(out))
    names = recordings_of(out) if name.endswith("safetensors") else found.pop("recordings").tolist()
    assert names == recordings_of(whole) == list(dict.fromkeys(str(archive / name) for name, *_ in WINDOWS))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert values.dtype == found[key].dtype and np.allclose(values, found[key], atol=1e-6), key
    assert [path.name for path in tmp_path.iterdir()] == [name]


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=8), name=st.sampled_from(FORMATS), data=st.data())
@settings(max_examples=20)
def test_rows_are_in_the_order_of_the_recordings_whatever_order_they_come_in(lengths, name, data) -> None:
    """Some recordings are heard at a time, each in order, in several parts and in several goes."""
    with tempfile.TemporaryDirectory() as scratch:
        recordings = [Path(scratch, f"{number}.wav") for number in range(len(lengths))]
        for path in recordings:
            path.touch()
        coming = data.draw(st.permutations([number for number, length in enumerate(lengths) for _ in range(length)]))
        place: Counter[int] = Counter()
        held = Parts(Path(scratch, "parts"))
        held.go_on({}, overwrite=False)
        held.open_recordings(recordings)
        for number in coming:
            path, start = str(recordings[number]), place[number]
            vectors = {"encoder": np.array([number, start], np.float32)}
            held.add([EmbeddedWindow(path, float(start), start + 1.0, vectors)], [])
            place[number] += 1
            if (then := data.draw(st.sampled_from(["on", "part", "stop"]))) != "on":
                held.close()
            if then == "stop":
                held._lock.close()  # as the process's end does
                held = Parts(Path(scratch, "parts"))
                held.go_on({}, overwrite=False)
                left = {recording.path: recording.first for recording in held.open_recordings(recordings)}
                assert left == {str(path): place[number] for number, path in enumerate(recordings)}
        held.close()
        if not coming:
            return
        for part in Path(scratch, "parts").glob("*.safetensors"):
            assert recordings_of(part) == sorted(recordings_of(part)), "so that it is read in few runs"
        out = Path(scratch, f"e{name}")
        held.join(out)
        found = load_file(out) if name == ".safetensors" else dict(np.load(out))
        names = recordings_of(out) if name == ".safetensors" else found.pop("recordings").tolist()
        held._lock.close()
    assert names == [str(path) for path, length in zip(recordings, lengths, strict=True) if length]
    expected = [(number, start) for number, length in enumerate(lengths) for start in range(length)]
    assert list(map(tuple, found["encoder"])) == expected
    assert list(zip(found["start"], found["end"], strict=True)) == [(start, start + 1) for _, start in expected]
    assert [Path(names[row]).stem for row in found["recording"]] == [str(number) for number, _ in expected]


class Dying:
    """Two workers in this process, which end in any order, and die by accident and of one recording.

    Args:
        make: Makes a worker.
        seed: Of the accidents.
        deadly: The recording's name.
    """

    count = up = 2

    def __init__(self, make, seed: int, deadly: str) -> None:
        self.make, self.chance, self.deadly = make, random.Random(seed), deadly
        self.workers = [make(), make()]
        self.running: dict[int, tuple] = {}
        self.accidents: set[Stretch] = set()

    def free(self) -> list[int]:
        return [worker for worker in range(self.count) if worker not in self.running]

    def start(self, worker: int, job: Stretch, following: Stretch | None) -> None:
        self.running[worker] = job, following

    def wait(self) -> Finished:
        worker = self.chance.choice(sorted(self.running))
        job, following = self.running.pop(worker)
        result = self.workers[worker].answer(job, following)
        accident = job not in self.accidents and self.chance.random() < 0.3
        if accident or any(recording.path.endswith(self.deadly) for recording in job.recordings):
            self.accidents |= {job} if accident else set()
            self.workers[worker].close()
            self.workers[worker] = self.make()
            return Finished(worker, None, died=True)
        return Finished(worker, result)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_recording_that_workers_die_of_fails_and_all_others_have_the_rows_of_one_worker(
    archive: Path, merged: Path, whole: Path, tmp_path: Path, parts_at_once, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    @contextmanager
    def dying(request, with_prefix, note):
        with closing(Dying(partial(embeddings.EmbedWorker, request, with_prefix=with_prefix), seed, "d.wav")) as pool:
            yield pool

    recordings, out, listening = shutil.copytree(archive, tmp_path / "recordings"), tmp_path / "e.npz", Listening()
    write_recording(recordings / "site 1/d.wav", 30)
    monkeypatch.setattr(embeddings, "_workers", dying)
    done = embed(merged, recordings, out, listener=listening)
    said = f"{recordings / 'site 1/d.wav'}: 3 workers died when they heard it"
    assert done.failed == {str(recordings / "site 1/d.wav"): said} and list(listening.failures.values()) == [said]
    found, expected = dict(np.load(out)), load_file(whole)
    names = [Path(name).relative_to(recordings) for name in found.pop("recordings")]
    assert names == [Path(name).relative_to(archive) for name in recordings_of(whole)]
    assert all(np.allclose(found[key], values, atol=1e-5) for key, values in expected.items())


def test_rows_of_a_recording_that_has_changed_since_are_not_in_the_file(
    archive: Path, merged: Path, whole: Path, tmp_path: Path, parts_at_once
) -> None:
    recordings, out = shutil.copytree(archive, tmp_path / "recordings"), tmp_path / "birds.safetensors"
    with pytest.raises(KeyboardInterrupt):
        embed(merged, recordings, out, listener=Stopping(1))
    write_recording(recordings / "a.wav", 14, seed=1)
    done = embed(merged, recordings, out)
    arrays, names = load_file(out), recordings_of(out)
    assert done.clips == len(WINDOWS) + 1
    ends = {name: sorted(arrays["end"][arrays["recording"] == number]) for number, name in enumerate(names)}
    assert ends[str(recordings / "a.wav")] == [10, 14] and ends[str(recordings / "site 1/b.flac")] == [10, 20, 25]


def test_float16_is_half_as_large_and_nearly_the_same(archive: Path, merged: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "birds.safetensors"
    embed(merged, archive, out, dtype="float16")
    expected, found = load_file(whole), load_file(out)
    for key in ("encoder", "prefix"):
        assert found[key].dtype == np.float16
        assert np.array_equal(found[key], expected[key].astype(np.float16))
    assert found["end"].dtype == np.float64


def test_a_big_job_has_no_prefixes_unless_they_are_asked_for(
    archive: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "_MOST_PREFIX_BYTES", 1000)
    listening, out = Listening(), tmp_path / "birds.safetensors"
    assert not embed(merged, archive, out, listener=listening).prefixes
    assert load_file(out).keys() == {"encoder", "recording", "start", "end"}
    (note,) = listening.notes
    assert "only the averages of the encoder's output are written; --prefixes writes them, too" in note
    assert embed(merged, archive, out, prefixes=True, overwrite=True).prefixes
    assert "prefix" in load_file(out)


def test_parts_of_other_embeddings_are_refused_and_say_what_changed(
    archive: Path, merged: Path, tmp_path: Path, parts_at_once
) -> None:
    out = tmp_path / "birds.safetensors"
    with pytest.raises(KeyboardInterrupt):
        embed(merged, archive, out, listener=Stopping(1))
    with pytest.raises(RunError, match=r"parts of other embeddings: window was 10\.0 and is now 5\.0"):
        embed(merged, archive, out, window=5.0)
    embed(merged, archive, out, window=5.0, overwrite=True)
    assert set(load_file(out)["end"] - load_file(out)["start"]) <= {1.0, 3.0, 5.0}


def test_a_value_that_float16_cannot_hold_is_an_error_and_not_infinity(
    archive: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_bio.audio.prefix import AudioPrefix

    project = AudioPrefix.project
    monkeypatch.setattr(AudioPrefix, "project", lambda prefix, encoded: project(prefix, encoded) * 1e9)
    with pytest.raises(OutputError, match="--dtype float16: a value is too large for it; take float32"):
        embed(merged, archive, tmp_path / "birds.safetensors", dtype="float16")


def test_names_that_no_header_holds_are_in_a_tensor(
    archive: Path, merged: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_MOST_HEADER_BYTES", 10)
    out = tmp_path / "birds.safetensors"
    embed(merged, archive, out)
    arrays = load_file(out)
    assert json.loads(arrays.pop("recordings").tobytes()) == recordings_of(whole)
    assert arrays.keys() == load_file(whole).keys()


def test_what_could_not_be_read_because_the_disk_went_is_embedded_when_it_is_back(
    archive: Path, merged: Path, tmp_path: Path
) -> None:
    recordings, gone, out = tmp_path / "recordings", tmp_path / "gone", tmp_path / "birds.npz"
    shutil.copytree(archive, recordings)
    for number in range(8):
        write_recording(recordings / f"site 3/{number}.wav", 130, 8_000)

    class Vanishing(Listening):
        def standing(self, standing) -> None:
            if not gone.exists():
                recordings.rename(gone)

    with pytest.raises(AudioError, match="run the command again to go on"):
        embed(merged, recordings, out, listener=Vanishing())
    assert not out.exists()
    gone.rename(recordings)
    done = embed(merged, recordings, out)
    assert (done.clips, done.failed, done.broken) == (len(WINDOWS) + 8 * 13, {}, {})


def test_a_recording_that_may_not_be_read_is_named_and_the_others_are_embedded(
    archive: Path, merged: Path, whole: Path
) -> None:
    # `whole` has imported everything, which may lie where only root may read.
    with for_everybody(archive) as recordings, for_everybody(merged) as model:
        (recordings / "a.wav").chmod(0)
        out = recordings.parent / "birds.safetensors"
        with unprivileged():
            done = embed(model, recordings, out)
        assert done.clips == len(WINDOWS) - 1 and out.exists()
        assert list(done.failed) == [str(recordings / "a.wav")]


def test_how_long_a_recording_is_that_only_ffmpeg_reads_is_known(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "phone.m4a"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        for _ in range(100):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert embeddings._seconds(file) == pytest.approx(100, abs=1)
    (tmp_path / "unknown").write_bytes(bytes(400_000))
    assert embeddings._seconds(tmp_path / "unknown") == 100
