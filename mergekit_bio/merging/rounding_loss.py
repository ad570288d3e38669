"""How much of a delta rounding loses, per module type.

For a tensor with delta ``d`` (at its strength) and rounding error ``e = round(W0 + d) - (W0 + d)``:

- loss: ``||e|| / ||d||``, the error's size; any rounding to a coarse grid has one.
- bias: ``|<e, d>| / <d, d>``, the share of the delta that is systematically missing or added. Rounding to nearest has
  one where deltas are below half a step; for stochastic rounding it is zero on average.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class ErrorSums:
    """Sums over sampled elements, on the device: <d,d>, <e,e>, <e,d>, the last two for nearest, <w,w>, count."""

    values: "torch.Tensor"

    @classmethod
    def zeros(cls, device: "torch.device") -> "ErrorSums":
        """Nothing summed yet."""
        import torch

        return cls(torch.zeros(7, dtype=torch.float64, device=device))

    @classmethod
    def total(cls, parts: Iterable["ErrorSums"]) -> "ErrorSums":
        """Sums over several parts of one tensor."""
        import torch

        return cls(torch.stack([part.values for part in parts]).sum(0))

    def add(self, rounded: "torch.Tensor", exact: "torch.Tensor", delta: "torch.Tensor", base: "torch.Tensor") -> None:
        """Take in a block.

        Args:
            rounded: What is written, in the output's dtype.
            exact: What was rounded, in the compute dtype, same shape; overwritten.
            delta: The part of it that is delta.
            base: The part of it that is base.
        """
        import torch

        nearest = exact.to(rounded.dtype)
        d = delta.flatten()
        for slot, result in ((1, rounded), (3, nearest)):
            error = result.to(exact.dtype).sub_(exact).flatten()
            self.values[slot] += torch.dot(error, error)
            self.values[slot + 1] += torch.dot(error, d)
        self.values[0] += torch.dot(d, d)
        self.values[5] += base.square().sum()
        self.values[6] += d.numel()


@dataclass(frozen=True)
class RoundingLoss:
    """The figures of one module type, or of all together.

    Attributes:
        modules: ``"self_attn.q_proj"``, or ``"total"``.
        tensors: How many.
        elements: How many weights they have.
        delta_over_weight: ``||d|| / ||W0||``.
        loss: See the module; for the rounding used.
        bias: See the module; for the rounding used.
        loss_nearest: The same, had it been rounded to nearest.
        bias_nearest: The same, had it been rounded to nearest.
    """

    modules: str
    tensors: int
    elements: int
    delta_over_weight: float
    loss: float
    bias: float
    loss_nearest: float
    bias_nearest: float


def module_type(tensor: str) -> str:
    """``"model.layers.3.self_attn.q_proj.weight"`` -> ``"self_attn.q_proj"``."""
    name = tensor.removesuffix(".weight")
    return re.split(r"\.\d+\.", name)[-1] if re.search(r"\.\d+\.", name) else name.split(".")[-1]


def summarise(errors: Iterable[tuple[str, int, ErrorSums]]) -> tuple[RoundingLoss, ...]:
    """Figures per module type, and in total.

    Args:
        errors: (tensor name, its elements, its sums).
    """
    groups: dict[str, list[tuple[int, list[float]]]] = {}
    for name, elements, sums in errors:
        values = sums.values.tolist()
        for group in (module_type(name), "total"):
            groups.setdefault(group, []).append((elements, values))
    order = sorted(groups, key=lambda group: (group == "total", group))
    return tuple(_loss(group, groups[group]) for group in order)


def _loss(modules: str, parts: list[tuple[int, list[float]]]) -> RoundingLoss:
    # Each tensor's sample stands for all its elements.
    weighted = [[value * elements / max(values[6], 1.0) for value in values] for elements, values in parts]
    dd, ee, ed, nn, nd, ww, _ = (math.fsum(column) for column in zip(*weighted, strict=True))
    size = math.sqrt(dd)
    return RoundingLoss(
        modules=modules,
        tensors=len(parts),
        elements=sum(elements for elements, _ in parts),
        delta_over_weight=size / math.sqrt(ww) if ww else 0.0,
        loss=math.sqrt(ee) / size if size else 0.0,
        bias=abs(ed) / dd if dd else 0.0,
        loss_nearest=math.sqrt(nn) / size if size else 0.0,
        bias_nearest=abs(nd) / dd if dd else 0.0,
    )
