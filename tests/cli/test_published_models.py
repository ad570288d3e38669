"""The first commands with nothing named, on the default base and adapter as the hub publishes them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hub_cache import ADAPTER_REVISION, BASE_REVISION, put_in_cache
from merge.oracle import neighbours, read_tensors
from safetensors.torch import load_file, save_file

from mergekit_bio.audio.prefix import AudioPrefix

MODULES = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(3) for kind in "qkvo"]


def exact_weight(base: Path, adapter: Path, module: str, alpha: float) -> torch.Tensor:
    """W0 + alpha * B A in float64; the golden model's scaling, lora_alpha / rank, is in its config.json."""
    config = json.loads((adapter / "config.json").read_text())
    lora = load_file(adapter / "model.safetensors")
    name = f"llama_model.base_model.model.{module}"
    a, b = (lora[f"{name}.lora_{half}.default.weight"].double() for half in "AB")
    assert lora[f"{name}.lora_A.default.weight"].dtype == torch.bfloat16, "not the published layout"
    scaling = config["lora_alpha"] / config["lora_rank"]
    return read_tensors(base)[f"{module}.weight"].double() + alpha * scaling * (b @ a)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    file = tmp_path / "wren.wav"
    soundfile.write(file, 0.3 * np.sin(np.arange(16_000) * 0.3), 16_000)
    return file


def test_every_command_works_without_a_name(published_models, command_line, recording, tmp_path, monkeypatch):
    base, adapter = published_models
    monkeypatch.chdir(tmp_path)

    code, out, err = command_line("merge", "--alpha", "0.5", "--dry-run")
    assert code == 0, err
    assert not (tmp_path / "merged").exists()
    assert "q_proj" in out
    assert "its copy of the base's input embedding equals meta-llama/Llama-3.1-8B-Instruct" in err

    code, out, err = command_line("merge", "--alpha", "0.5", "--rounding", "nearest", "--quiet")
    assert code == 0, err
    half = tmp_path / "merged/NatureLM-audio-alpha-0.50"
    tensors = read_tensors(half)
    for module in MODULES:
        assert tensors[f"{module}.weight"].equal(exact_weight(base, adapter, module, 0.5).bfloat16()), module
    copied = read_tensors(base)
    for name in copied.keys() - {f"{module}.weight" for module in MODULES}:
        assert tensors[name].equal(copied[name]), name
    manifest = json.loads((half / "merge.json").read_text())
    assert manifest["base"]["revision"] == BASE_REVISION
    assert [origin["revision"] for origin in manifest["adapters"]] == [ADAPTER_REVISION]

    code, out, err = command_line("merge", "--alpha", "0", "--alpha", "0.3", "--alpha", "1", "--json")
    assert code == 0, err
    paths = [Path(checkpoint["path"]) for checkpoint in json.loads(out)["checkpoints"]]
    for alpha, path in zip((0, 0.3, 1), paths, strict=True):
        tensors = read_tensors(path)
        for module in MODULES:
            below, above = neighbours(exact_weight(base, adapter, module, alpha))
            written = tensors[f"{module}.weight"]
            assert ((written == below) | (written == above)).all(), (alpha, module)

    for path in (half, *paths):
        code, out, err = command_line("verify", path, "--against-sources", "--json")
        assert code == 0, err

    code, out, err = command_line("inspect", "EarthSpeciesProject/NatureLM-audio", "--json")
    assert code == 0, err
    assert json.loads(out)["kind"] == "NatureLM-audio checkpoint"
    assert json.loads(out)["holds"] == "LoRA, audio tower, a copy of the input embedding"
    for source in ("meta-llama/Llama-3.1-8B-Instruct", half):
        code, out, err = command_line("inspect", source)
        assert code == 0, err

    for source in ("EarthSpeciesProject/NatureLM-audio", half):
        code, out, err = command_line("embed", source, recording, "--out", tmp_path / "embeddings.safetensors")
        assert code == 0, err
        assert any(t.shape[-2:] == (29, 64) for t in load_file(tmp_path / "embeddings.safetensors").values())
        (tmp_path / "embeddings.safetensors").unlink()

    code, out, err = command_line("ask", half, recording, "--prompt", "What is it?", "--max-new-tokens", "4", "--json")
    assert code == 0, err


def test_the_merge_is_that_of_a_file_without_the_embedding(published_models, command_line, tmp_path):
    _, adapter = published_models
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((adapter / "config.json").read_bytes())
    tensors = load_file(adapter / "model.safetensors")
    del tensors["llama_embed_tokens.weight"]
    save_file(tensors, bare / "model.safetensors")

    for source, out in (("EarthSpeciesProject/NatureLM-audio", "whole"), (bare, "without")):
        code, _, err = command_line("merge", "--alpha", "0.5", "--adapter", source, "--out", tmp_path / out)
        assert code == 0, err
    whole, without = tmp_path / "whole", tmp_path / "without"
    names = sorted(path.name for path in whole.glob("*.safetensors*"))
    assert names and names == sorted(path.name for path in without.glob("*.safetensors*"))
    for name in (*names, "config.json", "processor_config.json"):
        assert (whole / name).read_bytes() == (without / name).read_bytes(), name


def test_a_base_that_is_cached_under_its_first_name_is_found(golden, hub_cache, command_line, tmp_path):
    put_in_cache(hub_cache, "meta-llama/Meta-Llama-3.1-8B-Instruct", BASE_REVISION, golden / "llama-tiny")
    put_in_cache(hub_cache, "EarthSpeciesProject/NatureLM-audio", ADAPTER_REVISION, golden / "naturelm-tiny-published")
    code, _, err = command_line("merge", "--alpha", "0.5", "--out", tmp_path / "half")
    assert code == 0, err
    manifest = json.loads((tmp_path / "half" / "merge.json").read_text())
    assert manifest["base"]["id"] == "meta-llama/Meta-Llama-3.1-8B-Instruct"

    code, _, err = command_line("verify", tmp_path / "half", "--against-sources")
    assert code == 0, err


def test_the_tower_of_the_published_file_is_that_of_the_full_one(golden, published_models):
    published = AudioPrefix.from_pretrained("EarthSpeciesProject/NatureLM-audio").state_dict()
    full = AudioPrefix.from_pretrained(golden / "naturelm-tiny").state_dict()
    assert published.keys() == full.keys()
    assert all(tensor.equal(full[name]) for name, tensor in published.items())
