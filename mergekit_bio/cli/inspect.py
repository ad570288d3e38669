"""``mergekit-bio inspect``: what is in a model or adapter."""

from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption, human_bytes

if TYPE_CHECKING:
    from rich.console import Console

#: What the table says in its first lines; the rest is drawn as it is.
_DRAWN_ABOVE = {"source", "path", "revision", "kind", "files", "bytes", "tensors"}


def inspect(
    source: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="Directory, or hub id[@revision].")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what a model or adapter is: kind, tensors, ranks, targets, audio tower, licence. Reads headers only.

    \b
    Examples:
      mergekit-bio inspect EarthSpeciesProject/NatureLM-audio
      mergekit-bio inspect merged/half --json
    """
    from mergekit_bio.adapter.inspect import inspect as describe
    from mergekit_bio.checkpoint.source import resolve

    resolved = resolve(source)
    contents = describe(resolved)

    def draw(console: "Console") -> None:
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(resolved.name, contents["kind"])
        for dtype, held in contents["tensors"].items():
            count, elements = held["count"], held["elements"]
            weights = f"{elements / 1e6:,.1f} M" if elements >= 1e5 else f"{elements:,}"
            table.add_row(dtype, f"{count} tensor{'s' * (count != 1)}, {weights} weights")
        table.add_row("files", f"{contents['files']}, {human_bytes(contents['bytes'])}")
        for name, value in contents.items():
            if name in _DRAWN_ABOVE:
                continue
            table.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        console.print(table)

    Output(as_json=as_json, quiet=quiet).result(contents, draw, lines=[contents["kind"]])
