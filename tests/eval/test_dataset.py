import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from mergekit_bio.errors import AudioError, DatasetError
from mergekit_bio.eval.components import components
from mergekit_bio.eval.data.audio_folder import open_audio_folder
from mergekit_bio.eval.data.beans_zero import open_component
from mergekit_bio.eval.data.dataset import open_dataset
from mergekit_bio.eval.recipe.schema import DatasetChoice, Recipe, Species

RATE = 8000


def recipe(data, **changes) -> Recipe:
    values = {"name": "r", "datasets": (DatasetChoice(name="unseen-family-cmn"),), "checkpoints": ("x",)}
    return Recipe(**(values | {"data": str(data)} | changes))


@pytest.mark.parametrize(
    ("kind", "streaming"), [("parquet", False), ("parquet", True), ("arrow", False), ("saved", False), ("saved", True)]
)
def test_every_form_of_the_data_gives_the_same_clips_and_recordings(beans_zero, kind, streaming):
    dataset = open_component(components()["watkins"], source=str(beans_zero(kind)), streaming=streaming)
    assert [row.id for row in dataset.asked] == ["watkins-0", "watkins-1", "watkins-2"]
    assert [row.label for row in dataset.asked] == ["Walrus", "Fin, Finback Whale", "Walrus"]
    assert dataset.asked[0].instruction == "<Audio><AudioHere></Audio> What is it, watkins?"
    # Front to back, back to front: a stream begins again.
    for number in (0, 1, 2, 1):
        samples, rate = dataset.audio(f"watkins-{number}")
        assert rate == RATE and samples.dtype == np.float64
        np.testing.assert_allclose(samples[:100], np.sin(np.arange(100) / (3 + number)), atol=1e-12)
    # watkins clips are at most 3 s long.
    assert len(dataset.audio("watkins-0")[0]) == 3 * RATE


def test_rows_and_labels_are_checked_against_the_benchmark(beans_zero, tmp_path):
    dataset = open_component(components()["unseen-family-cmn"], source=str(beans_zero("parquet")))
    assert dataset.notes == (
        "unseen-family-cmn: 11 clips, the benchmark has 451: figures cannot be compared with published ones",
    )
    (hiceas,) = open_component(components()["hiceas"], source=str(beans_zero("parquet"))).notes
    assert "label" not in hiceas


def test_only_the_species_asked_for_are_kept(beans_zero):
    data = beans_zero("parquet")
    choice = DatasetChoice(name="unseen-family-cmn")
    top = open_dataset(choice, recipe(data, top_k_species=2))
    assert {row.label for row in top.asked} == {"Spotted Elachura", "Dall's Porpoise"} and len(top.asked) == 9
    assert len(open_dataset(choice, recipe(data, top_k_species=1000)).asked) == 11
    named = open_dataset(choice, recipe(data, species=(Species(name="Coruro"),)))
    assert len(named.asked) == len(named.examples) == 2
    with pytest.raises(DatasetError, match=r"no clip of the species 'Coruru'; did you mean 'Coruro'\?"):
        open_dataset(choice, recipe(data, species=(Species(name="Coruru"),)))


def test_a_dataset_goes_to_another_process(beans_zero):
    dataset = open_component(components()["watkins"], source=str(beans_zero("parquet")))
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.asked == dataset.asked
    np.testing.assert_array_equal(copy.audio("watkins-1")[0], dataset.audio("watkins-1")[0])


