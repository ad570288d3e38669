import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from mergekit_bio.errors import OutputError, RunError
from mergekit_bio.eval.records.predictions import Prediction, PredictionWriter, read_predictions


def row(number: int, **extra) -> Prediction:
    values = {"prediction": f"Öland {number}\n", "label": "a", "id": f"clip-{number:04d}", "dataset_name": "watkins"}
    return Prediction(**(values | extra))


FULL = row(
    0,
    prompt="What?\n",
    lora_scale=0.4,
    prompt_tokens=60,
    generated_ids=(5, 6),
    logprob=-1.5,
    example_ids=("x", "y"),
    choice_logprobs={"a": -1.0, "b": -2.0},
    audio="a.wav",
)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "p.jsonl"
    with PredictionWriter(path) as writer:
        for prediction in (FULL, row(1)):
            writer.append(prediction)
    assert read_predictions(path) == (FULL, row(1))


def test_a_line_begins_with_the_reference_keys_even_where_they_are_empty():
    assert list(json.loads(row(1).to_line())) == ["prediction", "label", "id", "dataset_name", "prompt", "lora_scale"]


def test_a_gzipped_file_is_read(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(FULL.to_line()))
    assert read_predictions(path) == (FULL,)


def test_unknown_keys_and_blank_lines_are_ignored_and_number_ids_are_texts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prediction": "a", "label": "b", "id": 7, "dataset_name": "c", "more": [1]}\n\n')
    assert read_predictions(path) == (Prediction(prediction="a", label="b", id="7", dataset_name="c"),)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"nonsense\n", "p.jsonl:2: is not valid JSON (Expecting value: line 1 column 1 (char 0)): 'nonsense'"),
        (b"[1]\n", "p.jsonl:2: is not a JSON object: '[1]'"),
        (b'{"prediction": "a", "id": "1", "dataset_name": "c"}\n', "p.jsonl:2: label: is missing"),
        (row(1).to_line().replace(b'"a"', b"3"), "p.jsonl:2: label: input should be a valid string, not 3"),
        (row(1).to_line().replace(b'"lora_scale": null', b'"lora_scale": NaN'), "lora_scale: input should be a finite"),
        (row(1).to_line().replace(b'"a"', b'"\\ud800"'), "p.jsonl:2: label: holds half of a surrogate pair"),
        (row(0).to_line(), "p.jsonl:2: the id 'clip-0000' stands in line 1 already"),
    ],
)
def test_a_damaged_line_is_named_with_its_number(tmp_path, line, said):
    path = tmp_path / "p.jsonl"
    path.write_bytes(row(0).to_line() + line)
    with pytest.raises(RunError) as error:
        read_predictions(path)
    assert said in str(error.value)


def test_a_cut_gzip_file_is_an_error(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(row(number).to_line() for number in range(50)))[:-20])
    with pytest.raises(RunError, match="is the file complete"):
        read_predictions(path)


def test_an_id_cannot_be_answered_twice(tmp_path):
    with PredictionWriter(tmp_path / "p.jsonl") as writer:
        writer.append(row(1))
        with pytest.raises(RunError, match="has an answer already"):
            writer.append(row(1))


@pytest.mark.parametrize("cut", range(1, len(row(1).to_line())))
def test_reopening_drops_an_unfinished_line_wherever_it_was_cut(tmp_path, cut):
    path = tmp_path / "p.jsonl"
    path.write_bytes(row(0).to_line() + row(1).to_line()[:cut])
    assert read_predictions(path)[:1] == (row(0),)
    with PredictionWriter(path) as writer:
        assert writer.done == {"clip-0000"}
        writer.append(row(1))
    assert path.read_bytes() == row(0).to_line() + row(1).to_line()


def test_a_full_disk_is_said_in_one_line_and_the_file_resumes(tmp_path):
    path = tmp_path / "p.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = len(row(0).to_line())
    with PredictionWriter(path) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2 + size // 2, limits[1]))
        try:
            with pytest.raises(OutputError, match="run the command again to go on from row 3"):
                for number in range(9):
                    writer.append(row(number))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size * 2 + size // 2
    with PredictionWriter(path) as writer:
        for number in range(9):
            if row(number).id not in writer.done:
                writer.append(row(number))
    assert read_predictions(path) == tuple(row(number) for number in range(9))


WRITE_SLOWLY = """
import sys, time
from pathlib import Path
from mergekit_bio.eval.records.predictions import Prediction, PredictionWriter
with PredictionWriter(Path(sys.argv[1])) as writer:
    print("open", flush=True)
    for number in range(400):
        if f"clip-{number}" not in writer.done:
            writer.append(Prediction(prediction="x" * 3000, label="a", id=f"clip-{number}", dataset_name="d"))
            time.sleep(0.0005)
"""


def test_twenty_kills_leave_the_same_content(tmp_path):
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    kills = 0
    for attempt in range(20):
        process = subprocess.Popen([sys.executable, "-c", WRITE_SLOWLY, killed], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"open\n"
        time.sleep(0.001 * (attempt % 7) + 0.003)
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills >= 15
    subprocess.run([sys.executable, "-c", WRITE_SLOWLY, killed], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-c", WRITE_SLOWLY, whole], check=True, stdout=subprocess.DEVNULL)
    assert killed.read_bytes() == whole.read_bytes()
