"""The tower, stage by stage, against the reference's own tensors and against what it must do by definition."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_naturelm import HIDDEN, audio_config, random_prefix
from torch import nn
from transformers import audio_utils

from mergekit_bio.audio.beats import GatedAttention, relative_buckets
from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.fbank import fbank
from mergekit_bio.audio.names import is_tower_tensor
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.tower import needed_shapes, unused_shapes


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "vectors.safetensors")


@pytest.fixture(scope="module")
def prefix(golden: Path) -> AudioPrefix:
    return AudioPrefix.from_pretrained(golden / "naturelm-tiny")


@pytest.fixture(scope="module")
def stages(prefix: AudioPrefix, vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every named stage gives for the stored filter bank."""
    encoder, qformer = prefix.beats.encoder, prefix.audio_Qformer
    modules: dict[str, nn.Module] = {
        "patch_embed": prefix.beats.patch_embedding,
        "patch_ln": prefix.beats.layer_norm,
        "post_extract_proj": prefix.beats.post_extract_proj,
        "pos_conv_out": encoder.pos_conv,
        "encoder_in": encoder.layer_norm,
        "layer0_attn_out": encoder.layers[0].self_attn,
        "encoder_layer0_out": encoder.layers[0],
        "encoder_out": encoder,
        "ln_audio_out": prefix.ln_audio,
        "qformer_layer0_out": qformer.bert.encoder.layer[0],
        "qformer_out": qformer,
        "prefix": prefix.audio_llama_proj,
    }
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.__setitem__(name, out))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        prefix.project(prefix.encode(vectors["fbank"]))
    for handle in handles:
        handle.remove()
    seen["patch_embed"] = seen["patch_embed"].flatten(2).transpose(1, 2)
    seen["pos_conv_out"] = nn.functional.gelu(seen["pos_conv_out"])
    return seen


@pytest.mark.parametrize(
    "stage",
    [
        "patch_embed",
        "patch_ln",
        "post_extract_proj",
        "pos_conv_out",
        "encoder_in",
        "layer0_attn_out",
        "encoder_layer0_out",
        "encoder_out",
        "ln_audio_out",
        "qformer_layer0_out",
        "qformer_out",
        "prefix",
    ],
)
def test_every_stage_is_the_references(
    stages: dict[str, torch.Tensor], vectors: dict[str, torch.Tensor], stage: str
) -> None:
    assert (stages[stage].reshape(vectors[stage].shape) - vectors[stage]).abs().max() < 2e-5


def test_position_bias_is_the_references(prefix: AudioPrefix, vectors: dict[str, torch.Tensor]) -> None:
    bias = prefix.beats.encoder.position_bias(496)

    offsets = torch.arange(496)[None] - torch.arange(496)[:, None]
    assert bias.equal(vectors["rel_pos_bias_by_offset"][:, offsets + 495])


def test_filter_bank_is_the_references(vectors: dict[str, torch.Tensor]) -> None:
    assert (fbank(vectors["raw_wav"]) - vectors["fbank_f64"]).abs().max() < 2e-5


@pytest.mark.parametrize("level", [1e-4, 0.3, 1])
def test_filter_bank_is_kaldis(level: float) -> None:
    """As Transformers computes it, in float64 and frame by frame."""
    waveform = clips(1, seconds=2) * 10 * level

    expected = audio_utils.spectrogram(
        waveform[0].double().numpy() * 2**15,
        audio_utils.window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=audio_utils.mel_filter_bank(
            num_frequency_bins=257,
            num_mel_filters=128,
            min_frequency=20,
            max_frequency=8000,
            sampling_rate=16_000,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        ),
        log_mel="log",
        mel_floor=torch.finfo(torch.float32).eps,
    )
    assert (fbank(waveform)[0] - (torch.from_numpy(expected.T) - 15.41663) / 13.11164).abs().max() < 2e-5


