"""The checkpoints that a run compares: those given, and a recipe's sweep, of which what is missing is merged."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_bio.audio.names import alias_of, is_tower_tensor
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.identity import merge_strength
from mergekit_bio.checkpoint.manifest import (
    MANIFEST,
    AdapterOrigin,
    Origin,
    checkpoints_of_sweep,
    fingerprint,
    read_manifest,
)
from mergekit_bio.checkpoint.source import missing_files, resolve, without_bars
from mergekit_bio.errors import AlphaError, RecipeError, RunError, SourceError
from mergekit_bio.eval.recipe.schema import Recipe
from mergekit_bio.merging.alpha import parse_alphas
from mergekit_bio.merging.request import MergeRequest

FOLDER = "checkpoints"

#: Opens a progress bar, given a description, a total and its unit.
ProgressBar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, kw_only=True)
class RunCheckpoint:
    """One checkpoint of a run.

    Attributes:
        name: What tables call it, different for each checkpoint of the run.
        source: Its directory, its hub id, or the name that servers know it by.
        alpha: The merge strength; None for a checkpoint not merged with one number.
        to_merge: Whether the recipe asks for it to be merged, if it is not there.
    """

    name: str
    source: str
    alpha: float | None = None
    to_merge: bool = False

    @property
    def missing(self) -> bool:
        """Whether it has to be merged first."""
        return self.to_merge and not (Path(self.source) / MANIFEST).is_file()


def recipe_for(
    recipe: Recipe,
    *,
    models: Sequence[str | Path] = (),
    alphas: Sequence[float | str] = (),
    served: str | None = None,
) -> Recipe:
    """A recipe with other checkpoints, or other strengths of its own.

    Args:
        recipe: As loaded.
        models: Directories or hub ids, instead of whatever the recipe compares.
        alphas: Numbers and sweeps ``"0:1:0.1"``, instead of the recipe's.
        served: The name of a model that servers have, instead.

    Raises:
        AlphaError: A strength cannot be read, or differs between modules.
        RecipeError: Both are given, or the recipe merges nothing.
    """
    if served is not None:
        if models or alphas:
            raise RecipeError("--model-name: is the one model that is asked; leave --model and --alpha out")
        return replace(recipe, merge=None, checkpoints=(served,))
    if models and alphas:
        raise RecipeError("--model and --alpha: the strengths of given checkpoints are decided; give one or the other")
    if models:
        given = [str(Path(model).resolve()) if Path(model).is_dir() else str(model) for model in models]
        return replace(recipe, merge=None, checkpoints=tuple(given))
    if not alphas:
        return recipe
    if recipe.merge is None:
        raise RecipeError(
            f"--alpha: the recipe {recipe.name} merges nothing; leave it out, or give a recipe with merge"
        )
    strengths = parse_alphas(alphas)
    if any(strength.modules for strength in strengths):
        raise AlphaError("--alpha: a recipe's strengths are numbers; merge by module first, and name it with --model")
    return replace(recipe, merge=replace(recipe.merge, alphas=tuple(strength.default for strength in strengths)))


def recipe_for_baseline(recipe: Recipe, *, named: bool) -> tuple[Recipe, str | None]:
    """A recipe as other people's models can be asked it, and what a user must be told of that.

    Raises:
        RecipeError: No model is ``named``, or the recipe's decoding is one that their servers do not have.
    """
    if not named:
        raise RecipeError("--api openai: name the model that is asked with --model-name")
    if recipe.decoding != "generate":
        raise RecipeError(f"{recipe.name}: decoding: {recipe.decoding}: OpenAI's API can only be asked with generate")
    beams = recipe.generate.num_beams
    if beams == 1:
        return recipe, None
    greedy = replace(recipe, generate=replace(recipe.generate, num_beams=1, length_penalty=1.0))
    return greedy, f"OpenAI's API has no beam search: answers are greedy, where the recipe searches with {beams} beams"


def run_checkpoints(
    recipe: Recipe, *, out: Path, served: bool = False, fetch: bool = True, check_access: bool = False
) -> list[RunCheckpoint]:
    """What a run compares, in the recipe's order; a directory that holds a sweep stands for all of it.

    Args:
        recipe: As resolved.
        out: The run directory, where merged checkpoints are kept.
        served: Servers have them: nothing is merged or fetched, and only directories that are here tell their alpha.
        fetch: Download hub ids, and make sure that what is to be merged can be had; without it their alpha is not
            known.
        check_access: Without ``fetch``, make sure that all of it can be had.

    Raises:
        SourceError: A directory or hub id cannot be had.
        RecipeError: A checkpoint is named twice.
    """
    if recipe.merge is not None:
        checkpoints = [
            RunCheckpoint(
                name=f"alpha {strength.label}",
                source=folder if served else str(out / FOLDER / folder),
                alpha=strength.default,
                to_merge=not served,
            )
            for strength in recipe.merge.strengths
            for folder in [f"alpha-{strength.label}"]
        ]
        if (fetch or check_access) and any(checkpoint.missing for checkpoint in checkpoints):
            _check_access(recipe.merge)
        return checkpoints
    sources = [source for given in recipe.checkpoints for source in _sweep(given)]
    if not served:
        for source in sources:
            if fetch:
                resolve(source)
            elif check_access:
                missing_files(source)
    twice = next((source for source, count in Counter(sources).items() if count > 1), None)
    if twice is not None:
        raise RecipeError(f"checkpoints: {twice} stands twice")
    short = Counter(Path(source).name for source in sources)
    return [
        RunCheckpoint(
            name=Path(source).name if short[Path(source).name] == 1 else source,
            source=source,
            alpha=merge_strength(Path(source) if served or not fetch else resolve(source).path),
        )
        for source in sources
    ]


def _check_access(merge: MergeRequest) -> None:
    """Ask for a small file of both sources: a licence not accepted is said before the data is fetched."""
    try:
        with without_bars():
            for source in (merge.base, *(entry.source for entry in merge.adapters)):
                resolve(source, patterns=("*config.json",))
    except SourceError as error:
        raise SourceError(f"{error}; or give checkpoints merged before (--model DIR)") from None


def _sweep(source: str) -> list[str]:
    """The checkpoints of a sweep's directory by their strength, else the source itself."""
    checkpoints = checkpoints_of_sweep(Path(source))
    alphas = {checkpoint: merge_strength(checkpoint) for checkpoint in checkpoints}
    checkpoints.sort(key=lambda checkpoint: (alphas[checkpoint] is None, alphas[checkpoint] or 0.0))
    return [str(checkpoint) for checkpoint in checkpoints] or [source]


