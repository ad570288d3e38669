"""What a user asks a merge for, from the command line or a YAML file; the edge where free text becomes typed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, Strict

from mergekit_bio.errors import MergekitBioError, RecipeError
from mergekit_bio.merging.alpha import Alpha, parse_alphas
from mergekit_bio.merging.merge import AdapterSource, DType, Rounding
from mergekit_bio.outside_data import Document, KeyPath, checked, read_yaml

BASE = "meta-llama/Llama-3.1-8B-Instruct"
ADAPTER = "EarthSpeciesProject/NatureLM-audio"
#: "true" is no strength.
Number: TypeAlias = Annotated[float, Strict()]


class AdapterEntry(BaseModel):
    """An adapter with a strength of its own.

    Attributes:
        source: Directory or hub id, with an optional ``@revision``.
        alpha: Its strength, whatever the merge's; None for the merge's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    alpha: Number | str | None = None


class MergeRequest(BaseModel):
    """The options of a merge; names, meanings and defaults as on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    base: str = BASE
    adapter: str | list[str | AdapterEntry] = ADAPTER
    alphas: Number | str | list[Number | str] = Field(default_factory=list)
    out: Path | None = None
    dtype: DType = "keep"
    rounding: Rounding = "stochastic"
    seed: int = 0
    device: str = "auto"
    text_only: bool = False
    base_from_adapter: bool = False
    share: bool = True
    fsync: bool = True
    overwrite: bool = False

    @property
    def adapters(self) -> list[AdapterSource]:
        """The adapters as :func:`mergekit_bio.merging.merge.merge` takes them."""
        entries = [self.adapter] if isinstance(self.adapter, str) else self.adapter
        return [_adapter(entry) for entry in entries]

    @property
    def strengths(self) -> tuple[Alpha, ...]:
        """The strengths, read."""
        return parse_alphas(self.alphas if isinstance(self.alphas, list) else [self.alphas])

    @property
    def destination(self) -> Path:
        """``out``, or ``merged/<adapter>-alpha-0.50``; for a sweep ``merged/<adapter>``."""
        if self.out is not None:
            return self.out
        sources = [source[0] if isinstance(source, tuple) else source for source in self.adapters]
        name = "+".join(str(source).partition("@")[0].rstrip("/").split("/")[-1] or "adapter" for source in sources)
        labels = [alpha.label for alpha in self.strengths]
        return Path("merged") / (f"{name}-alpha-{labels[0]}" if len(labels) == 1 else name)


def read_request(recipe: Path | None, options: Mapping[str, Any]) -> MergeRequest:
    """Combine a YAML file with command-line options, which win.

    Args:
        recipe: A YAML mapping with the keys of :class:`MergeRequest`.
        options: The same keys; None stands for "not given".

    Raises:
        RecipeError: The file cannot be read, or a key or value is wrong.
    """
    document = Document("", {}, RecipeError) if recipe is None else read_yaml(recipe, error=RecipeError)
    if not isinstance(document.data, dict):
        raise document.problem((), "is not a mapping of options, such as 'base: ...'")
    given = {key: value for key, value in options.items() if value not in (None, [])}

    def where(path: KeyPath) -> str:
        option = next((str(key) for key in path[:1] if key in given), None)
        return document.where(path) if option is None else f"--{option.replace('_', '-')}"

    return checked(MergeRequest, document.data | given, error=RecipeError, where=where)


def _adapter(entry: str | AdapterEntry) -> AdapterSource:
    if isinstance(entry, AdapterEntry):
        return entry.source if entry.alpha is None else (entry.source, entry.alpha)
    source, equals, strength = entry.rpartition("=")
    if not equals or Path(entry).is_dir():
        return entry
    try:
        return source, float(strength)
    except ValueError as error:
        raise MergekitBioError(f"--adapter {entry}: {strength!r} after '=' is not a strength") from error
