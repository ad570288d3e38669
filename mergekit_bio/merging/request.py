"""What a user asks a merge for, from the command line or a YAML file; the edge where free text becomes typed."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from mergekit_bio.errors import MergekitBioError, RecipeError
from mergekit_bio.merging.alpha import Alpha, parse_alphas
from mergekit_bio.merging.api import AdapterSource, DType, Rounding
from mergekit_bio.plain_yaml import PlainLoader

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
        """The adapters as :func:`mergekit_bio.merging.api.merge` takes them."""
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
    stated = _read_yaml(recipe) if recipe is not None else {}
    stated |= {key: value for key, value in options.items() if value not in (None, [])}
    try:
        return MergeRequest.model_validate(stated)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "the file"
        where = f"{recipe}: {key}" if recipe is not None and options.get(key) is None else f"--{key.replace('_', '-')}"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, MergeRequest.model_fields, n=1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(MergeRequest.model_fields)}"
            raise RecipeError(f"{where}: no such key; {known}") from error
        raise RecipeError(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}") from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), PlainLoader)  # a SafeLoader
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise RecipeError(f"{file}: is not a mapping of options, such as 'base: ...'")
    return document


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
