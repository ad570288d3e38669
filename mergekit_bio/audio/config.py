"""The audio tower's hyper-parameters, all of them explicit, read strictly."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

from mergekit_bio.errors import CheckpointError
from mergekit_bio.outside_data import nearest

#: Samples a second that the tower is made for, and mel bins of the filter bank it reads (BEATs, Chen et al. 2022).
SAMPLING_RATE = 16_000
MEL_BINS = 128

#: 25 ms frames every 10 ms, at 16 kHz.
FRAME_LENGTH = 400
FRAME_SHIFT = 160

#: What earthspecies/NatureLM-audio takes from "bert-base-uncased" in code and so never writes to config.json.
_BERT_BASE = {"num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-12}
_QFORMER_LAYERS = 2
_BERT_POSITIONS = 512

#: SALMONN counts windows in Whisper's frames, 1500 in 30 s; NatureLM-audio applies the count to BEATs' tokens.
_WHISPER_FRAMES_IN_30_S = 1500

#: Settings with one supported value: another one would be another network.
_FIXED_BEATS = {
    "activation_fn": "gelu",
    "conv_bias": False,
    "deep_norm": True,
    "gru_rel_pos": True,
    "layer_norm_first": False,
    "relative_position_embedding": True,
}
_FIXED_NATURELM = {"max_pooling": False, "use_audio_Qformer": True, "window_level_Qformer": True}

#: Settings of training only.
_UNUSED_BEATS = {
    "activation_dropout",
    "attention_dropout",
    "dropout",
    "dropout_input",
    "encoder_layerdrop",
    "layer_wise_gradient_decay_ratio",
    "predictor_dropout",
}

#: Our name -> BEATs' name.
_BEATS_NAMES = {
    "patch_size": "input_patch_size",
    "patch_dim": "embed_dim",
    "hidden_size": "encoder_embed_dim",
    "intermediate_size": "encoder_ffn_embed_dim",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "conv_kernel": "conv_pos",
    "conv_groups": "conv_pos_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
    "num_labels": "predictor_class",
}


class _Strict:
    """A frozen dataclass of numbers and such dataclasses that is read from JSON without tolerance."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "audio_config") -> Self:
        """Read what :meth:`to_dict` wrote; an error says ``where`` it stands.

        Raises:
            CheckpointError: A key is missing or unknown, or a value is of the wrong type or makes no sense.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must be an object, not {values!r}")
        fields = {field.name: field.type for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        _refuse_unknown(values, fields, where)
        return cls(**{name: _value(values, name, kind, where) for name, kind in fields.items()})

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-serialisable values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class BeatsConfig(_Strict):
    """BEATs (Chen et al. 2022): a post-norm transformer over 16 x 16 patches of the mel filter bank.

    Attributes:
        patch_size: Side of a patch, in frames and in mel bins.
        patch_dim: Width of a patch's embedding.
        hidden_size: Width of the encoder; ``intermediate_size`` that of its feed-forward layers.
        num_hidden_layers: Encoder layers; they also set the residual scale ``(2 * layers) ** 0.25`` (deep norm).
        conv_kernel: Taps of the convolutional position embedding; ``conv_groups`` its groups.
        num_buckets: Rows of the relative position embedding.
        max_distance: Offset, in tokens, from which on the last bucket is used.
        num_labels: Classes of the classifier that a fine-tuned BEATs carries and nothing here uses; 0 without one.
        layer_norm_eps: Epsilon of every layer norm in and right after BEATs.
    """

    patch_size: int
    patch_dim: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    conv_kernel: int
    conv_groups: int
    num_buckets: int
    max_distance: int
    num_labels: int
    layer_norm_eps: float

    def __post_init__(self) -> None:
        _require_positive(self, "beats", optional=("num_labels",))
        _require_divisible("beats.hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _require_divisible("beats.hidden_size", self.hidden_size, "conv_groups", self.conv_groups)
        _require_divisible("beats.num_buckets", self.num_buckets, "4 (two directions, near and far)", 4)
        _require_divisible("mel bins", MEL_BINS, "beats.patch_size", self.patch_size)
        if self.max_distance <= self.num_buckets // 4:
            raise CheckpointError(
                f"beats.max_distance {self.max_distance} must be above num_buckets / 4 = {self.num_buckets // 4}"
            )

    def num_tokens(self, samples: int) -> int:
        """Encoder tokens of a waveform of ``samples`` samples: whole patches of whole frames, time-major."""
        frames = max(0, 1 + (samples - FRAME_LENGTH) // FRAME_SHIFT)
        return frames // self.patch_size * (MEL_BINS // self.patch_size)


@dataclass(frozen=True)
class QFormerConfig(_Strict):
    """The window-level Q-Former (BLIP-2, Li et al. 2023; SALMONN, Tang et al. 2024).

    Attributes:
        hidden_size: Width of the queries; ``intermediate_size`` that of their feed-forward layers.
        num_hidden_layers: Layers; each has self-attention, cross-attention and a feed-forward layer.
        num_queries: Prefix tokens a window.
        num_positions: Length of the position buffer that the checkpoint carries and nothing uses.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_queries: int
    num_positions: int
    layer_norm_eps: float

    def __post_init__(self) -> None:
        _require_positive(self, "qformer")
        _require_divisible("qformer.hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)


@dataclass(frozen=True)
class AudioPrefixConfig(_Strict):
    """The whole tower, from samples to the embeddings that Llama reads.

    Attributes:
        qformer: What turns a window of encoder tokens into prefix tokens.
        window: Encoder tokens a window.
        stride: Encoder tokens from one window to the next.
        hidden_size: Llama's width, to which the prefix is projected.
        sampling_rate: Samples a second, 16000.
        clip_samples: Samples that a clip is cut or padded to where nobody says otherwise: 10 s.
    """

    beats: BeatsConfig
    qformer: QFormerConfig
    window: int
    stride: int
    hidden_size: int
    sampling_rate: int
    clip_samples: int

    def __post_init__(self) -> None:
        _require_positive(self, "audio_config")
        if self.sampling_rate != SAMPLING_RATE:
            raise CheckpointError(f"audio_config.sampling_rate is {self.sampling_rate}; only {SAMPLING_RATE} works")
        if not self.prefix_length(self.clip_samples):
            raise CheckpointError(f"audio_config.clip_samples {self.clip_samples} is shorter than one window")

    @classmethod
    def from_naturelm(cls, config: dict[str, Any], *, hidden_size: int) -> Self:
        """Read an original NatureLM-audio ``config.json``, for a Llama of width ``hidden_size``.

        Keys about Llama, LoRA, training and generation are none of the tower's business and are passed over.
        The Q-Former is as wide as BEATs; its heads, feed-forward width and epsilon are bert-base's unless
        ``audio_qformer_cfg`` gives them (NatureLM-audio hard-codes them).

        Raises:
            CheckpointError: A key that the tower needs is missing, unknown, of the wrong type or unsupported.
        """
        # 1. What is another network, or nothing that we know, is refused.
        where = "config.json: beats_cfg"
        beats = _value(config, "beats_cfg", dict, "config.json")
        _refuse_unknown(beats, {*_BEATS_NAMES.values(), *_FIXED_BEATS, *_UNUSED_BEATS, "finetuned_model"}, where)
        _require_fixed(beats, _FIXED_BEATS, where)
        _require_fixed(config, _FIXED_NATURELM, "config.json")
        bert = _value({"audio_qformer_cfg": {}} | config, "audio_qformer_cfg", dict, "config.json")
        _refuse_unknown(bert, _BERT_BASE, "config.json: audio_qformer_cfg")

        # 2. Our names, and what NatureLM-audio's code knows and its config.json does not say.
        sizes = {ours: _value(beats, theirs, int, where) for ours, theirs in _BEATS_NAMES.items()}
        if not _value(beats, "finetuned_model", bool, where):
            sizes["num_labels"] = 0
        qformer = {
            "hidden_size": sizes["hidden_size"],
            "num_hidden_layers": _QFORMER_LAYERS,
            "num_queries": _value(config, "num_audio_query_token", int, "config.json"),
            "num_positions": _BERT_POSITIONS,
        }
        return cls.from_dict(
            {
                "beats": sizes | {"layer_norm_eps": 1e-5},
                "qformer": _BERT_BASE | bert | qformer,
                "window": _tokens(config, "second_per_window"),
                "stride": _tokens(config, "second_stride"),
                "hidden_size": hidden_size,
                "sampling_rate": SAMPLING_RATE,
                "clip_samples": 10 * SAMPLING_RATE,
            },
            where="config.json",
        )

    def num_windows(self, samples: int) -> int:
        """Whole windows in a waveform of ``samples`` samples; 0 where it is too short for one."""
        return max(0, 1 + (self.beats.num_tokens(samples) - self.window) // self.stride)

    def prefix_length(self, samples: int) -> int:
        """Prefix tokens of a waveform of ``samples`` samples: 29 for 10 s in the real model."""
        return self.num_windows(samples) * self.qformer.num_queries


def _value(values: dict[str, Any], key: str, kind: Any, where: str) -> Any:
    if key not in values:
        raise CheckpointError(f"{where} lacks the key {key!r}")
    value = values[key]
    if issubclass(kind, _Strict):
        return kind.from_dict(value, where=f"{where}.{key}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: True is an int
        raise CheckpointError(f"{where}.{key} must be of type {kind.__name__}, not {value!r}")
    return value


def _refuse_unknown(values: dict[str, Any], known: Collection[str], where: str) -> None:
    if unknown := sorted(values.keys() - set(known)):
        raise CheckpointError(f"{where} has the unknown key {unknown[0]!r}{nearest(unknown[0], sorted(known))}")


def _tokens(config: dict[str, Any], key: str) -> int:
    seconds = _value(config, key, float, "config.json")
    if not 0 < seconds < math.inf:
        raise CheckpointError(f"config.json.{key} must be above 0 seconds, not {seconds}")
    return round(_WHISPER_FRAMES_IN_30_S * seconds / 30)


def _require_fixed(values: dict[str, Any], fixed: dict[str, Any], where: str) -> None:
    for key, supported in fixed.items():
        if _value(values, key, type(supported), where) != supported:
            raise CheckpointError(f"{where}.{key} is {values[key]!r}; only {supported!r} is supported")


def _require_positive(config: _Strict, where: str, optional: Collection[str] = ()) -> None:
    for name, value in vars(config).items():
        if isinstance(value, int | float) and not (0 < value < math.inf or (name in optional and value == 0)):
            raise CheckpointError(f"{where}.{name} must be above 0, not {value}")


def _require_divisible(what: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise CheckpointError(f"{what} {value} is not divisible by {by} {divisor}")
