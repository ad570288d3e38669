"""``mergekit-bio recipes``: the evaluation recipes that come with the package."""

from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, show or copy the recipes that come with the package."
)


@app.command("list", short_help="List the recipes.")
def list_recipes(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the recipes: name, what it is for, number of queries and checkpoints.

    \b
    Examples:
      mergekit-bio recipes list
      mergekit-bio recipes list --json
    """
    from mergekit_bio.eval.recipe.schema import load_recipe
    from mergekit_bio.eval.recipe.shipped import purpose, shipped_recipes

    recipes = {name: load_recipe(file).recipe for name, file in shipped_recipes().items()}

    def table(console: "Console") -> None:
        from rich import box
        from rich.table import Table

        rows = Table("recipe", "what it asks", "queries", "alphas", box=box.SIMPLE_HEAD)
        for name, recipe in recipes.items():
            if recipe.merge:  # the others, the demo's, ask what only the demo makes
                queries = str(len(recipe.queries) or "own")
                rows.add_row(name, purposes[name], queries, str(len(recipe.merge.strengths)))
        console.print(rows)
        demo = ", ".join(name for name, recipe in recipes.items() if not recipe.merge)
        console.print(f"and the demo's, where mergekit-bio demo --out has made their sweep: {demo}")

    purposes = {name: purpose(file) for name, file in shipped_recipes().items()}
    document = [
        {
            "name": name, "purpose": purposes[name], "file": str(file),
            "datasets": [choice.name for choice in recipes[name].datasets],
        }
        for name, file in shipped_recipes().items()
    ]  # fmt: skip
    Output(as_json=as_json, quiet=quiet).result(document, table, recipes)


@app.command("show", short_help="Print a recipe, checked, with its defaults.")
def show_recipe(
    recipe: Annotated[str, typer.Argument(help="The name of a recipe, or a YAML file.")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print a recipe as it is understood: checked, defaults filled in, the reference's format translated.

    \b
    Examples:
      mergekit-bio recipes show watkins
      mergekit-bio recipes show my_recipe.yaml --json
    """
    from dataclasses import asdict

    from mergekit_bio.errors import RecipeError
    from mergekit_bio.eval.recipe.schema import load_recipe
    from mergekit_bio.eval.recipe.shipped import find_recipe
    from mergekit_bio.outside_data import read_yaml, to_yaml

    output = Output(as_json=as_json, quiet=quiet)
    file = find_recipe(recipe)
    loaded = load_recipe(file)
    for note in loaded.notes:
        output.note(f"note: {note}")
    resolved = asdict(loaded.recipe)
    # What is printed is a recipe again, wherever it is saved: a label map is the path of a file.
    label_map = read_yaml(file, error=RecipeError).data.get("label_map")
    as_recipe = resolved | {"label_map": str((file.parent / label_map).resolve()) if label_map else None}
    as_recipe = {key: value for key, value in as_recipe.items() if key != "label_map" or value}
    text = to_yaml(as_recipe)
    output.result({"recipe": as_recipe}, lambda console: console.print(text, soft_wrap=True), text.splitlines())


@app.command("copy", short_help="Copy a recipe, to start your own from.")
def copy_recipe(
    recipe: Annotated[str, typer.Argument(help="The name of a recipe.")],
    # A text, because a path has no slash at its end.
    destination: Annotated[
        str, typer.Argument(metavar="PATH", help="A file, or a folder: one that exists, or a name with a / at its end.")
    ] = ".",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy a recipe, and the label map it uses, to start one's own from.

    \b
    Examples:
      mergekit-bio recipes copy closed_set
      mergekit-bio recipes copy watkins my_whales.yaml
    """
    from mergekit_bio.eval.recipe.shipped import copy_shipped

    files = [str(file) for file in copy_shipped(recipe, destination)]
    Output(as_json=as_json, quiet=quiet).result(
        {"files": files}, lambda console: console.print("\n".join(files), soft_wrap=True), files
    )