def test_a_component_that_is_not_there_is_said_so(beans_zero):
    with pytest.raises(DatasetError, match="component cbi: no clip in it"):
        open_component(components()["cbi"], source=str(beans_zero("parquet")))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_parquet_file_is_one_line(beans_zero, tmp_path, streaming):
    whole = (beans_zero("parquet") / "shard-0.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="not BEANS-Zero's parquet or arrow data") as error:
        open_component(components()["watkins"], source=str(tmp_path), streaming=streaming)
    assert "\n" not in str(error.value)


def test_another_schema_is_one_line(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"id": ["a"], "dataset_name": ["watkins"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="not BEANS-Zero's parquet or arrow data") as error:
        open_component(components()["watkins"], source=str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(DatasetError, match="no parquet or arrow file in it"):
        (tmp_path / "empty").mkdir()
        open_component(components()["watkins"], source=str(tmp_path / "empty"))


def test_without_the_hub_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match=r"cannot be fetched from the Hub .*hf auth login.*local copy") as error:
        open_component(components()["watkins"], source="nobody/BEANS-Zero")
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", np.full((RATE, 2), 0.1 * number), RATE, subtype="DOUBLE")
    return tmp_path


def test_a_folder_of_recordings_with_csv(folder):
    (folder / "metadata.csv").write_text("file_name,label,split\n0.wav,wren,test\n1.wav,owl,examples\n2.wav,owl,\n")
    dataset = open_audio_folder(folder, name="mine", task="classification")
    assert [(row.id, row.label) for row in dataset.asked] == [("0.wav", "wren"), ("2.wav", "owl")]
    assert [row.id for row in dataset.examples] == ["1.wav"]
    samples, rate = dataset.audio("2.wav")
    assert samples.shape == (RATE, 2) and rate == RATE and np.allclose(samples, 0.2)


def test_a_folder_of_recordings_with_jsonl_draws_examples_from_what_is_asked(folder):
    rows = [{"file_name": f"{number}.wav", "label": "öwl\u2028x"} for number in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    dataset = open_audio_folder(folder, name="mine", task="detection")
    assert dataset.asked == dataset.examples and dataset.asked[0].label == "öwl\u2028x"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name, label, split\n0.wav, Quillia borealis, test\n 1.wav ,Quillia borealis,\n"),
        (
            "metadata.jsonl",
            """{"file_name": "0.wav", "label": " Quillia borealis\\n"}
               {"file_name": "1.wav ", "label": "Quillia borealis"}""",
        ),
    ],
)
def test_white_space_around_a_value_of_the_metadata_does_not_count(folder, name, text):
    (folder / name).write_text(text)
    dataset = open_audio_folder(folder, name="mine", task="classification")
    assert [(row.id, row.label) for row in dataset.asked] == [
        ("0.wav", "Quillia borealis"),
        ("1.wav", "Quillia borealis"),
    ]


@pytest.mark.parametrize(
    ("task", "labels", "named"),
    [
        ("classification", ("Marsh Wren", "Marsh wren"), "'Marsh Wren' and 'Marsh wren'"),
        ("classification", ("Marsh  Wren", "Marsh Wren."), "'Marsh  Wren' and 'Marsh Wren.'"),
        ("detection", ('"wren, owl"', "Owl"), "'owl' and 'Owl'"),
        ("classification", ("Dall's Porpoise", "Dall’s Porpoise"), "\"Dall's Porpoise\" and 'Dall’s Porpoise'"),
        ("classification", ("Marsh Wren", "- Marsh Wren!"), "'Marsh Wren' and '- Marsh Wren!'"),
    ],
)
def test_labels_that_scoring_could_not_tell_apart_are_named(folder, task, labels, named):
    (folder / "metadata.csv").write_text(f"file_name,label,split\n0.wav,{labels[0]},\n1.wav,{labels[1]},examples\n")
    with pytest.raises(DatasetError, match=rf"metadata.csv:3: the labels {named} differ only in case.*; write one"):
        open_audio_folder(folder, name="mine", task=task)


def test_no_label_of_a_detection_may_be_written_in_any_case(folder):
    (folder / "metadata.csv").write_text("file_name,label\n0.wav,None\n1.wav,none\n2.wav,wren\n")
    assert len(open_audio_folder(folder, name="mine", task="detection").asked) == 3


def test_captions_may_differ_in_case(folder):
    (folder / "metadata.csv").write_text("file_name,label\n0.wav,a wren\n1.wav,A wren.\n")
    assert len(open_audio_folder(folder, name="mine", task="captioning").asked) == 2


def test_the_fingerprint_follows_labels_and_recordings(folder):
    (folder / "metadata.csv").write_text("file_name,label\n0.wav,wren\n1.wav,owl\n")
    first = open_audio_folder(folder, name="mine", task="classification")
    assert first.fingerprint() == open_audio_folder(folder, name="other", task="classification").fingerprint()
    rows = (replace(first.asked[0], label="owl"), first.asked[1])
    assert replace(first, asked=rows, examples=rows).fingerprint() != first.fingerprint()
    before = first.fingerprint()
    soundfile.write(folder / "0.wav", np.zeros(RATE), RATE)
    assert first.fingerprint() != before


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("file_name,lable\n0.wav,wren\n", r"metadata.csv:2: no column 'label'; it has file_name, lable"),
        ("file_name,label\n0.wav,\n", "metadata.csv:2: no label"),
        (
            "file_name,label,Start,End\n0.wav,a,0,1\n",
            "metadata.csv:2: the column '(Start|End)' is not read; write it '",
        ),
        (
            "file_name,label,end (s)\n0.wav,wren,1\n",
            r"metadata.csv:2: the column 'end \(s\)' is not read; write it 'end'",
        ),
        ("file_name,label\n9.wav,wren\n", "metadata.csv:2: the recording '9.wav' does not exist"),
        ("file_name,label\n0.wav,wren\n../x.wav,wren\n", "metadata.csv:3: '../x.wav' is outside the folder"),
        ("file_name,label\n0.wav,wren,owl\n", "metadata.csv:2: more values than columns"),
        ("file_name,label\n0.wav\n", "metadata.csv:2: fewer values than columns"),
        ("file_name,label\n0.wav,wren\n0.wav,owl\n", r"metadata.csv:3: the id '0.wav' stands in \S+metadata.csv:2 too"),
        ("file_name,label\n0.wav,wren\n./0.wav,owl\n", "metadata.csv:3: the id '0.wav' stands in"),
        ("file_name,label\n0.wav,wren\n0.wav\u200b,owl\n", "metadata.csv:3: the id '0.wav' stands in"),
        ("file_name,label, label \n0.wav,wren,owl\n", "metadata.csv:1: the column 'label' stands twice"),
        ('file_name,label\n"0.wav","a\n\nb"\n\n9.wav,wren\n', "metadata.csv:6: the recording '9.wav' does not exist"),
        ('file_name,label\n0.wav,wren\n9.wav,"a\nb"\n', "metadata.csv:3: the recording '9.wav' does not exist"),
        ("file_name,label,split\n0.wav,wren,dev\n", "metadata.csv:2: split 'dev' is none of test, examples, train"),
        ("file_name,label,split\n0.wav,wren,train\n", r"rows that are asked\): no clip in it"),
        ("file_name,label\n", "no clip in it"),
        ('file_name,label\n"0.wav,wren\n', "damaged"),
    ],
)
def test_damaged_metadata_is_named_with_its_line(folder, metadata, said):
    (folder / "metadata.csv").write_text(metadata)
    with pytest.raises(DatasetError, match=said):
        open_audio_folder(folder, name="mine", task="classification")


