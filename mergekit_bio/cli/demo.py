"""``mergekit-bio demo``: the way of a merge, offline, on a small model."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mergekit_bio.cli.console import Output
from mergekit_bio.cli.options import JsonOption, QuietOption


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep everything in this new directory. [default: a temporary one]")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge a small model at five alphas, verify every one against its sources, and print what happened.

    Needs no network, no GPU and no token; the weights are random.

    \b
    Examples:
      mergekit-bio demo
      mergekit-bio demo --out demo/
    """
    from mergekit_bio.cli import merge, verify
    from mergekit_bio.errors import OutputError
    from mergekit_bio.merging.example import write_example

    output = Output(as_json=as_json, quiet=quiet)
    with tempfile.TemporaryDirectory(prefix="mergekit-bio-demo-") as scratch:
        folder = out or Path(scratch)
        if out is not None:
            try:
                out.mkdir(parents=True)
            except FileExistsError as error:
                raise OutputError(f"{out}: exists already; choose another --out") from error
        base, adapter = write_example(folder)
        sweep = folder / "sweep"
        output.note(
            f"A Llama-shaped base and a LoRA with random weights are in {folder}. Then, as for the real ones:\n"
        )
        output.note("$ mergekit-bio merge --base base --adapter adapter --alpha 0:1:0.25 --out sweep")
        quietly = quiet or as_json
        merge.merge(base=str(base), adapter=[str(adapter)], alpha=["0:1:0.25"], out=sweep, quiet=quietly)
        output.note("\n$ mergekit-bio verify sweep --against-sources")
        verify.verify(sweep, against_sources=True, as_json=as_json, quiet=quiet)
        output.note("\nThe same for NatureLM-audio: mergekit-bio merge --alpha 0:1:0.1")