def test_from_waveform_to_prefix(prefix: AudioPrefix, vectors: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        assert (prefix(vectors["raw_wav"]) - vectors["prefix_f64in"]).abs().max() < 1e-5


def test_bf16_stays_near_the_references_autocast(golden: Path, vectors: dict[str, torch.Tensor]) -> None:
    prefix = AudioPrefix.from_pretrained(golden / "naturelm-tiny").to(torch.bfloat16)

    with torch.inference_mode():
        embedded = prefix(vectors["raw_wav"].double())

    assert embedded.dtype == torch.bfloat16
    # The reference itself moves by 0.02 between processors.
    assert (embedded.float() - vectors["autocast_f64in_prefix"]).abs().max() < 0.05


def test_real_buckets_for_every_offset(golden: Path) -> None:
    table = json.loads((golden / "manifest" / "rel_pos_buckets_real.json").read_text())
    low, high = table["offsets"]

    buckets = relative_buckets(
        torch.arange(low, high + 1), num_buckets=table["num_buckets"], max_distance=table["max_distance"]
    )

    assert buckets.tolist() == table["buckets"]


def test_the_real_checkpoints_tensors_are_the_full_size_models(golden: Path) -> None:
    manifest = json.loads((golden / "manifest" / "naturelm_audio_keys.json").read_text())["keys"]
    real = json.loads((golden / "manifest" / "config_json_example.json").read_text())
    config = AudioPrefixConfig.from_naturelm(real, hidden_size=4096)
    with torch.device("meta"):
        model = AudioPrefix(config)

    published = {
        name: (entry["shape"], entry["dtype"])
        for name, entry in manifest.items()
        if entry["in_file"] and is_tower_tensor(name)
    }
    unused = {name: (list(shape), published[name][1]) for name, shape in unused_shapes(config).items()}
    assert {name: (list(t.shape), "F32") for name, t in model.state_dict().items()} | unused == published
    assert {name: list(shape) for name, shape in needed_shapes(config).items()} == {
        name: list(t.shape) for name, t in model.state_dict().items()
    }
    rest = {name for name, entry in manifest.items() if not is_tower_tensor(name)}
    assert all(name.startswith(("llama_model.", "llama_embed_tokens.")) for name in rest)


def clips(count: int = 3, seconds: float = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, round(seconds * 16_000), generator=torch.Generator().manual_seed(seed)) * 0.1


@torch.no_grad()
def test_a_clips_prefix_does_not_depend_on_its_neighbours() -> None:
    prefix = random_prefix()
    batch = clips(3)
    louder = torch.cat((batch[:1], batch[1:] * 50))

    assert prefix(batch)[0].equal(prefix(louder)[0])
    alone = torch.cat([prefix(clip[None]) for clip in batch])
    assert (prefix(batch) - alone).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("seconds", "tokens"), [(1, 2), (3, 8), (5, 14), (10, 29), (20, 58)])
def test_prefix_length_goes_with_the_waveforms(seconds: int, tokens: int) -> None:
    prefix = random_prefix()

    assert prefix(clips(1, seconds)).shape == (1, tokens, HIDDEN)
    assert prefix.config.prefix_length(seconds * 16_000) == tokens


@torch.no_grad()
def test_refuses_what_is_shorter_than_a_window() -> None:
    prefix = random_prefix()

    with pytest.raises(ValueError, match="one window needs 17"):
        prefix(clips(1, 0.3))


@torch.no_grad()
def test_position_bias_is_kept_and_follows_its_embedding() -> None:
    prefix = random_prefix()
    encoder = prefix.beats.encoder

    first = encoder.position_bias(40)
    assert encoder.position_bias(40) is first
    encoder.layers[0].self_attn.relative_attention_bias.weight.add_(1)
    assert (encoder.position_bias(40) - first - 1).abs().max() < 1e-5
    assert encoder.position_bias(24).shape == (2, 24, 24)
    assert prefix.bfloat16().beats.encoder.position_bias(40).dtype == torch.bfloat16


def test_with_gradients_the_numbers_are_the_same_and_every_used_parameter_gets_one() -> None:
    prefix = random_prefix()
    with torch.no_grad():
        expected = prefix(clips(2))

    embedded = prefix(clips(2))
    embedded.square().sum().backward()

    assert (embedded - expected).abs().max() < 1e-6
    # One query attends only to itself, so its query and key projections cannot matter.
    unused = (".attention.self.query", ".attention.self.key")
    for name, parameter in prefix.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) or any(part in name for part in unused), name


@torch.no_grad()
def test_attention_is_the_gated_softmax_written_out() -> None:
    """NATURELM's gate and bias in float64, one query at a time."""
    config = audio_config().beats
    torch.manual_seed(3)
    attention = GatedAttention(config, has_bias=False).double()
    attention.grep_a.copy_(torch.randn(1, 2, 1, 1))
    hidden, bias = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)

    expected = torch.empty(2, 5, 32, dtype=torch.float64)
    for clip in range(2):
        for head in range(2):
            part = slice(16 * head, 16 * head + 16)
            query, key, value = (
                (hidden[clip] @ p.weight.T + p.bias)[:, part]
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            for position in range(5):
                eight = attention.grep_linear.weight @ query[position] + attention.grep_linear.bias
                a, b = torch.sigmoid(eight[:4].sum()), torch.sigmoid(eight[4:].sum())
                gate = a * (b * attention.grep_a[0, head, 0, 0] - 1) + 2
                logits = key @ query[position] / math.sqrt(16) + gate * bias[head, position]
                expected[clip, position, part] = torch.softmax(logits, 0) @ value
    expected = expected @ attention.out_proj.weight.T + attention.out_proj.bias

    assert (attention(hidden, bias, None) - expected).abs().max() < 1e-12


COMPILED = """
import torch
from tiny_naturelm import random_prefix
prefix = random_prefix()
features = prefix.features(torch.randn(2, 160_000, generator=torch.Generator().manual_seed(0)) * 0.1)
with torch.no_grad():
    compiled = torch.compile(lambda x: prefix.project(prefix.encode(x)), fullgraph=True)
    print(float((compiled(features) - prefix.project(prefix.encode(features))).abs().max()))
"""


@pytest.mark.long
def test_compiles() -> None:
    """In a process of its own: in the tests' the compiler is off, for vLLM's sake."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "eval")
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-5
