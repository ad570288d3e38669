"""Where the recipes and label maps are that come with the package."""

from pathlib import Path


def recipe_folder() -> Path:
    """Where the recipes that come with the package are: inside it, or beside it in a checkout of the repository."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"
