"""How much of a delta rounding loses, per module type.

For a tensor with delta ``d`` (at its strength) and rounding error ``e = round(W0 + d) - (W0 + d)``:

- loss: ``||e|| / ||d||``, the error's size; any rounding to a coarse grid has one.
- bias: ``|<e, d>| / <d, d>``, the share of the delta that is systematically missing or added. Rounding to nearest has
  one where deltas are below half a step; for stochastic rounding it is zero on average.
"""

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mergekit_bio.checkpoint.manifest import RoundingLoss

if TYPE_CHECKING:
    import torch

#: What is measured of sampled elements, and in which order: the delta, the error, the error of rounding to nearest, and
#: the base. All figures come from the inner products of the four with each other.
DELTA, ERROR, NEAREST, BASE = range(4)


def module_type(tensor: str) -> str:
    """``"model.layers.3.self_attn.q_proj.weight"`` -> ``"self_attn.q_proj"``."""
    name = tensor.removesuffix(".weight")
    return re.split(r"\.\d+\.", name)[-1] if re.search(r"\.\d+\.", name) else name.split(".")[-1]


def summarise(folds: Iterable[tuple[str, int, "torch.Tensor"]]) -> tuple[RoundingLoss, ...]:
    """The rounding loss per module type, and in total.

    Args:
        folds: (tensor name, its elements, float64 [4, 4] inner products for all of them).
    """
    groups: dict[str, list[tuple[int, list[list[float]]]]] = {}
    for name, elements, products in folds:
        for group in (module_type(name), "total"):
            groups.setdefault(group, []).append((elements, products.tolist()))
    order = sorted(groups, key=lambda group: (group == "total", group))
    return tuple(_loss(group, groups[group]) for group in order)


def _loss(modules: str, parts: list[tuple[int, list[list[float]]]]) -> RoundingLoss:
    def total(row: int, col: int) -> float:
        return math.fsum(products[row][col] for _, products in parts)

    delta_squared, base_norm = total(DELTA, DELTA), math.sqrt(total(BASE, BASE))
    delta_norm = math.sqrt(delta_squared)
    return RoundingLoss(
        modules=modules,
        tensors=len(parts),
        elements=sum(elements for elements, _ in parts),
        delta_over_weight=delta_norm / base_norm if base_norm else 0.0,
        loss=math.sqrt(total(ERROR, ERROR)) / delta_norm if delta_norm else 0.0,
        bias=abs(total(ERROR, DELTA)) / delta_squared if delta_squared else 0.0,
        loss_nearest=math.sqrt(total(NEAREST, NEAREST)) / delta_norm if delta_norm else 0.0,
        bias_nearest=abs(total(NEAREST, DELTA)) / delta_squared if delta_squared else 0.0,
    )
