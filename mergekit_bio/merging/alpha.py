"""Merge strengths: how much of a delta each tensor gets."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation

from mergekit_bio.errors import AlphaError

_MAX_SWEEP = 1000
_MAX_STRENGTH = 1_000_000


@dataclass(frozen=True)
class Ramp:
    """A strength that goes linearly from layer 0 to the last one (LiNeS: Wang et al. 2024, arXiv 2410.17146).

    Attributes:
        first: Of layer 0.
        last: Of the last layer.
        last_layers: Number of the last layer of each stack of layers in the base, ``{"model.layers": 31}``; what
            :meth:`Alpha.over` fills in.
    """

    first: float
    last: float
    last_layers: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.first!r}..{self.last!r}"

    def of(self, stack: str, layer: int) -> float | None:
        """The strength in one layer; None where the base has no such layer."""
        last_layer = self.last_layers.get(stack, -1)
        if layer > last_layer:
            return None
        share = layer / last_layer if last_layer else 0.0
        return self.first * (1 - share) + self.last * share


@dataclass(frozen=True)
class Alpha:
    """A strength for every tensor: a default, and exceptions by module or layer.

    Attributes:
        default: The strength of what no exception names.
        modules: (pattern, strength) pairs, the later the stronger. A pattern is one or more adjacent components of a
            tensor's dotted name: ``q_proj``, ``layers.0-15``, ``layers.3.mlp``. Where the strength is a ramp, the
            number behind the pattern is the layer: ``layers``.
        with_gaps: Whether other components may stand between those of a pattern, as in merges of manifests before the
            third format.
    """

    default: float
    modules: tuple[tuple[str, float | Ramp], ...] = ()
    with_gaps: bool = False

    @property
    def label(self) -> str:
        """How this strength is written in directory names: ``0.50``, or ``0.50-q_proj-0.30``."""
        parts = [_number(self.default)] if self.default or not self.modules else []
        for pattern, strength in self.modules:
            ends = (strength.first, strength.last) if isinstance(strength, Ramp) else (strength,)
            parts.append(f"{pattern}-{'-to-'.join(map(_number, ends))}")
        return "-".join(parts)

    @property
    def values(self) -> tuple[float, ...]:
        """Every number in it."""
        strengths = [strength for _, strength in self.modules]
        plain = [strength for strength in strengths if not isinstance(strength, Ramp)]
        ends = [end for ramp in strengths if isinstance(ramp, Ramp) for end in (ramp.first, ramp.last)]
        return (self.default, *plain, *ends)

    def __str__(self) -> str:
        """As the command line takes it: :func:`parse_alphas` makes the same of it."""
        return ",".join([repr(self.default), *(f"{pattern}={strength!s}" for pattern, strength in self.modules)])

    def over(self, tensors: Iterable[str]) -> "Alpha":
        """The same for a base with these tensors: ramps know where its last layers are."""
        if not any(isinstance(strength, Ramp) for _, strength in self.modules):
            return self
        names = list(tensors)
        modules: list[tuple[str, float | Ramp]] = []
        for pattern, strength in self.modules:
            if isinstance(strength, Ramp):
                last_layers: dict[str, int] = {}
                for stack, layer in (found for name in names if (found := _layer(pattern, name))):
                    last_layers[stack] = max(layer, last_layers.get(stack, 0))
                strength = replace(strength, last_layers=last_layers)
            modules.append((pattern, strength))
        return replace(self, modules=tuple(modules))

    def of(self, tensor: str) -> float:
        """The strength for ``tensor``; :meth:`over` must have told ramps of the base."""
        value = self.default
        for pattern, strength in self.modules:
            if isinstance(strength, Ramp):
                found = _layer(pattern, tensor)
                in_layer = strength.of(*found) if found else None
                value = value if in_layer is None else in_layer
            elif matches(pattern, tensor, with_gaps=self.with_gaps):
                value = strength
        return value

    def names(self, pattern: str, strength: float | Ramp, tensor: str) -> bool:
        """Whether one of its exceptions is about ``tensor``."""
        if isinstance(strength, Ramp):
            return _layer(pattern, tensor) is not None
        return matches(pattern, tensor, with_gaps=self.with_gaps)

    def check_used(self, tensors: Iterable[str]) -> None:
        """Make sure that every exception is about something.

        Raises:
            AlphaError: A pattern names none of ``tensors``, the ones that deltas change.
        """
        names = list(tensors)
        for pattern, strength in self.modules:
            if not any(self.names(pattern, strength, name) for name in names):
                raise AlphaError(
                    f"--alpha: {pattern!r} names none of the {len(names)} tensors that are merged; "
                    f"{_hint(pattern, strength, names)}"
                )


def matches(pattern: str, tensor: str, *, with_gaps: bool = False) -> bool:
    """Whether the components of ``pattern`` stand side by side in the name ``tensor``.

    A component ``A-B`` of two whole numbers stands for any number from A to B.

    Args:
        pattern: Components of a name, with dots between them.
        tensor: A tensor's name.
        with_gaps: Others may stand between them.
    """
    parts = tensor.split(".")
    if with_gaps:
        rest = iter(parts)
        return all(any(_component(wanted, part) for part in rest) for wanted in pattern.split("."))
    return next(_ends(pattern, parts), None) is not None


def parse_alphas(texts: Sequence[str | float]) -> tuple[Alpha, ...]:
    """Read strengths as the command line gives them.

    Args:
        texts: Each a number, a sweep ``START:STOP:STEP`` with both ends included, or a comma-separated list of
            ``MODULE=NUMBER`` with at most one plain number for the rest (without one, the rest stays the base). A
            ``NUMBER..NUMBER`` goes linearly from layer 0 to the last and needs a plain number beside it.

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


