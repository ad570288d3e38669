"""What is odd about a recording's levels: beyond full scale, silent, or silenced by mixing its channels."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

#: Samples beyond full scale are clipped. Lossy decoders overshoot it; beyond twice as much it is another scale.
_TOO_LOUD = 2.0
#: A mean so much weaker than its channels, in energy, is of channels that cancel: the mean of 16 that have nothing in
#: common has a sixteenth of theirs.
_CANCELLED = 1e-3
#: And a channel so much weaker than the loudest, in energy, is dead: -60 dB.
_DEAD = 1e-6


class Levels:
    """Watches a recording block by block.

    Args:
        mixed: Whether the mean of the channels is heard, not one of them.
    """

    def __init__(self, *, mixed: bool) -> None:
        self._mixed = mixed
        self._channels = 0
        self._frames = 0
        self._peak = 0.0
        #: Of the mean, and then of every channel.
        self._sums: Any = 0.0
        self._squares: Any = 0.0

    def add(self, samples: "np.ndarray[Any, Any]") -> None:
        """Look at a block: float64 ``[frames, channels]``."""
        import numpy as np

        # Products of matrices, because numpy's sums over a short axis are four times as slow. Damaged floats may be as
        # large as floats can be.
        channels = samples.shape[1]
        with np.errstate(all="ignore"):
            mean = samples @ np.full(channels, 1 / channels)
            self._peak = max(self._peak, float(mean.max(initial=0.0)), -float(mean.min(initial=0.0)))
            if self._channels and channels != self._channels:  # a stream of another kind is chained to the first
                return
            self._channels = channels
            self._frames += len(samples)
            self._sums = self._sums + np.append(mean.sum(), np.ones(len(samples)) @ samples)
            self._squares = self._squares + np.append(mean @ mean, np.einsum("ij,ij->j", samples, samples))

    def notes(self) -> Iterator[str]:
        """What a user should know."""
        import numpy as np

        if not self._frames:
            return
        if self._peak > _TOO_LOUD:
            yield f"its samples reach {self._peak:.4g} times full scale and are clipped; divide them by that first"
        # Without the offset that cheap recorders add.
        with np.errstate(all="ignore"):
            energies = np.maximum(self._squares / self._frames - (self._sums / self._frames) ** 2, 0)
        mean, channels = energies[0], energies[1:]
        loudest = channels.max()
        number = int(channels.argmax()) + 1
        choose = f"--channel {number} hears the strongest alone (in a recipe: channel: {number})"
        if not self._squares.any():
            yield "it holds nothing but silence"
        elif len(channels) == 1 or not self._mixed:
            return
        elif mean < _CANCELLED * channels.mean():
            yield f"its channels cancel each other out (opposite phase): their mean is next to silence; {choose}"
        elif (channels < _DEAD * loudest).any():
            dead = [str(number) for number, energy in enumerate(channels, start=1) if energy < _DEAD * loudest]
            names = f"channel {dead[0]} is" if len(dead) == 1 else f"channels {', '.join(dead)} are"
            yield f"{names} silent, so that the mean is weaker than what was recorded; {choose}"
