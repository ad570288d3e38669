"""Loading the tower: strict about every tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_naturelm import make_base, make_naturelm, random_prefix

from mergekit_bio.audio.names import alias_of, is_tower_tensor, merged_name
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.errors import CheckpointError

BIAS = "beats.encoder.layers.0.self_attn.relative_attention_bias.weight"
ALIAS = BIAS.replace("layers.0", "layers.1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_naturelm(tmp_path / "naturelm", prefix=random_prefix())


def change(checkpoint: Path, **tensors: torch.Tensor | None) -> None:
    file = checkpoint / "model.safetensors"
    held = load_file(file) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file)


def test_loads_an_original_checkpoint(checkpoint: Path) -> None:
    prefix = AudioPrefix.from_pretrained(checkpoint)

    expected = random_prefix().state_dict()
    assert not prefix.training
    assert prefix.state_dict().keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in prefix.state_dict().items())


def test_full_and_trained_only_are_the_same_tower(golden: Path) -> None:
    full = AudioPrefix.from_pretrained(golden / "naturelm-tiny").state_dict()
    trained = AudioPrefix.from_pretrained(golden / "naturelm-tiny-trained-only").state_dict()

    assert full.keys() == trained.keys()
    assert all(tensor.equal(trained[name]) for name, tensor in full.items())


def test_half_precision_files_are_computed_in_float32(checkpoint: Path) -> None:
    held = load_file(checkpoint / "model.safetensors")
    change(checkpoint, **{name: t.bfloat16() for name, t in held.items() if t.is_floating_point()})

    assert AudioPrefix.from_pretrained(checkpoint).audio_query_tokens.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ln_audio.weight": None}, "lacks the tensor ln_audio.weight"),
        ({"audio_llama_proj.weight": None}, "lacks the tensor audio_llama_proj.weight"),
        ({"beats.encoder.layer_norm2.weight": torch.ones(1)}, "holds the tensor beats.encoder.layer_norm2.weight"),
        ({"speech_encoder.weight": torch.ones(1)}, "speech_encoder.weight belongs neither"),
        ({"beats.layer_norm.bias": torch.ones(3)}, r"beats.layer_norm.bias has the shape \(3,\)"),
        ({ALIAS: torch.zeros(32, 2)}, "must share"),
    ],
)
def test_names_the_tensor_that_is_wrong(checkpoint: Path, tensors: dict, message: str) -> None:
    change(checkpoint, **tensors)

    with pytest.raises(CheckpointError, match=message) as error:
        AudioPrefix.from_pretrained(checkpoint)
    assert str(checkpoint) in str(error.value)


def test_a_true_copy_of_the_shared_bias_is_accepted(checkpoint: Path) -> None:
    change(checkpoint, **{ALIAS: load_file(checkpoint / "model.safetensors")[BIAS].clone()})

    AudioPrefix.from_pretrained(checkpoint)


def test_a_checkpoint_without_a_tower_is_said_to_have_none(tmp_path: Path) -> None:
    make_base(tmp_path)

    with pytest.raises(CheckpointError, match="has no audio tower"):
        AudioPrefix.from_pretrained(tmp_path)


def test_a_wrong_config_is_named_with_its_file(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["beats_cfg"]["num_buckets"]
    (checkpoint / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"naturelm/config\.json: beats_cfg lacks the key 'num_buckets'"):
        AudioPrefix.from_pretrained(checkpoint)


def test_names() -> None:
    assert is_tower_tensor("audio_query_tokens")
    assert not is_tower_tensor("llama_model.base_model.model.lm_head.weight")
    assert merged_name("ln_audio.bias") == "audio_prefix.ln_audio.bias"
    assert alias_of(ALIAS) == BIAS
    assert alias_of(BIAS) is None
    assert alias_of("beats.encoder.layers.1.fc1.weight") is None