def parse_strength(text: str) -> float | Ramp:
    """Read a number, or a ramp over the layers ``0.2..0.8``.

    Raises:
        AlphaError: It is neither, or not finite.
    """
    first, dots, last = text.partition("..")
    return Ramp(_parse(first), _parse(last)) if dots else _parse(text)


def _ends(pattern: str, parts: Sequence[str]) -> Iterator[int]:
    """Where the components of ``pattern`` stand side by side in a name: the places behind them."""
    wanted = pattern.split(".")
    for start in range(len(parts) - len(wanted) + 1):
        if all(map(_component, wanted, parts[start:])):
            yield start + len(wanted)


def _layer(pattern: str, tensor: str) -> tuple[str, int] | None:
    """The stack of layers that ``pattern`` names in a tensor's name, and the number of the layer in it."""
    parts = tensor.split(".")
    for end in _ends(pattern, parts):
        if end < len(parts) and parts[end].isdigit():
            return ".".join(parts[:end]), int(parts[end])
    return None


def _hint(pattern: str, strength: float | Ramp, names: Sequence[str]) -> str:
    """What a pattern that names nothing may have been meant to be."""
    for parts in (name.split(".") for name in names if matches(pattern, name, with_gaps=True)):
        if isinstance(strength, Ramp):
            return f"{strength} goes over the layers: write the name that stands before their number, as in layers"
        # The components are there, with others between them: show the shortest run that holds them all.
        start = max(first for first in range(len(parts)) if matches(pattern, ".".join(parts[first:]), with_gaps=True))
        stop = next(last for last in range(len(parts) + 1) if matches(pattern, ".".join(parts[:last]), with_gaps=True))
        return f"did you mean {'.'.join(parts[start:stop])}? Its parts must stand side by side"
    known = sorted({part for name in names for part in name.split(".") if not part.isdigit()} - {"weight"})
    near = difflib.get_close_matches(pattern, known, n=1)
    return f"did you mean {near[0]}?" if near else f"they have: {', '.join(known)}"


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
        if re.fullmatch(r"\d+,\d+", text):
            point = text.replace(",", ".")
            raise AlphaError(
                f"--alpha: {text!r} is not a number; write {point}, or --alpha for each strength"
            ) from error
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
    modules: list[tuple[str, float | Ramp]] = []
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if equals and not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
            raise AlphaError(f"--alpha: {name!r} is no module or layer range, such as q_proj or layers.0-15")
        if name in dict(modules):
            raise AlphaError(f"--alpha: {text!r} gives {name} twice")
        if equals:
            modules.append((name, parse_strength(value)))
        elif default is None:
            default = _parse(name)
        else:
            raise AlphaError(f"--alpha: {text!r} has two plain numbers; one is for all that is not named")
    ramp = next((f"{name}={strength}" for name, strength in modules if isinstance(strength, Ramp)), None)
    if ramp and default is None:
        raise AlphaError(f"--alpha: {text!r} needs a plain number for what is outside the layers, such as 0.5,{ramp}")
    return Alpha(default or 0.0, tuple(modules))
