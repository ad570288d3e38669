"""What a user asks a merge for: the one list of its options and defaults, for command line, YAML and Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from mergekit_bio.checkpoint.file_names import fitting
from mergekit_bio.errors import MergekitBioError, RecipeError
from mergekit_bio.merging.alpha import Alpha, one_alpha, parse_alphas
from mergekit_bio.outside_data import FORBID_EXTRA, read_yaml

DEFAULT_BASE = "meta-llama/Llama-3.1-8B-Instruct"
DEFAULT_ADAPTER = "EarthSpeciesProject/NatureLM-audio"

DType: TypeAlias = Literal["keep", "bfloat16", "float16", "float32"]
Rounding: TypeAlias = Literal["stochastic", "nearest"]
Tokenizer: TypeAlias = Literal["auto", "base", "adapter"]
Hash: TypeAlias = Literal["folded", "full"]
#: A number, a sweep ``"0:1:0.1"``, or a list by module ``"q_proj=0.3,o_proj=0.6"``.
Strength: TypeAlias = float | str


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter, perhaps with a strength of its own.

    Attributes:
        source: Directory or hub id, with an optional ``@revision``.
        alpha: Its strength, whatever the merge's; None for the merge's.
    """

    source: str | Path
    alpha: Strength | Alpha | None = None

    @property
    def fixed_alpha(self) -> Alpha | None:
        """``alpha``, read.

        Raises:
            AlphaError: It cannot be read, or is a sweep.
        """
        return self.alpha if self.alpha is None or isinstance(self.alpha, Alpha) else one_alpha(self.alpha)


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """The options of a merge; names, meanings and defaults are the same on the command line, in YAML and in Python.

    Attributes:
        base: A directory, or a hub id with an optional ``@revision``.
        adapter: Likewise; one, or several whose deltas are summed. ``"ADAPTER=0.3"``, or an entry with ``source`` and
            ``alpha``, gives an adapter a strength of its own.
        alphas: The strengths, a checkpoint for each.
        out: The directory to make. With several strengths it holds one directory for each, ``alpha-0.50``.
        dtype: Of all weights; ``"keep"`` leaves each as the base has it.
        rounding: How results of 16 bits are rounded: ``"stochastic"`` keeps deltas below half a step on average,
            ``"nearest"`` is what other tools do.
        seed: Of the stochastic rounding.
        device: ``"auto"`` (GPUs if there are any), ``"cpu"``, ``"cuda"`` (all GPUs) or ``"cuda:N"``.
        text_only: Leave an adapter's audio tower out.
        base_from_adapter: Where an adapter repeats a tensor of the base with other values, take the adapter's at every
            strength, 0 included, as NatureLM-audio's original code does; otherwise that is an error.
        tokenizer: ``"auto"`` takes the base's, or that of an adapter that brings new tokens; ``"base"`` and
            ``"adapter"`` say whose.
        share: Store what several strengths have in common once, hard-linked and read-only.
        hash: Of what the manifest records the sha256: ``"folded"`` for tensors that are computed and small files;
            ``"full"`` also for whole files of weights, which have to be read again for it.
        fsync: Have everything on the disk before the directory appears.
        overwrite: Replace a directory that a merge has written before.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    base: str | Path = DEFAULT_BASE
    adapter: str | Path | AdapterEntry | Sequence[str | Path | AdapterEntry] = DEFAULT_ADAPTER
    alphas: Strength | Sequence[Strength] = ()
    out: str | Path | None = None
    dtype: DType = "keep"
    rounding: Rounding = "stochastic"
    seed: int = 0
    device: str = "auto"
    text_only: bool = False
    base_from_adapter: bool = False
    tokenizer: Tokenizer = "auto"
    share: bool = True
    hash: Hash = "folded"
    fsync: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        kinds = {"dtype": DType, "rounding": Rounding, "tokenizer": Tokenizer, "hash": Hash}
        for key, kind in kinds.items():
            if getattr(self, key) not in (choices := get_args(kind)):
                raise MergekitBioError(f"--{key} {getattr(self, key)}: is none of {', '.join(choices)}")

    @property
    def adapters(self) -> tuple[AdapterEntry, ...]:
        """The adapters in their order.

        Raises:
            MergekitBioError: There is none, or what stands after its ``=`` is no strength.
        """
        given = [self.adapter] if isinstance(self.adapter, str | Path | AdapterEntry) else self.adapter
        if not given:
            raise MergekitBioError("no adapter given; name one with --adapter")
        return tuple(_entry(adapter) for adapter in given)

    @property
    def strengths(self) -> tuple[Alpha, ...]:
        """``alphas``, read.

        Raises:
            AlphaError: There is none, or one cannot be read.
        """
        return parse_alphas([self.alphas] if isinstance(self.alphas, float | int | str) else self.alphas)

    @property
    def destination(self) -> Path:
        """``out``, or ``merged/<adapter>-alpha-0.50``; for a sweep ``merged/<adapter>``."""
        if self.out is not None:
            return Path(self.out)
        sources = [str(entry.source) for entry in self.adapters]
        name = "+".join(source.partition("@")[0].rstrip("/").split("/")[-1] or "adapter" for source in sources)
        labels = [alpha.label for alpha in self.strengths]
        return Path("merged") / fitting(f"{name}-alpha-{labels[0]}" if len(labels) == 1 else name)


def read_request(recipe: Path | None, options: Mapping[str, Any]) -> MergeRequest:
    """Combine a YAML file with command-line options, which win.

    Args:
        recipe: A YAML mapping with the keys of :class:`MergeRequest`.
        options: The same keys; None stands for "not given".

    Raises:
        RecipeError: The file cannot be read, or a key or value is wrong.
    """
    request = MergeRequest()
    if recipe is not None:
        document = read_yaml(recipe, error=RecipeError)
        if not isinstance(document.data, dict):
            raise document.problem((), "is not a mapping of options, such as 'base: ...'")
        if "datasets" in document.data:
            raise document.problem((), "is a recipe of 'mergekit-bio eval'")
        if {"models", "slices", "merge_method"} & document.data.keys():
            raise document.problem(
                (), "is a configuration of mergekit; this reads base, adapter, alphas, dtype and so on"
            )
        request = document.checked(MergeRequest)
    return replace(request, **{key: value for key, value in options.items() if value not in (None, [])})


def _entry(adapter: str | Path | AdapterEntry) -> AdapterEntry:
    if isinstance(adapter, AdapterEntry):
        return adapter
    source, equals, strength = str(adapter).rpartition("=")
    if not equals or Path(adapter).is_dir():
        return AdapterEntry(adapter)
    try:
        return AdapterEntry(source, float(strength))
    except ValueError as error:
        raise MergekitBioError(f"--adapter {adapter}: {strength!r} after '=' is not a strength") from error
