"""A clip is decoded and encoded once for a run, and again where anything that decides its samples has changed."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from eval.conftest import COMPONENTS
from eval.evaluation import CLIPS, write_evaluation, write_recordings

import mergekit_bio
from mergekit_bio.audio import recording, waveform
from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.choice import engine_class
from mergekit_bio.engine.interface import EngineSettings
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.eval.components import components
from mergekit_bio.eval.data.audio_folder import open_audio_folder
from mergekit_bio.eval.data.beans_zero import open_component
from mergekit_bio.eval.data.dataset import Dataset
from mergekit_bio.eval.prompt import Instruction
from mergekit_bio.eval.run.audio_reader import AudioReader, _Recordings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    evaluation = write_evaluation(tmp_path_factory.mktemp("evaluation"))
    merged = mergekit_bio.merge(
        base=evaluation.base, adapter=evaluation.adapter, alphas=[0.5], out=evaluation.recipe.with_name("merged")
    )
    return merged[0].path


class Heard:
    """Reads whole datasets, each time with a new engine and reader on the same folder."""

    def __init__(self, checkpoint: Path, folder: Path):
        self.checkpoint = checkpoint
        self.settings = EngineSettings(options={"device": "cpu"}, prefixes=folder)
        self.notes: list[str] = []

    def __call__(self, dataset: Dataset) -> tuple[int, int]:
        """How many clips were decoded and encoded."""
        with EngineSlot(engine_class("transformers"), self.settings) as slot:
            slot.at(self.checkpoint)
            reader = AudioReader([dataset], slot)
            asked = [Instruction(row.instruction or "?", (row.id,), 0) for row in dataset.asked]
            for _ in range(2):
                prompts = reader.read(dataset.name, asked)
            assert [prompt.text for prompt in prompts] == [instruction.text for instruction in asked]
            assert all(clip.seconds == dataset.seconds for prompt in prompts for clip in prompt.audios)
            self.notes += reader.new_notes()
            assert reader.new_notes() == []
            return reader.decoded, slot.encoded


@pytest.fixture
def heard(checkpoint, tmp_path) -> Heard:
    return Heard(checkpoint, tmp_path / "prefixes")


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_recordings(tmp_path / "recordings")


def opened(folder: Path) -> Dataset:
    return open_audio_folder(folder, name="recordings", task="classification")


def test_a_clip_is_decoded_once_whoever_asks_again(heard, folder, monkeypatch):
    prepared = []
    prepare = waveform.prepare
    monkeypatch.setattr(waveform, "prepare", lambda *samples, **named: prepared.append(1) or prepare(*samples, **named))
    assert heard(opened(folder)) == (CLIPS, CLIPS) and len(prepared) == CLIPS
    assert heard(opened(folder)) == (0, 0) and len(prepared) == CLIPS


def test_a_recording_that_changed_in_time_or_size_is_decoded_again(heard, folder):
    heard(opened(folder))
    stat = (folder / "3.wav").stat()
    os.utime(folder / "3.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert heard(opened(folder)) == (1, 0)  # what is heard is what it was
    shutil.copyfile(folder / "8.wav", folder / "3.wav")  # the short one
    os.utime(folder / "3.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert heard(opened(folder)) == (1, 0)  # it is known under another name
    assert heard(opened(folder)) == (0, 0)


def test_a_recording_elsewhere_or_of_another_length_or_decoder_is_decoded_again(heard, folder, tmp_path, monkeypatch):
    heard(opened(folder))
    assert heard(opened(shutil.copytree(folder, tmp_path / "copy"))) == (CLIPS, 0)
    assert heard(replace(opened(folder), seconds=3.0)) == (CLIPS, CLIPS)
    monkeypatch.setattr(recording, "_DECODER", "another")
    recording.decoder.cache_clear()
    assert heard(opened(folder)) == (CLIPS, 0)
    recording.decoder.cache_clear()


def test_another_channel_is_decoded_and_encoded_by_itself(heard, folder):
    heard(opened(folder))
    for number in range(CLIPS):
        samples, rate = soundfile.read(folder / f"{number}.wav")
        soundfile.write(folder / f"{number}.wav", np.stack([samples, samples / 2], axis=1), rate)
    second = open_audio_folder(folder, name="recordings", task="classification", channel=2)
    assert heard(opened(folder)) == heard(second) == (CLIPS, CLIPS)
    assert heard(second) == heard(opened(folder)) == (0, 0)


def test_what_is_odd_about_recordings_is_told_once(heard, folder):
    samples, rate = soundfile.read(folder / "0.wav")
    soundfile.write(folder / "0.wav", 1000 * samples, rate, subtype="FLOAT")
    soundfile.write(folder / "1.wav", np.append(samples, np.nan), rate, subtype="FLOAT")
    heard(opened(folder))
    loud, broken = sorted(heard.notes)
    assert loud.startswith(f"{folder / '0.wav'}: its samples reach ") and "times full scale" in loud
    assert broken.startswith(f"{folder / '1.wav'}: breaks after {len(samples) / rate:.2f} s: ")
    heard(opened(folder))
    assert len(heard.notes) == 2  # nothing is decoded, and nothing told again


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_beans_zero_are_decoded_once_and_again_when_their_file_has_changed(
    heard, beans_zero, tmp_path, streaming
):
    source = shutil.copytree(beans_zero("parquet"), tmp_path / "beans-zero")
    component, rows = components()["unseen-family-cmn"], len(COMPONENTS["unseen-family-cmn"])
    dataset = open_component(component, source=str(source), streaming=streaming)
    assert heard(dataset) == (rows, rows)
    assert heard(open_component(component, source=str(source), streaming=streaming)) == (0, 0)
    (shard,) = source.iterdir()
    os.utime(shard, ns=(0, 0))
    assert heard(open_component(component, source=str(source), streaming=streaming)) == (rows, 0)
    relabelled = replace(dataset, asked=(replace(dataset.asked[0], label="Wren"), *dataset.asked[1:]))
    assert heard(relabelled) == (rows, 0)


@pytest.mark.parametrize("lost", ["prefixes", "digests"])
def test_half_of_what_is_known_is_as_good_as_nothing(heard, folder, tmp_path, lost):
    heard(opened(folder))
    (tower,) = (path for path in (tmp_path / "prefixes").iterdir() if path.is_dir())
    shutil.rmtree(tower) if lost == "prefixes" else (tmp_path / "prefixes/clips").unlink()
    assert heard(opened(folder)) == (CLIPS, CLIPS if lost == "prefixes" else 0)


def test_a_damaged_prefix_costs_its_clip_another_decoding(heard, folder, tmp_path):
    heard(opened(folder))
    (file,) = (tmp_path / "prefixes").rglob("*.safetensors")
    sound = bytearray(file.read_bytes())
    sound[-1] ^= 1
    file.write_bytes(sound)
    assert heard(opened(folder)) == (1, 1)


def test_what_is_known_may_be_read_before_the_engine_is_up(heard, folder):
    dataset = opened(folder)
    heard(dataset)
    with EngineSlot(engine_class("transformers"), heard.settings) as slot:
        reader = AudioReader([dataset], slot)
        (prompt,) = reader.read(dataset.name, [Instruction("?", ("0.wav",), 0)])
        slot.at(heard.checkpoint)
        slot.encode(prompt.audios)
        assert (reader.decoded, slot.encoded) == (0, 0)
        assert len(prompt.audios[0].waveform) == 160_000 and reader.decoded == 1  # somebody asked for the samples


def test_parts_of_one_recording_are_heard_in_one_way_through_it(heard, tmp_path, monkeypatch):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 60 * 8000)
    soundfile.write(tmp_path / "night.flac", samples, 8000)
    soundfile.write(tmp_path / "other.flac", samples[:8000], 8000)
    spans = [(start, start + 2.5) for start in (40, 3, 21.5, 0, 40.5, 58.5, 75)]
    rows = "".join(f"night.flac,wren,{start},{end}\n" for start, end in spans) + "other.flac,wren,,\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,label,start,end\n{rows}")
    dataset = open_audio_folder(tmp_path, name="recordings", task="classification")
    ways = []
    decode = recording.decode
    monkeypatch.setattr(recording, "decode", lambda path, **named: ways.append(path.name) or decode(path, **named))

    found = dict(_Recordings(dataset).decode([row.id for row in dataset.asked]))

    # Once for all that are there, and once for the one that is not.
    assert sorted(ways) == ["night.flac", "night.flac", "other.flac"]
    for row in dataset.asked[:6]:
        part = samples[round(row.start * 8000) : round(row.end * 8000)]
        expected = Clip.from_samples(part, sampling_rate=8000)
        assert np.allclose(found[row.id].waveform, expected.waveform, atol=1e-4)
    assert "nothing in it from 75 s on" in found[dataset.asked[6].id]
    assert len(found) == 8 and found["other.flac"].seconds == 10
