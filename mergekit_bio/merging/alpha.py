"""Merge strengths: how much of a delta each tensor gets."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from mergekit_bio.errors import AlphaError

_MAX_SWEEP = 1000
_MAX_STRENGTH = 1_000_000


@dataclass(frozen=True)
class Alpha:
    """A strength for every tensor: a default, and exceptions by module or layer.

    Attributes:
        default: The strength of what no exception names.
        modules: (pattern, strength) pairs, the later the stronger. A pattern is one or more components of a
            tensor's dotted name, in order: ``q_proj``, ``layers.0-15``, ``layers.3.mlp``.
    """

    default: float
    modules: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        """How this strength is written in directory names: ``0.50``, or ``0.50-q_proj-0.30``."""
        parts = [_number(self.default)] if self.default or not self.modules else []
        parts += [f"{pattern}-{_number(value)}" for pattern, value in self.modules]
        return "-".join(parts)

    def __str__(self) -> str:
        """As the command line takes it: :func:`parse_alphas` makes the same of it."""
        return ",".join([repr(self.default), *(f"{pattern}={value!r}" for pattern, value in self.modules)])

    def of(self, tensor: str) -> float:
        """The strength for ``tensor``."""
        value = self.default
        for pattern, strength in self.modules:
            if matches(pattern, tensor):
                value = strength
        return value

    def check_used(self, tensors: Iterable[str]) -> None:
        """Make sure that every exception is about something.

        Raises:
            AlphaError: A pattern names none of ``tensors``, the ones that deltas change.
        """
        names = list(tensors)
        for pattern, _ in self.modules:
            if not any(matches(pattern, name) for name in names):
                known = sorted({part for name in names for part in name.split(".") if not part.isdigit()} - {"weight"})
                near = difflib.get_close_matches(pattern, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"they have: {', '.join(known)}"
                raise AlphaError(f"--alpha: {pattern!r} names none of the {len(names)} tensors that are merged; {hint}")


def matches(pattern: str, tensor: str) -> bool:
    """Whether the components of ``pattern`` occur in the name ``tensor``, in this order.

    A component ``A-B`` of two whole numbers stands for any number from A to B.
    """
    parts = iter(tensor.split("."))
    return all(any(_component(wanted, part) for part in parts) for wanted in pattern.split("."))


def parse_alphas(texts: Sequence[str | float]) -> tuple[Alpha, ...]:
    """Read strengths as the command line gives them.

    Args:
        texts: Each a number, a sweep ``START:STOP:STEP`` with both ends included, or a comma-separated list of
            ``MODULE=NUMBER`` with at most one plain number for the rest (without one, the rest stays the base).

    Raises:
        AlphaError: One cannot be read, is not finite, or is there twice.
    """
    alphas: list[Alpha] = []
    for text in map(str, texts):
        if ":" in text:
            alphas.extend(Alpha(value) for value in _sweep(text))
        elif "=" in text:
            alphas.append(_exceptions(text))
        else:
            alphas.append(Alpha(_parse(text)))
    if not alphas:
        raise AlphaError("--alpha: no strength given; try --alpha 0.5, or a sweep --alpha 0:1:0.1")
    for index, alpha in enumerate(alphas):
        if alpha.label in {other.label for other in alphas[:index]}:
            raise AlphaError(f"--alpha: {alpha.label} is given twice")
    return tuple(alphas)


def one_alpha(text: str | float) -> Alpha:
    """Read what must be one strength, as :func:`parse_alphas` does.

    Raises:
        AlphaError: It cannot be read, or is a sweep.
    """
    alphas = parse_alphas([text])
    if len(alphas) != 1:
        raise AlphaError(f"--alpha: {text!r} is {len(alphas)} strengths; an adapter has one of its own")
    return alphas[0]


def _component(wanted: str, part: str) -> bool:
    bounds = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if bounds and part.isdigit():
        return int(bounds[1]) <= int(part) <= int(bounds[2])
    return wanted == part


def _number(value: float) -> str:
    """Two decimals, more where two would not tell the value."""
    return f"{value:.2f}" if math.isclose(value, round(value, 2), abs_tol=1e-12) else f"{value:.10g}"


def _parse(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise AlphaError(
            f"--alpha: {text!r} is not a number, a sweep such as 0:1:0.1, or a list such as q_proj=0.3,o_proj=0.6"
        ) from error
    if not math.isfinite(value):
        raise AlphaError(f"--alpha: {text!r} is not finite; a strength is usually between 0 and 1")
    return value


def _sweep(text: str) -> list[float]:
    try:
        start, stop, step = (Decimal(part) for part in text.split(":"))
    except (ValueError, InvalidOperation) as error:
        raise AlphaError(f"--alpha: {text!r} is not a sweep START:STOP:STEP, such as 0:1:0.1") from error
    if not (start.is_finite() and stop.is_finite() and step.is_finite()):
        raise AlphaError(f"--alpha: {text!r} is not finite")
    if step <= 0 or stop < start:
        raise AlphaError(
            f"--alpha: {text!r} goes nowhere; a sweep is START:STOP:STEP with STEP above 0 and STOP >= START"
        )
    if max(abs(start), stop) > _MAX_STRENGTH or stop - start >= step * _MAX_SWEEP:
        raise AlphaError(f"--alpha: {text!r} is more than {_MAX_SWEEP} strengths, or one above {_MAX_STRENGTH:,}")
    count = int((stop - start) / step) + 1
    return [float(start + index * step) for index in range(count)]


def _exceptions(text: str) -> Alpha:
    default: float | None = None
    modules: list[tuple[str, float]] = []
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if equals and not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
            raise AlphaError(f"--alpha: {name!r} is no module or layer range, such as q_proj or layers.0-15")
        if name in dict(modules):
            raise AlphaError(f"--alpha: {text!r} gives {name} twice")
        if equals:
            modules.append((name, _parse(value)))
        elif default is None:
            default = _parse(name)
        else:
            raise AlphaError(f"--alpha: {text!r} has two plain numbers; one is for all that is not named")
    return Alpha(default or 0.0, tuple(modules))