@pytest.mark.parametrize("column", ["label", "file_name"])
def test_a_text_that_no_file_can_hold_is_named_with_its_line(folder, column):
    rows = [{"file_name": "0.wav", "label": "wren"}, {"file_name": "1.wav", "label": "owl", column: "\ud800"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DatasetError, match=rf"metadata.jsonl:2: '{column}' must be a text without a lone surrogate"):
        open_audio_folder(folder, name="mine", task="classification")


def one_recording(folder, samples, rate, name, **how):
    soundfile.write(folder / "made.wav", samples, rate, **how)
    (folder / "made.wav").rename(folder / name)
    (folder / "metadata.csv").write_text(f"file_name,label\n{name},wren\n")
    return open_audio_folder(folder, name="mine", task="classification").audio(name)


@pytest.mark.parametrize("seconds", [0.2, 10, 12])
@pytest.mark.parametrize("kind", [("WAV", "DOUBLE"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_the_first_ten_seconds_are_what_the_whole_file_holds(tmp_path, kind, seconds):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * 44_100), 2))
    heard, rate = one_recording(tmp_path, samples, 44_100, "a.rec", format=kind[0], subtype=kind[1])
    whole, _ = soundfile.read(tmp_path / "a.rec", dtype="float64")
    assert rate == 44_100 and heard.shape == whole[:441_000].shape
    # Of an mp3 FFmpeg decodes all, libmpg123 not always; they round differently.
    assert np.abs(heard - whole[:441_000]).max() <= (1e-5 if kind[0] == "MP3" else 0)


def test_a_recording_is_read_by_its_content_and_no_further_than_it_is_heard(tmp_path):
    samples = np.full(12 * RATE, 0.25)
    samples[11 * RATE] = np.nan
    heard, _ = one_recording(tmp_path, samples, RATE, "a.raw", subtype="DOUBLE")
    assert np.array_equal(heard, samples[: 10 * RATE])


def test_a_recording_that_breaks_is_heard_up_to_there_if_that_is_half_a_second(tmp_path):
    samples = np.full(12 * RATE, 0.25)
    samples[9 * RATE] = np.nan
    notes = []
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="DOUBLE")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.wav,wren\n")
    dataset = open_audio_folder(tmp_path, name="mine", task="classification")
    assert np.array_equal(dataset.audio("a.wav", notes.append)[0], samples[: 9 * RATE])
    broken = f"{tmp_path / 'a.wav'}: breaks after 9.00 s: holds NaN or infinity; what comes before is heard"
    assert notes == [broken]
    samples[RATE // 3] = np.nan
    with pytest.raises(AudioError, match=r"b\.wav: breaks after 0\.33 s: holds NaN"):
        one_recording(tmp_path, samples, RATE, "b.wav", subtype="DOUBLE")


def test_one_channel_of_a_folders_recordings_is_heard_and_is_data_of_its_own(tmp_path):
    samples = np.stack([np.full(RATE, 0.25), np.full(RATE, 0.5)], axis=1)
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    (tmp_path / "metadata.csv").write_text("file_name,label\na.wav,wren\n")
    choices = [DatasetChoice(name="d", path=str(tmp_path), channel=channel) for channel in ("mean", 2, 3)]
    mean, second, third = (open_dataset(choice, recipe("")) for choice in choices)
    assert mean.audio("a.wav")[0].shape == (RATE, 2)
    assert np.array_equal(second.audio("a.wav")[0], samples[:, 1])
    assert mean.fingerprint() != second.fingerprint()
    with pytest.raises(AudioError, match=r"a\.wav: there is no channel 3; it has 2"):
        third.audio("a.wav")


@pytest.mark.parametrize(
    "content",
    [
        b"file_name;label;split\n0.wav;wren, marsh;\n1.wav;owl;test\n",
        b"sep=;\nfile_name;label;split\n0.wav;wren, marsh;\n1.wav;owl;test\n",
        b"file_name\tlabel\n0.wav\twren, marsh\n1.wav\towl\n",
        b'file_name,label,,\r\n0.wav,"wren, marsh",,\r\n1.wav,owl,,\r\n,,,\r\n',
        "file_name\tlabel\r\n0.wav\twren, marsh\r\n1.wav\towl\r\n".encode("utf-16"),
        '\ufeff"file_name",label\n0.wav,"wren, marsh"\n1.wav,owl\u200b\n'.encode(),
        b'file_name,"label"\n./0.wav,"wren, marsh"\n.\\1.wav,owl\n',
    ],
)
def test_a_table_is_read_as_spreadsheets_write_it(folder, content):
    (folder / "metadata.csv").write_bytes(content)
    dataset = open_audio_folder(folder, name="mine", task="classification")
    assert [(row.id, row.label) for row in dataset.asked] == [("0.wav", "wren, marsh"), ("1.wav", "owl")]
    assert len(dataset.audio("1.wav")[0]) == RATE


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "file_name,label\n0.wav,Höckergans\n".encode("cp1252"),
            "is not UTF-8 text .*; save it as 'CSV UTF-8' in Excel",
        ),
        (b"PK\x03\x04\x14\0\x06\0", "is a workbook or an archive, not text; save it as 'CSV UTF-8' in Excel"),
    ],
)
def test_a_table_that_cannot_be_read_says_how_to_save_it(folder, content, said):
    (folder / "metadata.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"metadata\.csv: {said}"):
        open_audio_folder(folder, name="mine", task="classification")


def test_names_and_labels_are_compared_composed_and_without_what_nobody_sees(folder):
    composed, taken_apart = "Grünfink", "Gru\u0308nfink"
    (folder / "0.wav").rename(folder / f"{taken_apart}.wav")  # as macOS writes it
    (folder / "metadata.csv").write_text(f"file_name,label\n{composed}.wav,{taken_apart}\n1.wav,{composed}\u200d\n")
    dataset = open_audio_folder(folder, name="mine", task="classification")
    assert [(row.id, row.label) for row in dataset.asked] == [(f"{composed}.wav", composed), ("1.wav", composed)]
    assert dataset.labels == 1 and len(dataset.audio(f"{composed}.wav")[0]) == RATE


def test_a_number_as_a_label_is_a_text(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.wav", "label": 3}\n{"file_name": "1.wav", "label": 2.50}\n'
    )
    dataset = open_audio_folder(folder, name="mine", task="classification")
    assert [row.label for row in dataset.asked] == ["3", "2.5"]


def test_a_key_that_stands_twice_is_named_with_its_line(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "0.wav", "label": "a"}\n{"label": "a", "label": "b"}\n')
    with pytest.raises(DatasetError, match=r"metadata\.jsonl:2: the key 'label' stands twice"):
        open_audio_folder(folder, name="mine", task="classification")


def test_of_half_an_hour_the_memory_of_ten_seconds_is_taken(tmp_path):
    import resource

    with soundfile.SoundFile(tmp_path / "long.flac", "w", samplerate=48_000, channels=2) as file:
        for _ in range(30):
            file.write(np.zeros((60 * 48_000, 2), dtype=np.int16))
    (tmp_path / "metadata.csv").write_text("file_name,label\nlong.flac,wren\n")
    dataset = open_audio_folder(tmp_path, name="mine", task="classification")
    one_recording(tmp_path, np.zeros(8000), 8000, "short.flac")  # what the libraries take themselves
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert dataset.audio("long.flac")[0].shape == (480_000, 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB; the whole is 1.4 GB


def test_a_file_that_is_no_recording_is_an_audio_error(folder):
    (folder / "0.wav").write_text("not audio")
    (folder / "metadata.csv").write_text("file_name,label\n0.wav,wren\n")
    with pytest.raises(AudioError, match=r"0\.wav: cannot be decoded"):
        open_audio_folder(folder, name="mine", task="classification").audio("0.wav")
