"""Merges into the reference implementation's tiny Llama give what the reference implementation stored."""

import json
from pathlib import Path

import pytest
import torch
from merging.oracle import neighbours, read_tensors, same_bits
from safetensors.torch import load_file

import mergekit_bio

ALPHAS = (0.0, 0.3, 0.5, 1.0)
FOLDED = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(3) for kind in "qkvo"]
ADAPTERS = ["naturelm-tiny", "naturelm-tiny-trained-only", "peft-adapter-tiny"]


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "vectors.safetensors")


def merge(golden: Path, adapter: str, out: Path, **settings) -> dict[float, Path]:
    checkpoints = mergekit_bio.merge(
        base=golden / "llama-tiny",
        adapter=golden / adapter,
        alphas=ALPHAS,
        out=out,
        device="cpu",
        fsync=False,
        **settings,
    )
    return {alpha: checkpoint.path for alpha, checkpoint in zip(ALPHAS, checkpoints, strict=True)}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nearest_rounding_gives_the_stored_weights_but_where_float32_falls_on_a_tie(golden, vectors, tmp_path, adapter):
    """The reference computed in float32, which cannot tell the nearer of two within its last bit of their middle."""
    paths = merge(golden, adapter, tmp_path / "out", rounding="nearest")
    otherwise = 0
    for alpha, path in paths.items():
        tensors = read_tensors(path)
        for kind in "qkvo":
            stored = vectors[f"merged.layer1.{kind}_proj.alpha{alpha}"].double()
            rounded = tensors[f"model.layers.1.self_attn.{kind}_proj.weight"]
            below, above = neighbours(stored)
            tied = (stored - (below.double() + above.double()) / 2).abs() <= 2**-23 * stored.abs()
            assert ((rounded == stored.to(torch.bfloat16)) | tied & ((rounded == below) | (rounded == above))).all()
            otherwise += int((rounded != stored.to(torch.bfloat16)).sum())
    assert otherwise <= 1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_default_rounding_picks_a_neighbour_without_bias(golden, vectors, tmp_path, adapter):
    for alpha, path in merge(golden, adapter, tmp_path / "out").items():
        tensors = read_tensors(path)
        for kind in "qkvo":
            exact = vectors[f"merged.layer1.{kind}_proj.alpha{alpha}"].double()
            rounded = tensors[f"model.layers.1.self_attn.{kind}_proj.weight"]
            below, above = neighbours(exact)
            assert ((rounded == below) | (rounded == above)).all(), (alpha, kind)
            error = rounded.double() - exact
            # Rounding up with probability (exact - below) / (above - below) has this variance, element by element.
            variance = ((exact - below.double()) * (above.double() - exact)).sum()
            assert error.sum().abs() <= 4 * variance.sqrt(), (alpha, kind)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_tensors_that_no_delta_touches_keep_their_bits(golden, tmp_path, adapter):
    base = read_tensors(golden / "llama-tiny")
    paths = merge(golden, adapter, tmp_path / "out")
    for alpha, path in paths.items():
        tensors = read_tensors(path)
        assert {name for name in tensors if not name.startswith("audio_prefix.")} == set(base)
        kept = set(base) if alpha == 0 else set(base) - set(FOLDED)
        assert [name for name in kept if not same_bits(tensors[name], base[name])] == []
    assert all(not same_bits(read_tensors(paths[1.0])[name], base[name]) for name in FOLDED)


@pytest.mark.parametrize("adapter", ["naturelm-tiny", "naturelm-tiny-trained-only"])
def test_the_audio_tower_is_carried_over_bit_exactly(golden, tmp_path, adapter):
    tower = {
        f"audio_prefix.{name}": tensor
        for name, tensor in load_file(golden / adapter / "model.safetensors").items()
        if not name.startswith("llama_")
    }
    for path in merge(golden, adapter, tmp_path / "out").values():
        carried = {name: tensor for name, tensor in read_tensors(path).items() if name.startswith("audio_prefix.")}
        assert set(carried) == set(tower)
        assert [name for name in tower if not same_bits(carried[name], tower[name])] == []


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_transformers_computes_the_stored_logits(golden, vectors, tmp_path, adapter):
    from transformers import AutoModelForCausalLM

    for alpha, path in merge(golden, adapter, tmp_path / "out", dtype="float32", text_only=True).items():
        assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        for prompt in ("single", "icl3"):
            with torch.no_grad():
                logits = model(inputs_embeds=vectors[f"inputs_embeds.{prompt}"][None]).logits[0, -1]
            stored = vectors[f"logits_last.{prompt}.alpha{alpha}"][: len(logits)]  # without the added [PAD] row
            assert (logits - stored).norm() <= 1e-3 * stored.norm(), (alpha, prompt)
