"""Tiny stand-ins for everything that the pages name and do not make; hub ids are folders, which win over the hub."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from documentation.pages import ROOT, in_language, is_merge_recipe

LLAMA, NATURELM, BEANS_ZERO = (
    "meta-llama/Llama-3.1-8B-Instruct",
    "EarthSpeciesProject/NatureLM-audio",
    "EarthSpeciesProject/BEANS-Zero",
)


def write_standins(here: Path, make_run: Callable[..., Path]) -> None:
    import peft
    import transformers
    from tiny_naturelm import make_naturelm

    import mergekit_bio

    _write_llama(here / LLAMA)
    shutil.copytree(here / LLAMA, here / "my-llama")
    make_naturelm(here / NATURELM, base=here / LLAMA)
    for name in ("my-lora", "birds", "whales"):
        model = transformers.AutoModelForCausalLM.from_pretrained(here / LLAMA)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        peft.get_peft_model(model, settings).save_pretrained(here / name)
    sources = {"base": here / LLAMA, "adapter": here / NATURELM, "fsync": False}
    mergekit_bio.merge(**sources, alphas=[0.5], out=here / "merged/half")
    mergekit_bio.merge(**sources, alphas=[0.4, 1.0], out=here / "sweep")
    for name in ("wren.wav", "a.flac", "b.mp3", "recordings/1.wav", "recordings/2.flac"):
        write_recording(here / name)
    (here / "species.txt").write_text("# birds of the marsh\nMarsh Wren\nSora\nVirginia Rail\n")
    entry = {"key": "ana", "audio_seconds": 10, "prompt_tokens": 61, "completion_tokens": 8, "seconds": 0.4}
    (here / "requests.jsonl").write_text(f"{json.dumps(entry)}\n" * 2)
    _write_beans_zero(here / BEANS_ZERO / "test.parquet")
    for name in ("closed_set", "watkins", "cbi", "instructions"):
        shutil.copytree(make_run(name=name), here / "runs" / name)
    for name in ("eval", "recipes"):
        (here / name).symlink_to(ROOT / name)
    if shared := os.environ.get("MERGEKIT_BIO_SHARED"):
        (here / "published").symlink_to(Path(shared, "published"))


def _write_llama(folder: Path) -> None:
    """A Llama whose answers end after a word or two."""
    from safetensors.torch import load_file, save_file
    from tiny_naturelm import make_base

    make_base(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][json.loads((folder / "config.json").read_text())["eos_token_id"]] *= 10
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_recording(file: Path) -> None:
    import numpy as np
    import soundfile

    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.random.default_rng(len(file.name)).uniform(-0.5, 0.5, 16_000), 16_000)


def _write_beans_zero(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True)
    rows = [
        {
            "id": str(number),
            "dataset_name": "unseen-family-cmn",
            "audio": [0.1, -0.1] * 4000,
            "metadata": json.dumps({"sample_rate": 8000}),
            "instruction": "<Audio><AudioHere></Audio> What is it?",
            "output": label,
        }
        for number, label in enumerate(["Coruro", "Dall's Porpoise"])
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_recipes(page: Path, here: Path) -> None:
    """The recipes that a page shows, under the names that its commands use."""
    for block in in_language("yaml"):
        if block.page == page and is_merge_recipe(block):
            (here / "merge.yaml").write_text(block.text)
        elif block.page == page and "my_recordings/" in block.text:
            (here / "my_birds.yaml").write_text(block.text)
    for block in in_language("csv"):
        write_audio_folder(here / "my_recordings", block.text)


def write_audio_folder(folder: Path, metadata: str) -> None:
    for row in csv.DictReader(metadata.splitlines()):
        write_recording(folder / row["file_name"])
    (folder / "metadata.csv").write_text(metadata)
