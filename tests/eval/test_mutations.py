"""2,000 damaged files, each answered with one clear line."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import yaml

from mergekit_bio.errors import MergekitBioError
from mergekit_bio.eval.data.audio_folder import open_audio_folder
from mergekit_bio.eval.label_map import read_label_map
from mergekit_bio.eval.recipe.schema import load_recipe
from mergekit_bio.eval.records.predictions import Prediction, read_predictions
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.records.run_directory import read_record
from mergekit_bio.eval.scoring.score import score

RECIPE = {
    "merge": {"base": "a/b", "adapter": "c/d", "alphas": [0.0, 0.5]},
    "datasets": ["unseen-family-cmn"],
    "species": [{"name": "a", "description": "chirps"}, {"name": "b", "description": "clicks"}],
    "n_examples": 1,
    "queries": ["What?", "One of: {species_list}{randomize}"],
    "targets": ["label", "label"],
    "generate": {"max_new_tokens": 9, "num_beams": 2, "length_penalty": 1.0},
    "decoding": "choice",
    "scorer": "exact",
    "streaming": False,
    "seed": 3,
}
REFERENCE = {
    "model": {"llama_path": "a/b", "ckpt": "c/d"},
    "generate": {"max_new_tokens": 9, "num_beams": 2},
    "extended": {
        "datasets": ["watkins"],
        "lora_scales": [0.1, 1.0],
        "top_k_species": 3,
        "queries": ["Pick: {species_list}"],
    },
}
PREDICTIONS = [
    {"prediction": f"p{n}", "label": "l", "id": str(n), "dataset_name": "d", "lora_scale": 0.1, "generated_ids": [1, n]}
    for n in range(4)
]
METADATA = [{"file_name": f"{n}.wav", "label": "wren", "split": "test"} for n in range(3)]

#: A value that fits nowhere in the documents above.
WRONG = [None, True, -1.5, "", [], {}, [[]], [None], {"x": 1}, float("inf")]


def paths(value, path=()):
    """Every place in a document."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from paths(part, (*path, key))


def mutated(document, generator: random.Random):
    """The document with one or two places renamed, dropped or given another kind of value."""
    document = json.loads(json.dumps(document))
    for _ in range(generator.choice((1, 1, 2))):
        *path, last = generator.choice([*paths(document)])
        parent = document
        for key in path:
            parent = parent[key]
        kind = generator.random()
        if isinstance(last, str) and kind < 0.35:
            parent[last + generator.choice("sx_ ")] = parent.pop(last)
        elif kind < 0.5:
            del parent[last]
        else:
            parent[last] = generator.choice([value for value in WRONG if type(value) is not type(parent[last])])
    return document


def scrambled(content: bytes, generator: random.Random) -> bytes:
    """The bytes with a cut, a hole, a copy or noise in them."""
    start = generator.randrange(len(content))
    end = min(len(content), start + generator.randrange(1, 30))
    kind = generator.randrange(5)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[end:]
    if kind == 2:
        return content[:end] + content[start:]
    noise = generator.choice(
        [b"\x00", b"\xff\xfe", b"\t", b"{", b"]", b'"', b"'", b": ", b"\n", b"&a *a", b"!!x ", b"%", b"\\ud800"]
    )
    return content[:start] + noise + content[end if kind == 3 else start :]


def lines_of(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_scored(path: Path) -> None:
    rows = read_predictions(path)
    target = path.with_name("beans_zero_eval_d_query0_lora010.jsonl")
    path.replace(target)
    for cell in read_runs([target]) if rows else ():
        score(cell, scorer="exact")


def broken(read: Callable[[Path], object], path: Path) -> str | None:
    """The error's text, None where the file was still good; anything but a user's error passes through."""
    try:
        read(path)
    except MergekitBioError as error:
        return str(error)
    return None


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", [0.0] * 8, 8000)
    return tmp_path


def read_metadata(path: Path) -> None:
    open_audio_folder(path.parent, name="d", task="classification")


KINDS: dict[str, tuple[object, Callable[[object], bytes], Callable[[Path], object]]] = {
    "mine.yaml": (RECIPE, lambda document: yaml.safe_dump(document, sort_keys=False).encode(), load_recipe),
    "reference.yaml": (REFERENCE, lambda document: yaml.safe_dump(document, sort_keys=False).encode(), load_recipe),
    "metadata.jsonl": (METADATA, lines_of, read_metadata),
    "p.jsonl": (PREDICTIONS, lines_of, read_scored),
}


@pytest.mark.parametrize(
    ("name", "number"), [("mine.yaml", 500), ("reference.yaml", 200), ("metadata.jsonl", 300), ("p.jsonl", 300)]
)
def test_a_document_with_a_wrong_key_or_value_is_one_clear_line(folder, name, number):
    document, dump, read = KINDS[name]
    generator = random.Random(name)
    path = folder / name
    refused = 0
    while refused < number:
        path.write_bytes(dump(mutated(document, generator)))
        content = path.read_bytes()
        message = broken(read, path)
        if message is None:  # what was dropped or renamed need not be required
            continue
        refused += 1
        assert "\n" not in message and len(message) < 400, (content, message)
        assert message.startswith(str(folder)), (content, message)


@pytest.mark.parametrize(
    ("name", "number"), [("mine.yaml", 200), ("reference.yaml", 100), ("metadata.jsonl", 150), ("p.jsonl", 150)]
)
def test_a_scrambled_file_is_good_or_one_clear_line(folder, name, number):
    document, dump, read = KINDS[name]
    generator = random.Random(name)
    path = folder / name
    refused = 0
    while refused < number:
        path.write_bytes(scrambled(dump(document), generator))
        content = path.read_bytes()
        message = broken(read, path)
        refused += message is not None
        assert message is None or ("\n" not in message and str(folder) in message), (content, message)


def test_a_scrambled_table_or_record_is_good_or_one_clear_line(folder, make_run):
    run = folder / "run"
    shutil.copytree(make_run(clips=3), run)
    record = (run / "run.json").read_bytes()
    csv_rows = b'file_name,label,split\n0.wav,wren,test\n1.wav,"owl, barn",\n2.wav,owl,examples\n'
    map_rows = b'label,scientific\na,Aus bus\n"b, c",Cus dus\n'
    generator = random.Random(0)
    refused = 0
    while refused < 100:
        (run / "run.json").write_bytes(scrambled(record, generator))
        (folder / "metadata.csv").write_bytes(scrambled(csv_rows, generator))
        (folder / "map.csv").write_bytes(scrambled(map_rows, generator))
        for read, path in (
            (lambda path: read_record(path.parent), run / "run.json"),
            (read_metadata, folder / "metadata.csv"),
            (read_label_map, folder / "map.csv"),
        ):
            message = broken(read, path)
            refused += message is not None
            assert message is None or ("\n" not in message and str(folder) in message), message


def test_predictions_are_the_rows_that_were_meant(tmp_path):
    """The undamaged documents are good: what is refused above is refused for its damage."""
    for name in ("mine.yaml", "reference.yaml"):
        document, dump, _ = KINDS[name]
        (tmp_path / name).write_bytes(dump(document))
        load_recipe(tmp_path / name)
    (tmp_path / "p.jsonl").write_bytes(lines_of(PREDICTIONS))
    assert read_predictions(tmp_path / "p.jsonl")[1] == Prediction(
        prediction="p1", label="l", id="1", dataset_name="d", lora_scale=0.1, generated_ids=(1, 1)
    )
