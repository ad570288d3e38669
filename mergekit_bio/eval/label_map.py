"""Label maps: which scientific name belongs to a label."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mergekit_bio.errors import RecipeError
from mergekit_bio.outside_data import is_text, read_rows

#: What the right answer is: the label, its scientific name, or "scientific : label".
Target = Literal["label", "scientific", "combined"]

#: Stands for the right answer where a label has no scientific name: no answer equals it.
NO_TARGET = "(no scientific name)"


def read_label_map(path: Path) -> dict[str, str]:
    """Read label -> scientific name.

    Args:
        path: A CSV file with the columns ``label`` and ``scientific``, or the published layout: a JSON object a
            line with ``label`` and ``scientific_name``.

    Raises:
        RecipeError: The file cannot be read, a line lacks a value, or a label stands in it twice.
    """
    names: dict[str, str] = {}
    scientific_column = "scientific_name" if path.suffix == ".jsonl" else "scientific"
    for row in read_rows(path, error=RecipeError):
        for column in ("label", scientific_column):
            if column not in row.data and path.suffix != ".jsonl":
                raise RecipeError(f"{path}:1: the column '{column}' is missing; it needs label,scientific")
        label, scientific = row.data.get("label"), row.data.get(scientific_column)
        if not (isinstance(label, str) and isinstance(scientific, str) and label and scientific):
            raise row.problem((), "a line needs a label and a scientific name")
        if not (is_text(label) and is_text(scientific)):
            raise row.problem((), "the names must be texts without a lone surrogate")
        if label in names:
            raise row.problem((), f"the label {label!r} stands in the file twice")
        names[label] = scientific
    if not names:
        raise RecipeError(f"{path}: no label in it; it needs the columns label,scientific")
    return names


def target_text(label: str, *, target: Target, names: Mapping[str, str]) -> str:
    """The right answer for a clip with this label; ``NO_TARGET`` where it takes a name that the map lacks."""
    if target == "label":
        return label
    if label not in names:
        return NO_TARGET
    return names[label] if target == "scientific" else f"{names[label]} : {label}"


def candidates(labels: Iterable[str], *, target: Target, names: Mapping[str, str], where: str) -> list[str]:
    """The answers that can be right: the targets of the labels (at least one), each once, sorted.

    Raises:
        RecipeError: The map has none of the labels; ``where`` says of which cell.
    """
    labels = set(labels)
    texts = {target_text(label, target=target, names=names) for label in labels} - {NO_TARGET}
    if not texts:
        raise RecipeError(
            f"{where}: no scientific name for the label {min(labels)!r} or any other; give a map that has them "
            "(--label-map FILE)"
        )
    return sorted(texts)


def missing_names(labels: Sequence[str], *, target: Target, names: Mapping[str, str]) -> str | None:
    """What a user must be told about labels, one for each clip, that have no target; None where each has one."""
    clips = [] if target == "label" else [label for label in labels if label not in names]
    if not clips:
        return None
    missing = sorted(set(clips))
    shown = "; ".join(missing[:3]) + ("; ..." if len(missing) > 3 else "")
    return (
        f"no scientific name for {len(missing)} of {len(set(labels))} labels ({shown}): every answer about their clips "
        f"({len(clips)} of {len(labels)}) counts as wrong; a label map that has them changes that"
    )
