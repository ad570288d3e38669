"""The recipe: what an evaluation run is made of, read from YAML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len

from mergekit_bio.errors import MergekitBioError, RecipeError
from mergekit_bio.eval.components import Task, components
from mergekit_bio.eval.label_map import Target, read_label_map
from mergekit_bio.eval.paper_questions import NAMED_COMPONENTS, paper_names, paper_target, targets_in_words
from mergekit_bio.eval.prompt import flags, question
from mergekit_bio.eval.recipe.reference_yaml import is_reference, reference_path, translated
from mergekit_bio.eval.scoring.scorers import SCORERS
from mergekit_bio.merging.alpha import parse_alphas
from mergekit_bio.merging.request import MergeRequest
from mergekit_bio.outside_data import FORBID_EXTRA, KeyPath, checked, dotted, nearest, read_yaml

Text = Annotated[str, Len(1)]
Decoding = Literal["generate", "choice", "loglikelihood"]
ScorerName: Any = Literal[tuple(SCORERS)]

#: What divides logits without overflow; vLLM takes it where less is asked for.
LOWEST_TEMPERATURE = 0.01
#: With the number of a clip added it is one that torch and vLLM take.
HIGHEST_SEED = 2**62

DEFAULT_DATA = "EarthSpeciesProject/BEANS-Zero"


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """A BEANS-Zero component (``name`` alone) or local recordings (``path``).

    Attributes:
        name: The component's, or what the recordings are called.
        path: A folder with metadata or with Raven's selection tables in it, or one such table; of instructions a folder
            with metadata.
        label_column: The column that holds the label; Raven's tables have none of their own.
        channel: Which channel is heard, counted from 1; or the mean of all.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    name: Text
    path: Text | None = None
    task: Task | None = None
    channel: Literal["mean"] | Annotated[int, Ge(1)] = "mean"
    label_column: Text | None = None


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
        merge: Checkpoints to make, xor ``checkpoints``. Its strengths are numbers, and the run decides where they go.
        checkpoints: Merged directories or hub ids.
        data: Where BEANS-Zero is: a hub id, a ``save_to_disk`` folder, or parquet or arrow files.
        streaming: Read ``data`` front to back without keeping it on the disk.
        species: Ask only about clips of these, xor ``top_k_species``.
        top_k_species: Ask only about clips of the most frequent species; more than there are means all.
        n_examples: Clips per species for ``{audio_examples}``.
        queries: Each is asked about every clip; none asks the dataset's own instruction.
        targets: For each query what the right answer is; where there is none, see ``target``.
        label_map: label -> scientific name, for the targets that need it.
        decoding: ``generate`` freely, ``choice`` among the labels, or the labels' ``loglikelihood``.
        scorer: How answers become labels; can be chosen again in ``report``.
        seed: Of orders and examples.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    name: Text
    datasets: Annotated[tuple[DatasetChoice, ...], Len(1)]
    merge: MergeRequest | None = None
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
    scorer: ScorerName = "paper"
    seed: int = 0

    def target(self, query: int, dataset: str) -> Target:
        """What the right answer to a query about a dataset is.

        Where ``targets`` does not say it: what the paper scores its questions about watkins and cbi against, for every
        other question the label.
        """
        if self.targets:
            return self.targets[query]
        return self.paper_targets.get(dataset, {}).get(query) or "label"

    @property
    def paper_targets(self) -> dict[str, dict[int, Target | None]]:
        """Component -> query -> what the paper scores it against, of the components that have scientific names.

        None stands for a query that the paper does not ask. A folder is no component, whatever its name.
        """
        return {
            choice.name: {
                number: paper_target(choice.name, query=query, number=number)
                for number, query in enumerate(self.queries)
            }
            for choice in self.datasets
            if choice.path is None and choice.name in NAMED_COMPONENTS and self.queries
        }


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
    # 1. Read the file; the reference's format becomes ours, and errors still name the keys that are in the file.
    document = read_yaml(file, error=RecipeError)
    if not isinstance(document.data, dict):
        raise document.problem((), "a recipe is a mapping of keys to values")
    content = document.data
    if "datasets" not in content and {"base", "adapter", "alphas"} & content.keys():
        raise document.problem((), "is a recipe of 'mergekit-bio merge'; one of 'eval' has datasets")
    notes: tuple[str, ...] = ()
    of_reference = is_reference(content)
    if of_reference:
        content, notes = translated(document)

    def in_file(path: KeyPath) -> KeyPath:
        return reference_path(path, document.data) if of_reference else path

    def where(path: KeyPath, key: KeyPath | None = None) -> str:
        """The line of a value, and its key; ``key`` where only a part of the path is to be shown."""
        shown = dotted(in_file(path if key is None else key))
        return f"{document.line(in_file(path))}: {shown}" if path else document.line()

    # 2. Fill in what the file's name and neighbours say: the run's name, folders of recordings, the label map.
    content = {"name": file.stem, **content}
    if content.get("datasets") is not None:
        content["datasets"] = _dataset_mappings(content["datasets"], file.parent)
    label_map = content.get("label_map")
    if label_map is not None:
        if not isinstance(label_map, str):
            raise RecipeError(f"{where(('label_map',))}: input should be the path of a CSV file")
        content["label_map"] = read_label_map(_in_folder(label_map, file.parent))

    # 3. Check every key by itself, then what ties keys together.
    recipe = checked(Recipe, content, error=RecipeError, where=where)
    _check(recipe, where)

    # 4. Say what the right answers are, and make paths absolute.
    if not recipe.targets:
        recipe, of_targets = _with_targets(recipe, of_reference=of_reference)
        notes += tuple(f"{file}: {note}" for note in of_targets)
    if recipe.merge is not None:
        recipe = replace(recipe, merge=_merge_of_a_run(recipe.merge, file.parent, where))
    checkpoints = tuple(_absolute_if_local(source, file.parent) for source in recipe.checkpoints)
    place = _absolute_if_local(recipe.data, file.parent) if data is None else _absolute_if_local(str(data), Path())
    return LoadedRecipe(recipe=replace(recipe, checkpoints=checkpoints, data=place), notes=notes)


