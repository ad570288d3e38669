"""BEATs (Chen et al. 2022, "BEATs: Audio Pre-Training with Acoustic Tokenizers"), written for inference."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from mergekit_bio.audio.config import BeatsConfig


class Beats(nn.Module):
    """Patches of the filter bank through a post-norm transformer; parameters carry the checkpoint's names.

    A checkpoint may carry the classifier of the fine-tuned BEATs too, which nothing uses.
    """

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(1, config.patch_dim, kernel_size=size, stride=size, bias=False)
        self.layer_norm = nn.LayerNorm(config.patch_dim, eps=config.layer_norm_eps)
        self.post_extract_proj = nn.Linear(config.patch_dim, config.hidden_size)
        self.encoder = Encoder(config)

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        """``[batch, frames, mel bins]`` -> ``[batch, tokens, hidden]``, tokens time-major with frequency fastest."""
        patches = self.patch_embedding(fbank[:, None]).flatten(2).transpose(1, 2)
        encoded: torch.Tensor = self.encoder(self.post_extract_proj(self.layer_norm(patches)))
        return encoded


class Encoder(nn.Module):
    """Convolutional position embedding, layer norm at the entrance (and none at the exit), transformer layers."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(PositionConv(config))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config, has_bias=n == 0) for n in range(config.num_hidden_layers))
        self._num_buckets, self._max_distance = config.num_buckets, config.max_distance
        self._kept: tuple[tuple[int, torch.device, torch.dtype], torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, hidden]`` -> the same shape."""
        hidden = self.layer_norm(hidden + F.gelu(self.pos_conv(hidden)))
        bias = self.position_bias(hidden.shape[1])
        # Fresh memory for every gated bias would cost more than its arithmetic. (Autograd and GPUs do without.)
        reuse = hidden.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        scratch = torch.empty_like(bias)[None] if reuse else None
        for layer in self.layers:
            hidden = layer(hidden, bias, scratch)
        return hidden

    def position_bias(self, length: int) -> torch.Tensor:
        """Layer 0's relative position embedding, which every layer uses, as ``[heads, length, length]``.

        The last one is kept, and used again as long as length and embedding are the same.
        """
        embedding = self.get_parameter("layers.0.self_attn.relative_attention_bias.weight")
        if torch.compiler.is_compiling() or (embedding.requires_grad and torch.is_grad_enabled()):
            return self._expand(embedding, length)
        key = (length, embedding.device, embedding.dtype)
        if self._kept is None or self._kept[0] != key or not torch.equal(self._kept[1], embedding):
            with torch.inference_mode(False):  # what is made in inference mode is of no use outside it
                self._kept = (key, embedding.detach().clone(), self._expand(embedding.detach(), length))
        return self._kept[2]

    def _expand(self, embedding: torch.Tensor, length: int) -> torch.Tensor:
        offset = torch.arange(1 - length, length, device=embedding.device)
        buckets = relative_buckets(offset, num_buckets=self._num_buckets, max_distance=self._max_distance)
        # Query q sees the offsets -q ... length - 1 - q: windows over all offsets, last one first.
        return embedding[buckets].T.contiguous().unfold(1, length, 1).flip(1).contiguous()


class PositionConv(nn.Module):
    """Grouped convolution over time whose weight is normalised over all but its taps (weight norm, ``dim=2``)."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, kernel, self._groups = config.hidden_size, config.conv_kernel, config.conv_groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(width, width // self._groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight_v, std=(4 / (kernel * width)) ** 0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, hidden]`` -> the same shape."""
        norm = self.weight_v.float().square().sum((0, 1)).sqrt()
        weight = self.weight_v * (self.weight_g / norm).to(self.weight_v.dtype)
        # As an image of one row with its channels last, which it is in memory already: a CPU then takes half the time.
        channels_last = {"memory_format": torch.channels_last}
        out = F.conv2d(
            hidden.transpose(1, 2)[:, :, None].contiguous(**channels_last),
            weight[:, :, None].contiguous(**channels_last),
            self.bias,
            padding=(0, weight.shape[2] // 2),
            groups=self._groups,
        )
        # An even kernel makes one output too many, at the end.
        return out[:, :, 0, : hidden.shape[1]].transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by a scaled residual (deep norm) and a layer norm."""

    def __init__(self, config: BeatsConfig, *, has_bias: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = GatedAttention(config, has_bias=has_bias)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)
        self._residual_scale = (2 * config.num_hidden_layers) ** 0.25  # DeepNet (Wang et al. 2022), encoder only

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, scratch: torch.Tensor | None) -> torch.Tensor:
        """``[batch, tokens, hidden]`` -> the same shape; the rest as for :class:`GatedAttention`."""
        attended = self.self_attn(hidden, bias, scratch)
        hidden = self.self_attn_layer_norm(attended.add(hidden, alpha=self._residual_scale))
        forwarded = self.fc2(F.gelu(self.fc1(hidden)))
        return self.final_layer_norm(forwarded.add(hidden, alpha=self._residual_scale))


class GatedAttention(nn.Module):
    """Self-attention with a relative position bias that every query weighs anew (WavLM, Chen et al. 2022, eq. 3)."""

    def __init__(self, config: BeatsConfig, *, has_bias: bool) -> None:
        super().__init__()
        width, self._heads = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self._heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self._heads, 1, 1))
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, self._heads)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, scratch: torch.Tensor | None) -> torch.Tensor:
        """``[batch, tokens, hidden]`` -> the same shape.

        Args:
            bias: ``[heads, tokens, tokens]``, query before key.
            scratch: Memory for one clip's gated bias, ``[1, heads, tokens, tokens]``; None to allocate it.
        """
        query, key, value = (
            projection(hidden).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        gate = self._gate(query)
        # A clip at a time on a CPU: the gated bias (12 MB) then stays in the cache.
        rows = 1 if hidden.device.type == "cpu" else len(hidden)
        attended = []
        for n in range(0, len(hidden), rows):
            clips = slice(n, n + rows)
            mask = torch.mul(gate[clips], bias, out=scratch)
            out = F.scaled_dot_product_attention(query[clips], key[clips], value[clips], attn_mask=mask)
            attended.append(out.transpose(1, 2).flatten(2))
        return self.out_proj(torch.cat(attended))

    def _gate(self, query: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, tokens, head]`` -> ``[batch, heads, tokens, 1]``."""
        # The eight outputs are only ever used as two sums of four, so the weights are summed instead.
        weight = self.grep_linear.weight.unflatten(0, (2, 4)).sum(1)
        bias = self.grep_linear.bias.unflatten(0, (2, 4)).sum(1)
        a, b = F.linear(query, weight, bias).sigmoid().split(1, dim=-1)
        return a * (b * self.grep_a - 1) + 2


def relative_buckets(offset: torch.Tensor, *, num_buckets: int, max_distance: int) -> torch.Tensor:
    """T5's bidirectional buckets (Raffel et al. 2020): exact near by, logarithmic further off, one half a direction.

    Offsets are int64, key position minus query position, of any shape. From ``max_distance`` on the last bucket of a
    direction is used.
    """
    half = num_buckets // 2
    near = half // 2
    distance = offset.abs()
    # float32, then truncated: where the boundaries fall depends on it.
    far = torch.log(distance.clamp(min=1).float() / near) / math.log(max_distance / near) * (half - near)
    bucket = torch.where(distance < near, distance, (near + far.long()).clamp(max=half - 1))
    return bucket + half * (offset > 0)
