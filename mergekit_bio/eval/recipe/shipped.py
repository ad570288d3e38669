"""The recipes and label maps that come with the package: where they are, how they are named and copied."""

import re
import shutil
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

from mergekit_bio.errors import OutputError, RecipeError
from mergekit_bio.eval.package_files import recipe_folder
from mergekit_bio.outside_data import nearest, read_yaml


def shipped_recipes() -> Mapping[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {file.stem: file for file in sorted(recipe_folder().glob("*.yaml"))}


def purpose(file: Path) -> str:
    """What a recipe is for: its first comment, up to the first full stop, colon or question mark."""
    comment = " ".join(line.strip("# ") for line in takewhile(re.compile("#.").match, file.read_text().splitlines()))
    return re.split(r"[.:](?=\s|$)|(?<=\?)(?=\s|$)", comment)[0]


def find_recipe(name: str) -> Path:
    """The file for what a user typed: a path, or the name of a recipe that comes with the package.

    ``recipes/closed_set.yaml`` works wherever the command is run.

    Raises:
        RecipeError: There is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    stem = path.stem if path.parent in (Path(), Path("recipes")) else name
    if stem in shipped:
        return shipped[stem]
    raise RecipeError(f"{name}: no such recipe{nearest(stem, list(shipped))}")


def find_label_map(path: Path) -> Path:
    """A label map that a user named: a file, or one that comes with the package."""
    shipped = recipe_folder() / "labels" / path.name
    return shipped if not path.exists() and path.parent == Path() and shipped.exists() else path


def copy_shipped(name: str, destination: str | Path) -> list[Path]:
    """Copy a recipe that comes with the package, with the label map and the folders it names that come with it.

    Args:
        name: One of ``shipped_recipes``.
        destination: A file to be, or a folder: one that is there, or a text that ends in a slash.

    Returns:
        The files made.

    Raises:
        RecipeError: There is no such recipe.
        OutputError: A file is there already, or cannot be written.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(f"{name}: no such recipe{nearest(name, list(shipped))}")
    source, target = shipped[name], Path(destination)
    if str(destination).endswith("/") or target.is_dir():
        target /= source.name
    copies = {target: source}
    content = read_yaml(source, error=RecipeError).data
    named = [choice["path"] for choice in content["datasets"] if isinstance(choice, dict)]
    if content.get("label_map") is not None:
        named.append(content["label_map"])
    for path in map(source.parent.joinpath, named):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []:
            copies[target.parent / file.relative_to(source.parent)] = file
    for new, old in copies.items():
        # What recipes name may be shared with one that was copied before.
        if new.exists() and (new == target or new.read_bytes() != old.read_bytes()):
            raise OutputError(f"{new} exists already; give another name")
    try:
        for new, old in copies.items():
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old, new)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from None
    return list(copies)
