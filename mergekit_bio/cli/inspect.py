"""``mergekit-bio inspect``: what is in a model or adapter."""

from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import Output, human_bytes
from mergekit_bio.cli.options import JsonOption, QuietOption

if TYPE_CHECKING:
    from rich.console import Console


def inspect(
    source: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="Directory, or hub id[@revision].")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what a model or adapter is: kind, tensors, ranks, targets, audio tower, licence. Reads headers only.

    \b
    Examples:
      mergekit-bio inspect EarthSpeciesProject/NatureLM-audio
      mergekit-bio inspect merged/NatureLM-audio-alpha-0.50 --json
    """
    from mergekit_bio.adapter.inspect import inspect as look
    from mergekit_bio.checkpoint.source import resolve

    found = look(resolve(source))

    def draw(console: "Console") -> None:
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(found.source.name, found.kind)
        for dtype, (count, elements) in found.tensors.items():
            weights = f"{elements / 1e6:,.1f} M" if elements >= 1e5 else f"{elements:,}"
            table.add_row(dtype, f"{count} tensor{'s' * (count != 1)}, {weights} weights")
        table.add_row("files", f"{found.files}, {human_bytes(found.nbytes)}")
        for name, value in found.facts.items():
            table.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        console.print(table)

    document = {
        "source": found.source.given, "path": str(found.source.path), "revision": found.source.revision,
        "kind": found.kind, "files": found.files, "bytes": found.nbytes,
        "tensors": {dtype: {"count": n, "elements": size} for dtype, (n, size) in found.tensors.items()}, **found.facts,
    }  # fmt: skip
    Output(as_json=as_json, quiet=quiet).result(document, draw, lines=[found.kind])
