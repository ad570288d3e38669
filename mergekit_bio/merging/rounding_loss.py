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

from mergekit_bio.checkpoint.manifest import RoundingLoss

if TYPE_CHECKING:
    import torch

#: The rows of :class:`ErrorSums`: the delta, the error, the error of rounding to nearest, and the base.
DELTA, ERROR, NEAREST, BASE = range(4)


@dataclass
class ErrorSums:
    """What is summed up of one tensor, over sampled elements.

    Attributes:
        products: float64 [4, 4], on the device: inner products of delta, error, the error of rounding to nearest, and
            base with each other.
        count: Elements sampled.
    """

    products: "torch.Tensor"
    count: int = 0

    @classmethod
    def zeros(cls, device: "torch.device") -> "ErrorSums":
        """Nothing summed yet."""
        import torch

        return cls(torch.zeros(4, 4, dtype=torch.float64, device=device))

    @classmethod
    def total(cls, parts: Iterable["ErrorSums"]) -> "ErrorSums":
        """Sums over several parts of one tensor."""
        import torch

        sums = list(parts)
        return cls(torch.stack([part.products for part in sums]).sum(0), sum(part.count for part in sums))

    def add(self, sample: "torch.Tensor") -> None:
        """Take in [4, elements] of delta, error, error of nearest and base, in the compute dtype."""
        self.products += sample @ sample.T
        self.count += sample.shape[1]


def module_type(tensor: str) -> str:
    """``"model.layers.3.self_attn.q_proj.weight"`` -> ``"self_attn.q_proj"``."""
    name = tensor.removesuffix(".weight")
    return re.split(r"\.\d+\.", name)[-1] if re.search(r"\.\d+\.", name) else name.split(".")[-1]


def summarise(errors: Iterable[tuple[str, int, ErrorSums]]) -> tuple[RoundingLoss, ...]:
    """The rounding loss per module type, and in total.

    Args:
        errors: (tensor name, its elements, its sums).
    """
    groups: dict[str, list[tuple[int, list[list[float]]]]] = {}
    for name, elements, sums in errors:
        # A tensor's sample stands for all its elements.
        products = (sums.products * (elements / max(sums.count, 1))).tolist()
        for group in (module_type(name), "total"):
            groups.setdefault(group, []).append((elements, products))
    order = sorted(groups, key=lambda group: (group == "total", group))
    return tuple(_loss(group, groups[group]) for group in order)


def _loss(modules: str, parts: list[tuple[int, list[list[float]]]]) -> RoundingLoss:
    def total(row: int, col: int) -> float:
        return math.fsum(products[row][col] for _, products in parts)

    dd, ww = total(DELTA, DELTA), total(BASE, BASE)
    size = math.sqrt(dd)
    return RoundingLoss(
        modules=modules,
        tensors=len(parts),
        elements=sum(elements for elements, _ in parts),
        delta_over_weight=size / math.sqrt(ww) if ww else 0.0,
        loss=math.sqrt(total(ERROR, ERROR)) / size if size else 0.0,
        bias=abs(total(ERROR, DELTA)) / dd if dd else 0.0,
        loss_nearest=math.sqrt(total(NEAREST, NEAREST)) / size if size else 0.0,
        bias_nearest=abs(total(NEAREST, DELTA)) / dd if dd else 0.0,
    )