def _with_targets(recipe: Recipe, *, of_reference: bool) -> tuple[Recipe, list[str]]:
    """A recipe without targets, with those of the paper's questions and the names they take, and notes about them."""
    # A file of the reference cannot say targets, so that its user is told of every one. In a recipe of ours none means
    # the label, and what is something else is told.
    notes, needed = [], []
    for component, targets in recipe.paper_targets.items():
        names = ""
        if set(targets.values()) & {"scientific", "combined"}:
            needed.append(component)
            names = f"; the names are {'in label_map' if recipe.label_map else f'labels/{component}.csv'}"
        if names or of_reference:
            scored = targets_in_words([*targets.values()])
            notes.append(f"{component}, scored as the paper scores its questions: {scored}{names}")
    if of_reference and len(recipe.paper_targets) < len(recipe.datasets):
        about = " about the other datasets" if recipe.paper_targets else ""
        notes.append(f"every answer{about} is scored against the label")
    if needed and not recipe.label_map:
        label_map = {
            label: name for component in needed for label, name in read_label_map(paper_names(component)).items()
        }
        recipe = replace(recipe, label_map=label_map)
    if needed and len(needed) == len(recipe.datasets):
        # All ask the same questions and so have the same targets: the recipe can say them itself.
        recipe = replace(recipe, targets=tuple(recipe.target(q, needed[0]) for q in range(len(recipe.queries))))
    return recipe, notes


def _dataset_mappings(datasets: Any, folder: Path) -> Any:
    """``[watkins, {path: frogs/}]`` as mappings; whatever is something else is left for the validation to refuse."""

    def mapping(choice: Any) -> Any:
        if isinstance(choice, str):
            return {"name": choice}
        if isinstance(choice, dict) and isinstance(choice.get("path"), str):
            path = _in_folder(choice["path"], folder)
            return {"name": path.name, **choice, "path": str(path)}
        return choice

    return [mapping(choice) for choice in datasets] if isinstance(datasets, list) else datasets


def _in_folder(path: str, folder: Path) -> Path:
    return (folder / Path(path).expanduser()).resolve()


def _merge_of_a_run(merge: MergeRequest, folder: Path, where: Callable[..., str]) -> MergeRequest:
    """A recipe's merge with its strengths as numbers and the paths of its sources absolute."""
    for key in ("out", "overwrite", "text_only"):
        if getattr(merge, key) != getattr(MergeRequest, key):
            raise RecipeError(f"{where(('merge', key))}: the run decides this; leave it out")
    path: KeyPath = ("merge", "alphas")
    try:
        if isinstance(merge.alphas, Sequence) and not isinstance(merge.alphas, str):
            for index, alpha in enumerate(merge.alphas):  # by itself, so that the error tells which
                path = ("merge", "alphas", index)
                parse_alphas([alpha])
        path = ("merge", "alphas")
        strengths = merge.strengths
        path = ("merge", "adapter")
        adapters = merge.adapters
    except MergekitBioError as error:
        raise RecipeError(f"{where(path)}: {str(error).removeprefix('--alpha: ')}") from error
    if any(strength.modules for strength in strengths):
        raise RecipeError(
            f"{where(('merge', 'alphas'))}: a recipe's strengths are numbers; merge by module first, and list what it "
            "makes in checkpoints"
        )
    sources = [replace(entry, source=_absolute_if_local(str(entry.source), folder)) for entry in adapters]
    plain = [entry.source if entry.alpha is None else entry for entry in sources]
    return replace(
        merge,
        alphas=tuple(strength.default for strength in strengths),
        base=_absolute_if_local(str(merge.base), folder),
        adapter=plain[0] if len(plain) == 1 else tuple(plain),
    )


