"""The audio prefix: from a waveform to the embeddings that stand for it in Llama's prompt."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn

from mergekit_bio.audio.beats import Beats
from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.device import full_float32
from mergekit_bio.audio.fbank import fbank
from mergekit_bio.audio.qformer import QFormer
from mergekit_bio.audio.tower import refuse_newer_layout, tower_config, tower_tensors
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.source import resolve


class AudioPrefix(nn.Module):
    """NatureLM-audio's ears (Robinson et al. 2024): BEATs, a window-level Q-Former and a projection to Llama's width.

    Its ``state_dict`` names are the original checkpoint's, which a merged directory holds behind ``audio_prefix.``.
    """

    def __init__(self, config: AudioPrefixConfig) -> None:
        super().__init__()
        self.config = config
        self.beats = Beats(config.beats)
        self.ln_audio = nn.LayerNorm(config.beats.hidden_size, eps=config.beats.layer_norm_eps)
        self.audio_query_tokens = nn.Parameter(torch.zeros(1, config.qformer.num_queries, config.qformer.hidden_size))
        self.audio_Qformer = QFormer(config.qformer, encoder_size=config.beats.hidden_size)
        self.audio_llama_proj = nn.Linear(config.qformer.hidden_size, config.hidden_size)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Load the tower of a checkpoint.

        Args:
            source: A directory or hub id (``@revision`` allowed): a merged directory, or an original NatureLM-audio
                checkpoint.

        Returns:
            The tower in eval mode, in float32, whatever the file holds.

        Raises:
            MergekitBioError: The checkpoint is not there, has no tower, or its tensors are not exactly those that its
                configuration asks for.
        """
        resolved = resolve(source)
        refuse_newer_layout(resolved)
        checkpoint = Checkpoint.open(resolved.path)
        config = tower_config(checkpoint)
        with torch.device("meta"):
            prefix = cls(config)
        tensors = tower_tensors(checkpoint, config)
        prefix.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return prefix.eval()

    @full_float32()
    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """Embed clips. Zeros at the end of a short one are heard as silence, as NatureLM-audio does.

        Args:
            waveform: ``[batch, samples]`` at 16 kHz, any floating point type; see
                :func:`mergekit_bio.audio.waveform.prepare`. float64 keeps the quietest mel bins exact.

        Returns:
            ``[batch, n_prefix, hidden]`` in the parameters' type; 29 prefix tokens for 10 s.

        Raises:
            ValueError: The waveform is too short for one window.
        """
        return self.project(self.encode(self.features(waveform)))

    @full_float32()
    def embed(self, features: Sequence[torch.Tensor], *, at_most: int | None = None) -> list[torch.Tensor]:
        """Embed clips of any lengths; those of one length go through the tower together.

        Args:
            features: The filter bank ``[frames, 128]`` of each clip.
            at_most: Clips that go together, which bounds the memory; by default all of one length.

        Returns:
            ``[n_prefix, hidden]`` for each clip, in their order.
        """
        prefixes: dict[int, torch.Tensor] = {}
        for together in equally_long(features, at_most=at_most or len(features)):
            encoded = self.encode(torch.stack([features[n] for n in together]))
            prefixes |= zip(together, self.project(encoded).unbind(), strict=True)
        return [prefixes[n] for n in range(len(features))]

    @staticmethod
    def features(waveform: torch.Tensor) -> torch.Tensor:
        """Filter banks float32 ``[batch, frames, 128]`` of ``[batch, samples]``, on the waveform's device."""
        if waveform.device.type == "mps":  # Apple's GPUs have no float64
            return fbank(waveform.cpu()).to(waveform.device)
        return fbank(waveform)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """BEATs alone: filter banks ``[batch, frames, 128]`` to ``[batch, tokens, encoder hidden]``."""
        encoded: torch.Tensor = self.beats(features.to(self.audio_query_tokens.dtype))
        return encoded

    def project(self, encoded: torch.Tensor) -> torch.Tensor:
        """From BEATs' ``[batch, tokens, encoder hidden]`` to the prefix ``[batch, n_prefix, hidden]``."""
        window, stride = self.config.window, self.config.stride
        if encoded.shape[1] < window:
            raise ValueError(f"the waveform gives {encoded.shape[1]} tokens; one window needs {window}")
        windows = self.ln_audio(encoded).unfold(1, window, stride).transpose(2, 3)
        queries = self.audio_Qformer(self.audio_query_tokens, windows.flatten(0, 1))
        return self.audio_llama_proj(queries.unflatten(0, windows.shape[:2]).flatten(1, 2))


def equally_long(tensors: Sequence[torch.Tensor], *, at_most: int) -> Iterator[list[int]]:
    """Indices of tensors in batches of one length, so that each batch can be stacked.

    A clip is never padded to the length of its neighbours: the tower would hear the padding as silence. The tensors are
    equal in all but their first axis; a batch has ``at_most`` of them.
    """
    by_length: dict[int, list[int]] = {}
    for n, tensor in enumerate(tensors):
        by_length.setdefault(len(tensor), []).append(n)
    for same in by_length.values():
        for start in range(0, len(same), at_most):
            yield same[start : start + at_most]
