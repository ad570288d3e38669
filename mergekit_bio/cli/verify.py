"""``mergekit-bio verify``: check a merged checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption, table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A merged checkpoint, or a sweep of them.")],
    against_sources: Annotated[
        bool,
        typer.Option("--against-sources", help="Compare copies byte by byte and fold every tensor again in float64."),
    ] = False,
    base: Annotated[str | None, typer.Option(metavar="DIR|ID", help="Where the base is now, if it has moved.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="DIR|ID", help="Where the adapters are now, in their order.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check that a checkpoint is complete and just what the merge wrote.

    \b
    Examples:
      mergekit-bio verify merged/half
      mergekit-bio verify sweep/alpha-0.30 --against-sources
    """
    from mergekit_bio.checkpoint.directory import Checkpoint
    from mergekit_bio.checkpoint.manifest import MANIFEST, checkpoints_of_sweep
    from mergekit_bio.merging.verify import verify as check

    output = Output(as_json=as_json, quiet=quiet)
    sweep = checkpoints_of_sweep(directory)
    for nested in (folder for folder in sorted(directory.glob("[!.]*/")) if sweep and folder not in sweep):
        if inside := checkpoints_of_sweep(nested):
            output.warn(f"note: left out: {nested}, {len(inside)} checkpoints; verify it by its name")
    results = []
    for folder in sweep or [directory]:
        total = Checkpoint.open(folder).nbytes if (folder / MANIFEST).exists() else 0
        with output.progress(f"verifying {folder.name}", total, unit="bytes") as advance:
            results.append(
                check(folder, against_sources=against_sources, base=base, adapters=adapter, progress=advance)
            )

    def draw(console: "Console") -> None:
        columns = ("files", "hashes right") + (("copied", "folded again", "last places off") if against_sources else ())
        table = table_of_numbers(f"{directory}: as merged", "checkpoint", *columns)
        for result in results:
            row: list[object] = [result.files, result.hashed]
            row += [result.copied, result.recomputed, f"{result.worst_ulp or 0:.3f}"] if against_sources else []
            table.add_row(result.directory.name, *map(str, row))
        console.print(table)

    documents = [{**asdict(result), "directory": str(result.directory)} for result in results]
    output.result(documents if sweep else documents[0], draw, lines=[str(result.directory) for result in results])
