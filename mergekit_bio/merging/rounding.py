"""Rounding folded weights to 16 bits without losing the delta.

A base that is stored in bfloat16 sits on bfloat16's grid, so rounding W0 + d to the nearest value drops every delta
below half a step. Rounding up or down at random, with the probability that the distance gives, is right on average
(stochastic rounding: Gupta et al. 2015, section 3), and an average over weights is what a dot product takes.

The draws are a function of the seed, the tensor's name and the element's place alone: the same on every device, for
every buffer size, and for every strength of a sweep.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Step of the Weyl sequence (2^32 / golden ratio) and multipliers of the mixing (Wellons, "hash-prospector", triple32).
_GOLDEN = 0x9E3779B9
_MULTIPLY = (0xED5AD4BB, 0xAC4C1B51)


class Noise:
    """16-bit noise for the elements of tensors, by place.

    Args:
        capacity: The most elements asked for at once.
        device: Where the noise is wanted.
    """

    def __init__(self, capacity: int, device: "torch.device") -> None:
        import torch

        self.capacity = capacity
        pairs = capacity // 2 + 2
        self._ramp = torch.arange(pairs, dtype=torch.int32, device=device).mul_(_signed(_GOLDEN))
        self._mixed = torch.empty_like(self._ramp)
        self._shifted = torch.empty_like(self._ramp)
        self._wide = torch.empty(2 * pairs, dtype=torch.int32, device=device)

    def draw(self, key: int, first: int, count: int) -> "torch.Tensor":
        """Noise for elements ``first`` to ``first + count`` of the tensor with this key.

        Returns:
            int32 [count], uniform over 0 ... 65535. Valid until the next call.
        """
        import torch

        pairs = (count + (first & 1) + 1) // 2
        x, shifted = self._mixed[:pairs], self._shifted[:pairs]
        torch.add(self._ramp[:pairs], _signed(key + (first // 2) * _GOLDEN), out=x)
        for shift, multiply in zip((17, 11), _MULTIPLY, strict=True):
            _fold_down(x, shifted, shift)
            x.mul_(_signed(multiply))
        x.bitwise_xor_(_signed(key >> 32))
        _fold_down(x, shifted, 15)
        wide = self._wide[: 2 * pairs]
        wide.copy_(x.view(torch.int16)).bitwise_and_(0xFFFF)
        return wide[first & 1 : (first & 1) + count]


def noise_key(seed: int, tensor: str) -> int:
    """The 64-bit key of a tensor's noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{tensor}".encode()).digest()[:8], "little")


def round_into(values: "torch.Tensor", out: "torch.Tensor", noise: "torch.Tensor | None") -> None:
    """Round ``values`` to the dtype of ``out``: to nearest, or at random where ``noise`` is given.

    A value that ``out`` can hold exactly is never moved.

    Args:
        values: [n] float32 (any float dtype without noise); overwritten.
        out: [n] of the output dtype.
        noise: [n] int32 from :class:`Noise`.
    """
    import torch

    if noise is not None and out.dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32: what the noise carries over into it rounds away from zero.
        values.view(torch.int32).add_(noise).bitwise_and_(-0x1_0000)
    elif noise is not None and out.dtype == torch.float16:
        # float16 drops 13 bits of float32, and more below its smallest normal number, where its step is 2^-24.
        step = torch.floor(values.abs().mul_(2.0**24).add_((noise >> 3) * 2.0**-13)).mul_(2.0**-24)
        below = torch.copysign(step, values)
        small = values.abs() < 2.0**-14
        values.view(torch.int32).add_(noise >> 3).bitwise_and_(-0x2000)
        torch.where(small, below, values, out=values)
    out.copy_(values)


def _fold_down(x: "torch.Tensor", shifted: "torch.Tensor", shift: int) -> None:
    """``x ^= x >> shift`` on unsigned 32-bit numbers, which torch can only shift with their sign."""
    import torch

    torch.bitwise_right_shift(x, shift, out=shifted)
    shifted.bitwise_and_((1 << (32 - shift)) - 1)
    x.bitwise_xor_(shifted)


def _signed(value: int) -> int:
    """The low 32 bits as a signed number."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >= 1 << 31 else value
