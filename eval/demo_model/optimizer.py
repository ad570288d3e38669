"""How everything of the demo's model is trained: Muon for the matrices, AdamW for the rest."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn


class Optimizer:
    """Muon (Jordan et al. 2024) and AdamW on one schedule: a short rise, a plateau, a linear fall.

    For models this small Muon needs a third of the steps AdamW does until copying from a list appears.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, matrices: Sequence[nn.Parameter], steps: int, warm_up: int = 50
    ) -> None:
        """Set up.

        Args:
            parameters: All that is trained.
            matrices: Those of them that Muon trains; each has two dimensions.
            steps: Steps there will be.
            warm_up: Steps of the rise.
        """
        self._parameters = list(parameters)
        muon = {id(matrix) for matrix in matrices}
        rest = [parameter for parameter in self._parameters if id(parameter) not in muon]
        self._optimizers = (
            torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01),
            torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        )

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / warm_up) * max(0.02, min(1.0, (steps - step) / (0.6 * steps)))

        self._schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in self._optimizers]

    def step(self, loss: torch.Tensor) -> None:
        """Go one step down."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
