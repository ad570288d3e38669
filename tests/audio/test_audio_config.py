import json
from pathlib import Path

import pytest
from tiny_naturelm import NATURELM, audio_config

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.errors import CheckpointError


def without(config: dict, *path: str) -> dict:
    copy = json.loads(json.dumps(config))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


def with_beats(**changes: object) -> dict:
    return NATURELM | {"beats_cfg": NATURELM["beats_cfg"] | changes}


def test_round_trips_through_json() -> None:
    config = audio_config()

    assert AudioPrefixConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_qformer_is_bert_base_unless_the_config_says_otherwise() -> None:
    config = with_beats(encoder_embed_dim=48, encoder_attention_heads=4)

    qformer = AudioPrefixConfig.from_naturelm(without(config, "audio_qformer_cfg"), hidden_size=64).qformer
    assert (qformer.num_attention_heads, qformer.intermediate_size, qformer.layer_norm_eps) == (12, 3072, 1e-12)

    changed = config | {"audio_qformer_cfg": {"num_attention_heads": 3}}
    qformer = AudioPrefixConfig.from_naturelm(changed, hidden_size=64).qformer
    assert (qformer.num_attention_heads, qformer.intermediate_size) == (3, 3072)


def test_prefix_lengths_are_the_references() -> None:
    config = audio_config()

    assert config.window == config.stride == 17
    lengths = {seconds: config.prefix_length(seconds * 16_000) for seconds in (1, 3, 5, 10, 20, 30)}
    assert lengths == {1: 2, 3: 8, 5: 14, 10: 29, 20: 58, 30: 88}
    assert config.prefix_length(0) == config.prefix_length(4000) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (without(NATURELM, "beats_cfg"), "'beats_cfg'"),
        (without(NATURELM, "beats_cfg", "num_buckets"), "beats_cfg lacks the key 'num_buckets'"),
        (without(NATURELM, "second_per_window"), "'second_per_window'"),
        (with_beats(dropuot=0.1), "unknown key 'dropuot'"),
        (with_beats(encoder_layers="12"), "encoder_layers must be of type int, not '12'"),
        (with_beats(encoder_layers=True), "must be of type int"),
        (with_beats(deep_norm=False), "deep_norm is False; only True"),
        (with_beats(activation_fn="relu"), "activation_fn is 'relu'"),
        (with_beats(encoder_attention_heads=5), "not divisible"),
        (with_beats(num_buckets=0), "num_buckets must be above 0"),
        (with_beats(max_distance=8), "max_distance"),
        (NATURELM | {"window_level_Qformer": False}, "window_level_Qformer"),
        (NATURELM | {"second_per_window": float("nan")}, "second_per_window"),
        (NATURELM | {"second_stride": 0}, "second_stride"),
        (NATURELM | {"num_audio_query_token": 0}, "num_queries must be above 0"),
        (NATURELM | {"audio_qformer_cfg": {"heads": 4}}, "unknown key 'heads'"),
        (NATURELM | {"audio_qformer_cfg": None}, "audio_qformer_cfg"),
    ],
)
def test_names_what_is_wrong_in_an_original_config(config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match="(?s)" + message.replace("(", r"\(")) as error:
        AudioPrefixConfig.from_naturelm(config, hidden_size=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": "17"}, "window must be of type int"),
        ({"windows": 17}, "unknown key 'windows'"),
        ({"beats": None}, "beats must be an object"),
        ({"sampling_rate": 32_000}, "only 16000 works"),
        ({"clip_samples": 100}, "shorter than one window"),
    ],
)
def test_names_what_is_wrong_in_our_own(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        AudioPrefixConfig.from_dict(audio_config().to_dict() | change)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: audio_config\.qformer lacks the key 'num_queries'"):
        AudioPrefixConfig.from_dict(
            without(audio_config().to_dict(), "qformer", "num_queries"), where="config.json: audio_config"
        )


def test_the_real_configuration_is_read(golden: Path) -> None:
    real = json.loads((golden / "manifest" / "config_json_example.json").read_text())

    config = AudioPrefixConfig.from_naturelm(real, hidden_size=4096)

    assert config.prefix_length(160_000) == 29
    assert (config.beats.hidden_size, config.beats.num_hidden_layers, config.qformer.num_attention_heads) == (
        768,
        12,
        12,
    )
