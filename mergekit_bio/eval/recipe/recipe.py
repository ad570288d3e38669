"""The recipe: what an evaluation run is made of, read from YAML."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len

from mergekit_bio.errors import RecipeError
from mergekit_bio.eval.components import components
from mergekit_bio.eval.label_map import Target, read_label_map
from mergekit_bio.eval.prompt import flags, question
from mergekit_bio.eval.recipe.located_yaml import read_located_yaml
from mergekit_bio.eval.recipe.reference_yaml import is_reference, reference_path, translated
from mergekit_bio.eval.validation import FORBID_EXTRA, dotted, nearest, validated
from mergekit_bio.eval.validation import Path as KeyPath

Text = Annotated[str, Len(1)]
Decoding = Literal["generate", "choice", "loglikelihood"]
Scorer = Literal["paper", "beans-zero", "exact", "choice"]

#: What divides logits without overflow; vLLM takes it where less is asked for.
LOWEST_TEMPERATURE = 0.01
#: With the number of a clip added it is one that torch and vLLM take.
HIGHEST_SEED = 2**62

DEFAULT_BASE = "meta-llama/Llama-3.1-8B-Instruct"
DEFAULT_ADAPTER = "EarthSpeciesProject/NatureLM-audio"
DEFAULT_DATA = "EarthSpeciesProject/BEANS-Zero"


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Which checkpoints to make: one for each alpha."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    alphas: Annotated[tuple[float, ...], Len(1)]
    base: Text = DEFAULT_BASE
    adapter: Text = DEFAULT_ADAPTER
    base_from_adapter: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """A BEANS-Zero component (``name`` alone) or a local folder of recordings (``path``)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    name: Text
    path: Text | None = None
    task: Literal["classification", "detection", "captioning"] | None = None


