"""The Q-Former (BLIP-2, Li et al. 2023): learned queries that read a window of encoder tokens."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mergekit_bio.audio.config import QFormerConfig


class QFormer(nn.Module):
    """The query half of a BERT with cross-attention; parameters carry the checkpoint's names.

    A checkpoint may carry positions beside ``LayerNorm`` too, which nothing uses.
    """

    def __init__(self, config: QFormerConfig, *, encoder_size: int) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer(config, encoder_size) for _ in range(config.num_hidden_layers))
        self.bert: Any = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)}),
                "encoder": nn.ModuleDict({"layer": layers}),
            }
        )

    def forward(self, queries: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """``[1, queries, hidden]`` and ``[windows, tokens, encoder hidden]`` -> ``[windows, queries, hidden]``."""
        hidden: torch.Tensor = self.bert["embeddings"]["LayerNorm"](queries).expand(len(windows), -1, -1)
        for layer in self.bert["encoder"]["layer"]:
            hidden = layer(hidden, windows)
        return hidden


class Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the window, feed-forward; each with a post-norm residual."""

    def __init__(self, config: QFormerConfig, encoder_size: int) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, encoder_size)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output_query = ResidualOutput(config, config.intermediate_size)

    def forward(self, hidden: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """``[windows, queries, hidden]`` -> the same shape."""
        hidden = self.attention(hidden, hidden)
        hidden = self.crossattention(hidden, windows)
        return self.output_query(F.gelu(self.intermediate_query["dense"](hidden)), hidden)


class Attention(nn.Module):
    """Multi-head attention of queries to a context, with its residual."""

    def __init__(self, config: QFormerConfig, context_size: int) -> None:
        super().__init__()
        width, self._heads = config.hidden_size, config.num_attention_heads
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context_size, width),
                "value": nn.Linear(context_size, width),
            }
        )
        self.output = ResidualOutput(config, width)

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """``[windows, queries, hidden]`` and ``[windows, tokens, context]`` -> the shape of ``hidden``."""
        query, key, value = (
            self.self[name](source).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for name, source in (("query", hidden), ("key", context), ("value", context))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.output(attended.transpose(1, 2).flatten(2), hidden)


class ResidualOutput(nn.Module):
    """``LayerNorm(dense(x) + residual)``."""

    def __init__(self, config: QFormerConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``[..., input]`` and ``[..., hidden]`` -> ``[..., hidden]``."""
        return self.LayerNorm(self.dense(hidden) + residual)
