"""``mergekit-bio ask`` as a user types it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_naturelm import make_base

from mergekit_bio.audio.device import pick_device
from mergekit_bio.errors import EngineError

QUESTION = "What is the common name for the focal species in the audio?"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(command_line: Run) -> Run:
    return lambda *arguments: command_line("ask", *arguments, "--device", "cpu")


@pytest.fixture
def recording(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, seconds: float = 2, rate: int = 16_000) -> Path:
        samples = np.random.default_rng(len(name)).uniform(-0.5, 0.5, round(seconds * rate))
        soundfile.write(tmp_path / name, samples, rate)
        return tmp_path / name

    return write


SHORT = ("--max-new-tokens", 3)


def test_answers_every_window_of_a_long_recording(run: Run, recording, merged: Path) -> None:
    path = recording("long.flac", seconds=23, rate=22_050)

    code, out, err = run(merged, path, "--prompt", QUESTION, *SHORT, "--json")

    assert code == 0, err
    document = json.loads(out)
    assert document["prompt"] == QUESTION
    assert [(a["recordings"], a["start"], a["end"]) for a in document["answers"]] == [
        ([str(path)], 0.0, 10.0),
        ([str(path)], 10.0, 20.0),
        ([str(path)], 20.0, 23.0),
    ]
    assert document["failed"] == []


def test_a_checkpoint_that_is_not_beside_the_others_is_not_looked_for_on_the_hub(
    run: Run, recording, merged: Path
) -> None:
    code, _, err = run(merged.with_name("alpha-0.5"), recording("a.wav"), "-p", QUESTION)

    assert code == 1
    assert err.endswith(f"no such directory beside the checkpoints in {merged.parent}; did you mean 'alpha-0.50'?\n")


def test_windows_and_hop_are_the_users(run: Run, recording, merged: Path) -> None:
    path = recording("a.wav", seconds=6)

    code, out, _ = run(merged, path, "-p", QUESTION, *SHORT, "--window", 2, "--hop", 4, "--beams", 1, "--json")

    assert code == 0
    assert [(a["start"], a["end"]) for a in json.loads(out)["answers"]] == [(0.0, 2.0), (4.0, 6.0)]


def test_a_windows_answer_is_the_processors_and_the_models(run: Run, recording, merged: Path) -> None:
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    import mergekit_bio.model  # noqa: F401 -- registers the model

    path = recording("a.wav", seconds=3)
    _, out, _ = run(merged, path, "-p", QUESTION, "--max-new-tokens", 12, "--quiet")

    processor = AutoProcessor.from_pretrained(merged)
    inputs = processor(processor.render(QUESTION), audio=soundfile.read(path)[0])
    ids = AutoModelForMultimodalLM.from_pretrained(merged).generate(
        **inputs, do_sample=False, num_beams=2, max_new_tokens=12
    )
    expected = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert out.strip() == expected.strip()


def test_slots_take_the_recordings_in_order_for_one_answer(run: Run, recording, merged: Path) -> None:
    one, two = recording("one.wav"), recording("second.wav")
    prompt = "<AudioHere> or <AudioHere>"  # begins and ends with a slot

    code, out, err = run(merged, one, two, "-p", prompt, *SHORT, "--json")

    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    assert answer["recordings"] == [str(one), str(two)]


def test_slots_whose_recording_breaks_say_so(run: Run, recording, merged: Path, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 6 * 16_000)
    samples[3 * 16_000] = np.nan
    soundfile.write(tmp_path / "broken.wav", samples, 16_000, subtype="DOUBLE")

    code, _, err = run(
        merged, recording("one.wav"), tmp_path / "broken.wav", "-p", "<AudioHere> or <AudioHere>", *SHORT
    )

    assert code == 0
    assert f"note: {tmp_path}/broken.wav: breaks after 3.00 s: holds NaN or infinity" in err


def test_without_json_there_is_a_line_an_answer(run: Run, recording, merged: Path) -> None:
    one, two = recording("one.wav"), recording("second.wav")

    code, out, _ = run(merged, one, two, "-p", QUESTION, *SHORT)

    assert code == 0
    assert f"{one} [0.0-2.0 s]" in out
    assert f"{two} [0.0-2.0 s]" in out


def test_a_file_name_that_is_no_text_is_shown_escaped(run: Run, recording, merged: Path, tmp_path: Path) -> None:
    path = recording("a.wav").rename(tmp_path / os.fsdecode(b"\xff.wav"))
    words = [merged, path, "-p", QUESTION, *map(str, SHORT)]
    done = subprocess.run(
        [sys.executable, "-c", "from mergekit_bio.cli.app import main; main()", "ask", *words, "--device", "cpu"],
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        text=True,
    )
    _, out, _ = run(*words, "--json")

    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/\\udcff.wav [0.0-2.0 s]" in done.stdout
    document = json.loads(out)
    assert document["answers"][0]["recordings"] == [f"{tmp_path}/\\udcff.wav"], "no half of a surrogate pair"
    assert [*document["summary"]["recordings"]] == document["answers"][0]["recordings"]


def test_in_a_folder_the_good_are_answered_and_the_bad_counted(
    run: Run, recording, merged: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    recording("good.wav").rename(folder / "good.wav")
    recording("short.wav", seconds=0.2).rename(folder / "short.wav")
    (folder / "text.wav").write_text("no audio")

    code, out, err = run(merged, folder, "-p", QUESTION, *SHORT, "--json")

    assert code == 0
    document = json.loads(out)
    assert [answer["recordings"] for answer in document["answers"]] == [[str(folder / "good.wav")]]
    assert [failure["recording"] for failure in document["failed"]] == [
        str(folder / n) for n in ("short.wav", "text.wav")
    ]
    assert "2 of 3 recordings could not be used" in err


@pytest.mark.parametrize("others", [0, 1])
def test_a_recording_that_breaks_midway_is_answered_up_to_there(
    run: Run, merged: Path, tmp_path: Path, others: int
) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 12 * 16_000)
    samples[11 * 16_000] = np.nan  # in the sixth of windows of 2 s
    soundfile.write(tmp_path / "broken.wav", samples, 16_000, subtype="DOUBLE")
    (tmp_path / "text.wav").write_text("no audio")
    paths = [tmp_path / "broken.wav", *[tmp_path / "text.wav"] * others]

    code, out, err = run(merged, *paths, "-p", QUESTION, *SHORT, "--window", 2, "--json")

    assert code == 0
    document = json.loads(out)
    assert [answer["start"] for answer in document["answers"]] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert document["answers"][-1]["end"] == 11.0
    assert {failure["recording"] for failure in document["failed"]} == set(map(str, paths))
    assert f"heard up to 11.0 s: {tmp_path}/broken.wav: breaks after 11.00 s: holds NaN or infinity" in err
    if others:
        assert "1 of 2 recordings could not be used" in err
        assert "1 of 2 recordings break midway, and were heard up to there" in err


def test_answers_go_to_a_table_and_what_failed_is_said_even_when_quiet(
    run: Run, recording, merged: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "folder", tmp_path / "birds.csv"
    folder.mkdir()
    recording("good.wav", seconds=12).rename(folder / "good.wav")
    (folder / "text.wav").write_text("no audio")
    words = (merged, folder, "-p", QUESTION, *SHORT, "--engine", "transformers", "--out", out)

    code, stdout, err = run(*words, "--quiet")

    assert (code, stdout) == (0, f"{out}\n")
    assert err.startswith(f"skipped: {folder}/text.wav: ") and err.count("\n") == 1
    assert [line.split(",")[1:3] for line in out.read_text().splitlines()[1:]] == [["0.0", "10.0"], ["10.0", "12.0"]]

    code, stdout, err = run(*words, "--json")  # where nothing is left to ask

    document = json.loads(stdout)
    assert {key: document[key] for key in ("prompt", "out", "recordings", "windows")} == {
        "prompt": QUESTION, "out": str(out), "recordings": 2, "windows": 2,
    }  # fmt: skip
    assert [failure["recording"] for failure in document["failed"]] == [str(folder / "text.wav")]
    assert "1 of 2 recordings could not be used" in err


def test_where_none_is_good_it_is_an_error(run: Run, tmp_path: Path, merged: Path) -> None:
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_text("no audio")

    for named in ([tmp_path], [tmp_path / "a.wav", tmp_path / "b.wav"]):
        code, out, err = run(merged, *named, "-p", QUESTION)

        assert code == 1
        assert not out
        assert "error: none of the 2 recordings could be used" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "--prompt", ""], "the prompt is empty"),
        (["a.wav", "--prompt", "<AudioHere> <AudioHere>"], "2 audio slots (<AudioHere>), but 1 audio was given"),
        (["a.wav", "a.wav", "--prompt", "<AudioHere>?"], "1 audio slot (<AudioHere>), but 2 audios were given"),
        (["gone.wav", "--prompt", "x"], "gone.wav: no such file"),
        (["empty", "--prompt", "x"], "empty: holds no recordings"),
        (["text.wav", "--prompt", "x"], "text.wav: cannot be decoded as audio"),
        (["a.wav", "--prompt", "x", "--window", "11"], "window of 11 s"),
        (["a.wav", "--prompt", "x", "--hop", "0"], "hop of 0 s"),
        (["a.wav", "--prompt", "<|reserved_special_token_0|>"], "write <AudioHere> instead"),
        (["a.wav", "--prompt", "x", "--format", "raven"], "--format: give it with --out"),
        (["a.wav", "--prompt", "x", "--out", "birds.xls"], "birds.xls: the name must end in .csv, .jsonl"),
        (["a.wav", "a.wav", "--prompt", "<AudioHere><AudioHere>", "--out", "b.csv"], "this prompt is about several"),
        (["a.wav", "--prompt", "x", "--channel", "left"], "a channel is 'mean' or a number from 1, not 'left'"),
        (["a.wav", "--prompt", "x", "--channel", "2"], "a.wav: "),
        (["a.wav", "--prompt", "x", "--engine", "vlm"], "--engine vlm: no such engine; did you mean 'vllm'?"),
        (["a.wav", "--prompt", "x", "--workers", "0"], "--workers 0: write a whole number of 1 or more"),
    ],
)
def test_mistakes_get_one_clear_line(
    run: Run, recording, merged: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    recording("a.wav")
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    code, out, err = run(merged, *arguments)

    assert code == 1
    assert not out
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_model_without_ears_is_refused(run: Run, recording, tmp_path: Path) -> None:
    make_base(tmp_path / "llama")

    code, _, err = run(tmp_path / "llama", recording("a.wav"), "-p", QUESTION)

    assert code == 1
    assert "has no audio tower; give a merge of NatureLM-audio made without --text-only" in err


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(EngineError, match="--device abacus"):
        pick_device("abacus")