@dataclass(frozen=True, kw_only=True)
class Species:
    """A species that is asked about, and how it sounds, for ``{examples}``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    name: Text
    description: Text | None = None


@dataclass(frozen=True, kw_only=True)
class Generate:
    """How answers are generated. A temperature of 0 is deterministic: beam search, greedy with one beam."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    max_new_tokens: Annotated[int, Ge(1)] = 100
    num_beams: Annotated[int, Ge(1), Le(1000)] = 2
    temperature: Annotated[float, Ge(0), Le(100)] = 0.0
    length_penalty: Annotated[float, Ge(-10), Le(10)] = 1.0
    repetition_penalty: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as resolved: defaults filled in, paths absolute.

    Attributes:
        name: The run's name; the file's name without suffix.
        datasets: What is asked about.
        merge: Checkpoints to make, xor ``checkpoints``.
        checkpoints: Merged directories or hub ids.
        data: Where BEANS-Zero is: a hub id, a ``save_to_disk`` folder, or parquet or arrow files.
        streaming: Read ``data`` front to back without keeping it on the disk.
        species: Ask only about clips of these, xor ``top_k_species``.
        top_k_species: Ask only about clips of the most frequent species; more than there are means all.
        n_examples: Clips per species for ``{audio_examples}``.
        queries: Each is asked about every clip; none asks the dataset's own instruction.
        targets: For each query what the right answer is; none means the label.
        label_map: label -> scientific name, for the targets that need it.
        generate: Settings of generation.
        decoding: ``generate`` freely, ``choice`` among the labels, or the labels' ``loglikelihood``.
        scorer: How answers become labels; can be chosen again in ``report``.
        seed: Of orders and examples.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    name: Text
    datasets: Annotated[tuple[DatasetChoice, ...], Len(1)]
    merge: Merge | None = None
    checkpoints: tuple[Text, ...] = ()
    data: Text = DEFAULT_DATA
    streaming: bool = False
    species: tuple[Species, ...] = ()
    top_k_species: Annotated[int, Ge(1)] | None = None
    n_examples: Annotated[int, Ge(0)] = 0
    queries: tuple[Text, ...] = ()
    targets: tuple[Target, ...] = ()
    label_map: dict[str, str] = field(default_factory=dict)
    generate: Generate = field(default_factory=Generate)
    decoding: Decoding = "generate"
    scorer: Scorer = "paper"
    seed: int = 0

    def target(self, query: int) -> Target:
        """What the right answer to a query is."""
        return self.targets[query] if self.targets else "label"


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and what its reader should be told about how it was read."""

    recipe: Recipe
    notes: tuple[str, ...]


def load_recipe(file: Path, *, data: str | Path | None = None) -> LoadedRecipe:
    """Read a recipe, ours or the reference implementation's, and check all that needs neither data nor model.

    Args:
        file: A YAML file. Relative paths in it are relative to its folder.
        data: Where BEANS-Zero is, instead of where the recipe says; relative to where the program runs.

    Raises:
        RecipeError: One line with the file, the line, the key and, for an unknown key, the nearest one.
    """
    document = read_located_yaml(file)
    if not isinstance(document.data, dict):
        raise RecipeError(f"{file}:1: a recipe is a mapping of keys to values")
    content, locate, named = document.data, document.locate, dotted
    notes: tuple[str, ...] = ()
    if is_reference(content):
        content, notes = translated(document)

        def locate(path: KeyPath) -> str:
            return document.locate(reference_path(path, document.data))

        def named(path: KeyPath) -> str:
            return dotted(reference_path(path, document.data))

    content = {"name": file.stem, **content}
    content["datasets"] = _dataset_mappings(content.get("datasets"), file.parent)
    label_map = content.get("label_map")
    if label_map is not None:
        if not isinstance(label_map, str):
            raise RecipeError(f"{locate(('label_map',))}: label_map: input should be the path of a CSV file")
        content["label_map"] = read_label_map(_beside(label_map, file.parent))
    if content["datasets"] is None:
        del content["datasets"]
    recipe = validated(Recipe, content, error=RecipeError, locate=locate, named=named)
    _check(recipe, locate, named)
    recipe = _with_paths(recipe, file.parent)
    if data is not None:
        recipe = replace(recipe, data=_found(str(data), Path()))
    return LoadedRecipe(recipe=recipe, notes=notes)


def _dataset_mappings(datasets: Any, folder: Path) -> Any:
    """``[watkins, {path: frogs/}]`` as mappings; whatever is something else is left for the validation to refuse."""
    if not isinstance(datasets, list):
        return datasets
    mappings = []
    for choice in datasets:
        if isinstance(choice, str):
            choice = {"name": choice}
        elif isinstance(choice, dict) and isinstance(choice.get("path"), str):
            path = str(_beside(choice["path"], folder))
            choice = {"name": Path(path).name, **choice, "path": path}
        mappings.append(choice)
    return mappings


def _beside(path: str, folder: Path) -> Path:
    return (folder / Path(path).expanduser()).resolve()


def _with_paths(recipe: Recipe, folder: Path) -> Recipe:
    """With the paths of sources, checkpoints and data absolute."""
    merge = recipe.merge
    if merge is not None:
        merge = replace(merge, base=_found(merge.base, folder), adapter=_found(merge.adapter, folder))
    checkpoints = tuple(_found(source, folder) for source in recipe.checkpoints)
    return replace(recipe, merge=merge, checkpoints=checkpoints, data=_found(recipe.data, folder))


def _found(source: str, folder: Path) -> str:
    """The absolute path of what exists in the folder; what does not is a hub id."""
    path = _beside(source, folder)
    return str(path) if source.startswith((".", "/", "~")) or path.exists() else source


def _check(recipe: Recipe, locate: Callable[[KeyPath], str], named: Callable[[KeyPath], str]) -> None:
    """What ties keys together."""

    def refuse(path: KeyPath, message: str) -> None:
        raise RecipeError(f"{locate(path)}: {named(path[:1])}: {message}")

    if (recipe.merge is None) == (not recipe.checkpoints):
        refuse(("merge",), "give either merge or checkpoints")
    names = [choice.name for choice in recipe.datasets]
    for index, choice in enumerate(recipe.datasets):
        if choice.path is None and choice.name not in components():
            refuse(("datasets", index), f"unknown component '{choice.name}'{nearest(choice.name, [*components()])}")
        if choice.path is None and choice.task is not None:
            refuse(("datasets", index), "the task of a BEANS-Zero component is known; leave it out")
        if names.index(choice.name) != index:
            refuse(("datasets", index), f"'{choice.name}' stands twice; give local folders different names")
        if choice.path is not None and not recipe.queries:
            refuse(("datasets", index), f"the folder '{choice.name}' has no instruction of its own; give queries")
    if recipe.species and recipe.top_k_species is not None:
        refuse(("top_k_species",), "give either species or top_k_species")
    if (recipe.species or recipe.top_k_species is not None) and len(recipe.datasets) != 1:
        refuse(("datasets",), f"a choice of species is for exactly one dataset, not {len(recipe.datasets)}")
    if len({one.name for one in recipe.species}) < len(recipe.species):
        refuse(("species",), "a name stands twice")
    if recipe.targets and len(recipe.targets) != len(recipe.queries):
        refuse(("targets",), f"{len(recipe.targets)} targets for {len(recipe.queries)} queries; give one a query")
    if set(recipe.targets) - {"label"} and not recipe.label_map:
        refuse(("targets",), "scientific and combined names need a label_map (CSV: label,scientific)")
    if recipe.generate.temperature > 0 and recipe.generate.num_beams > 1:
        refuse(("generate", "temperature"), "sampling (temperature above 0) needs num_beams: 1")
    if 0 < recipe.generate.temperature < LOWEST_TEMPERATURE:
        refuse(("generate", "temperature"), f"a temperature above 0 is {LOWEST_TEMPERATURE} or more")
    if recipe.generate.temperature > 0 and not 0 <= recipe.seed <= HIGHEST_SEED:
        refuse(("seed",), f"sampling needs a seed of 0 to {HIGHEST_SEED}")
    chosen = bool(recipe.species) or recipe.top_k_species is not None
    for index, query in enumerate(recipe.queries):
        used = flags(query, f"{locate(('queries', index))}: {named(('queries', index))}")
        if used & {"species_list", "examples", "audio_examples"} and not chosen:
            refuse(("queries", index), "the flags for species need species or top_k_species")
        if "examples" in used and not (recipe.species and all(one.description for one in recipe.species)):
            refuse(("queries", index), "{examples} needs species with a description each")
        if "audio_examples" in used and not recipe.n_examples:
            refuse(("queries", index), "{audio_examples} needs n_examples of 1 or more")
        if "audio_examples" in used and recipe.streaming:
            refuse(("streaming",), "audio examples are read in any order: {audio_examples} needs streaming: false")
        if not question(query):
            refuse(("queries", index), f"query {index} asks nothing beside its flags and audio slot; write a question")
