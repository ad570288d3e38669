"""NatureLM-audio's tower once more, written out plainly in float64: one clip, one head, one window at a time.

It shares no code with the package: from the papers' equations (BEATs, Chen et al. 2022; WavLM's gate, Chen et al.
2022; T5's buckets, Raffel et al. 2020; BLIP-2's Q-Former, Li et al. 2023) and the tensors of a checkpoint.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import audio_utils

WINDOW = 17  # encoder tokens, and as many from one window to the next


class EagerTower:
    """The tower of a NatureLM-audio checkpoint in one file."""

    def __init__(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        self.beats, self.qformer = config["beats_cfg"], config["audio_qformer_cfg"]
        tensors = load_file(checkpoint / "model.safetensors")
        self.tensors = {name: tensor.double() for name, tensor in tensors.items() if not name.startswith("llama")}

    def __call__(self, waveform: np.ndarray) -> torch.Tensor:
        """Float64 ``[samples]`` at 16 kHz -> the prefix, float64 ``[n_prefix, hidden]``."""
        tokens = self._norm("ln_audio", self._encode(self._patches(waveform)), 1e-5)
        starts = range(0, len(tokens) - WINDOW + 1, WINDOW)
        return torch.stack([self._linear("audio_llama_proj", self._query(tokens[n : n + WINDOW]))[0] for n in starts])

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def _norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    @staticmethod
    def _gelu(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def _patches(self, waveform: np.ndarray) -> torch.Tensor:
        """Kaldi's filter bank as Transformers computes it, cut into squares of 16 frames by 16 mel bins."""
        spectrum = audio_utils.spectrogram(
            waveform * 2**15,
            audio_utils.window_function(400, "povey", periodic=False),
            frame_length=400,
            hop_length=160,
            fft_length=512,
            power=2.0,
            center=False,
            preemphasis=0.97,
            remove_dc_offset=True,
            mel_filters=audio_utils.mel_filter_bank(257, 128, 20, 8000, 16_000, None, "kaldi", True),
            log_mel="log",
            mel_floor=1.1920929e-07,
        )
        bank = (torch.from_numpy(spectrum.T) - 15.41663) / (2 * 6.55582)
        kernel = self.tensors["beats.patch_embedding.weight"].flatten(1)
        squares = [
            bank[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].flatten()
            for row in range(len(bank) // 16)
            for column in range(8)
        ]
        patches = self._norm("beats.layer_norm", torch.stack(squares).double() @ kernel.T, 1e-5)
        return self._linear("beats.post_extract_proj", patches)

    def _encode(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self._norm("beats.encoder.layer_norm", hidden + self._gelu(self._convolved(hidden)), 1e-5)
        scale = (2 * self.beats["encoder_layers"]) ** 0.25
        for n in range(self.beats["encoder_layers"]):
            layer = f"beats.encoder.layers.{n}"
            attended = self._attend(f"{layer}.self_attn", hidden)
            hidden = self._norm(f"{layer}.self_attn_layer_norm", scale * hidden + attended, 1e-5)
            forwarded = self._linear(f"{layer}.fc2", self._gelu(self._linear(f"{layer}.fc1", hidden)))
            hidden = self._norm(f"{layer}.final_layer_norm", scale * hidden + forwarded, 1e-5)
        return hidden

    def _convolved(self, hidden: torch.Tensor) -> torch.Tensor:
        name = "beats.encoder.pos_conv.0"
        direction, length = self.tensors[f"{name}.weight_v"], self.tensors[f"{name}.weight_g"][0, 0]
        groups, taps = self.beats["conv_pos_groups"], self.beats["conv_pos"]
        weight = torch.stack(
            [direction[:, :, k] * length[k] / direction[:, :, k].square().sum().sqrt() for k in range(taps)], dim=2
        )
        width = hidden.shape[1] // groups
        padded = torch.cat((torch.zeros(taps // 2, hidden.shape[1]), hidden, torch.zeros(taps // 2, hidden.shape[1])))
        out = self.tensors[f"{name}.bias"].repeat(len(hidden), 1)
        for group in range(groups):
            part = slice(group * width, group * width + width)
            for k in range(taps):
                out[:, part] += padded[k : k + len(hidden), part] @ weight[part, :, k].T
        return out

    def _attend(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.beats["encoder_attention_heads"]
        width = hidden.shape[1] // heads
        query, key, value = (self._linear(f"{name}.{kind}_proj", hidden) for kind in "qkv")
        biases = self.tensors["beats.encoder.layers.0.self_attn.relative_attention_bias.weight"][
            self._buckets(len(hidden))
        ]
        heard = []
        for head in range(heads):
            part = slice(head * width, head * width + width)
            eight = self._linear(f"{name}.grep_linear", query[:, part])
            a, b = torch.sigmoid(eight[:, :4].sum(1)), torch.sigmoid(eight[:, 4:].sum(1))
            gate = a * (b * self.tensors[f"{name}.grep_a"][0, head, 0, 0] - 1) + 2
            logits = query[:, part] @ key[:, part].T / math.sqrt(width) + gate[:, None] * biases[..., head]
            heard.append(torch.softmax(logits, 1) @ value[:, part])
        return self._linear(f"{name}.out_proj", torch.cat(heard, 1))

    def _buckets(self, length: int) -> torch.Tensor:
        """int64 ``[query, key]``: near offsets one by one, far ones by their logarithm, one half a direction."""
        half = self.beats["num_buckets"] // 2
        near = half // 2

        def bucket(offset: int) -> int:
            distance, back = abs(offset), half if offset > 0 else 0
            if distance < near:
                return distance + back
            share = math.log(distance / near) / math.log(self.beats["max_distance"] / near)
            return min(near + int(share * (half - near)), half - 1) + back

        by_offset = torch.tensor([bucket(offset) for offset in range(1 - length, length)])
        return by_offset[torch.arange(length)[None] - torch.arange(length)[:, None] + length - 1]

    def _query(self, window: torch.Tensor) -> torch.Tensor:
        bert = "audio_Qformer.bert"
        hidden = self._norm(f"{bert}.embeddings.LayerNorm", self.tensors["audio_query_tokens"][0], 1e-12)
        for n in range(2):
            layer = f"{bert}.encoder.layer.{n}"
            hidden = self._read(f"{layer}.attention", hidden, hidden)
            hidden = self._read(f"{layer}.crossattention", hidden, window)
            inner = self._gelu(self._linear(f"{layer}.intermediate_query.dense", hidden))
            out = self._linear(f"{layer}.output_query.dense", inner) + hidden
            hidden = self._norm(f"{layer}.output_query.LayerNorm", out, 1e-12)
        return hidden

    def _read(self, name: str, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        heads = self.qformer["num_attention_heads"]
        width = hidden.shape[1] // heads
        query = self._linear(f"{name}.self.query", hidden)
        key, value = (self._linear(f"{name}.self.{kind}", context) for kind in ("key", "value"))
        heard = []
        for head in range(heads):
            part = slice(head * width, head * width + width)
            weights = torch.softmax(query[:, part] @ key[:, part].T / math.sqrt(width), 1)
            heard.append(weights @ value[:, part])
        out = self._linear(f"{name}.output.dense", torch.cat(heard, 1)) + hidden
        return self._norm(f"{name}.output.LayerNorm", out, 1e-12)