def _absolute_if_local(source: str, folder: Path) -> str:
    """The absolute path of what is in the folder or looks like a path; anything else is a hub id."""
    path = _in_folder(source, folder)
    return str(path) if source.startswith((".", "/", "~")) or path.exists() else source


def _check_instructions(recipe: Recipe, choice: DatasetChoice, refuse: Callable[[str], None]) -> None:
    """What instructions do not go together with: their rows say what is asked, of which clip, and what is right."""
    for key in ("queries", "species", "top_k_species"):
        if getattr(recipe, key):
            refuse(f"the prompts of '{choice.name}' are its own (task: instructions); leave {key} out")
    if choice.label_column is not None:
        refuse("instructions have their constraint in the column 'constraint'; leave label_column out")
    if recipe.decoding != "generate":
        refuse(f"instructions are answered freely; decoding: {recipe.decoding} takes another dataset")


def _check(recipe: Recipe, where: Callable[..., str]) -> None:
    """What ties keys together."""

    def refuse(path: KeyPath, message: str) -> None:
        raise RecipeError(f"{where(path, key=path[:1])}: {message}")

    if (recipe.merge is None) == (not recipe.checkpoints):
        refuse(("merge",), "give either merge or checkpoints")
    names = [choice.name for choice in recipe.datasets]
    for index, choice in enumerate(recipe.datasets):
        if choice.path is None and choice.name not in components():
            refuse(("datasets", index), f"unknown component '{choice.name}'{nearest(choice.name, [*components()])}")
        if choice.path is None and choice.task is not None:
            refuse(("datasets", index), "the task of a BEANS-Zero component is known; leave it out")
        if choice.path is None and choice.channel != "mean":
            refuse(("datasets", index), "the recordings of BEANS-Zero have one channel; leave it out")
        if choice.path is None and choice.label_column is not None:
            refuse(("datasets", index), "the labels of a BEANS-Zero component are known; leave label_column out")
        if names.index(choice.name) != index:
            refuse(("datasets", index), f"'{choice.name}' stands twice; give local folders different names")
        task = components()[choice.name].task if choice.path is None else choice.task
        if task == "detection" and recipe.decoding != "generate":
            refuse(
                ("decoding",),
                f"'{recipe.decoding}' gives a clip one label, and '{choice.name}' is detection, with several or none; "
                "leave it at generate",
            )
        if task == "instructions":
            _check_instructions(recipe, choice, partial(refuse, ("datasets", index)))
        elif SCORERS[recipe.scorer].match is None:
            refuse(
                ("scorer",),
                f"'{recipe.scorer}' is for task: instructions, and '{choice.name}' is {task or 'classification'}",
            )
        elif choice.path is not None and not recipe.queries:
            refuse(("datasets", index), f"the folder '{choice.name}' has no instruction of its own; give queries")
    if recipe.species and recipe.top_k_species is not None:
        refuse(("top_k_species",), "give either species or top_k_species")
    if (recipe.species or recipe.top_k_species is not None) and len(recipe.datasets) != 1:
        refuse(("datasets",), f"a choice of species is for exactly one dataset, not {len(recipe.datasets)}")
    if len({species.name for species in recipe.species}) < len(recipe.species):
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
        used = flags(query, where(("queries", index)))
        if used & {"species_list", "examples", "audio_examples"} and not chosen:
            refuse(("queries", index), "the flags for species need species or top_k_species")
        if "examples" in used and not (recipe.species and all(species.description for species in recipe.species)):
            refuse(("queries", index), "{examples} needs species with a description each")
        if "audio_examples" in used and not recipe.n_examples:
            refuse(("queries", index), "{audio_examples} needs n_examples of 1 or more")
        if "audio_examples" in used and recipe.streaming:
            refuse(("streaming",), "audio examples are read in any order: {audio_examples} needs streaming: false")
        if not question(query):
            refuse(("queries", index), f"query {index} asks nothing beside its flags and audio slot; write a question")