def merge_missing(
    checkpoints: Sequence[RunCheckpoint],
    *,
    merge: MergeRequest,
    out: Path,
    progress: ProgressBar,
    note: Callable[[str], None] = lambda _: None,
) -> list[RunCheckpoint]:
    """Merge what is not there yet, all strengths in one pass.

    Args:
        checkpoints: Of ``run_checkpoints``.
        merge: From which sources.
        out: The run directory.
        progress: For the bytes that are written.
        note: Called with a line about a merge that was cut off.

    Returns:
        What was merged.

    Raises:
        MergekitBioError: A source cannot be had, or the merge cannot be made.
        RunError: A checkpoint of an earlier start was merged from other sources.
    """
    for checkpoint in checkpoints:
        if not checkpoint.missing:
            _check_sources(Path(checkpoint.source), merge)
    missing = [checkpoint for checkpoint in checkpoints if checkpoint.missing]
    if not missing:
        return []
    from mergekit_bio.merging.merge import carry_out, plan_merge

    # Beside its place, because later strengths join those that are there.
    fresh = out / f"{FOLDER}.new"
    alphas = [checkpoint.alpha or 0.0 for checkpoint in missing]
    plan = plan_merge(replace(merge, alphas=alphas, out=fresh, overwrite=True))
    if not plan.tower:
        raise RecipeError(
            f"merge.adapter: {_names(merge)[1]} brings no audio tower, so its merges could not hear the clips"
        )
    with progress("merging", plan.bytes_on_disk, "bytes") as advance:
        merged = carry_out(plan, command="mergekit_bio.evaluate(...)", progress=advance, note=note)
    (out / FOLDER).mkdir(exist_ok=True)
    for checkpoint, made in zip(missing, merged, strict=True):
        made.path.rename(checkpoint.source)
    shutil.rmtree(fresh, ignore_errors=True)
    return missing


def _names(merge: MergeRequest) -> tuple[str, ...]:
    """The sources of a merge as its user named them, the base first."""
    return (str(merge.base), *(str(entry.source) for entry in merge.adapters))


def _check_sources(directory: Path, merge: MergeRequest) -> None:
    """Refuse a checkpoint of an earlier start that was not merged as the recipe says now."""
    manifest = read_manifest(directory)
    origins = (manifest.base, *manifest.adapters)
    before = tuple(origin.source for origin in origins)
    now = _names(merge)
    if len(before) != len(now) or not all(map(_same_source, origins, now)):
        raise RunError(
            f"{directory}: was merged from {' and '.join(before)}, the recipe says {' and '.join(now)}; "
            "give another --out for a new run"
        )
    for key in ("dtype", "rounding", "seed", "tokenizer"):
        if getattr(manifest, key) != getattr(merge, key):
            raise RunError(
                f"{directory}: was merged with {key} {getattr(manifest, key)}, the recipe says {getattr(merge, key)}; "
                "give another --out for a new run"
            )
    if not merge.base_from_adapter and any(adapter.base_weights for adapter in manifest.adapters):
        raise RunError(
            f"{directory}: was merged with base_from_adapter, which the recipe does not say; give another --out for a "
            "new run"
        )


def _same_source(origin: Origin, source: str) -> bool:
    """Whether a source is what was merged, at its place or, with a project that was moved, at another one."""
    if source == origin.source:
        return True
    if not Path(source).is_dir():
        return False
    stored = Checkpoint.open(Path(source)).tensors
    if isinstance(origin, AdapterOrigin):
        # What a merge uses of it: not its copies of the base, unless they were taken, nor of the tower's shared bias.
        used = {name for name in stored if (".lora_" in name or is_tower_tensor(name)) and alias_of(name) is None}
        used |= stored.keys() & origin.base_weights.values()
        stored = {name: stored[name] for name in used}
    return fingerprint(stored) == origin.fingerprint
