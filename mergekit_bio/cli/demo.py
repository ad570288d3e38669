"""``mergekit-bio demo``: the whole way, offline, on a small model that really hears."""

import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mergekit_bio.demo.run import Point


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep everything in this new directory. [default: a temporary one]")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="vllm or transformers. [default: vllm where it is installed]")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge a small model at eleven alphas, let every one listen to made-up animals, and draw the trade-off.

    No network, no GPU, no token. The model is a toy (a million weights, invented species), but its base follows
    instructions, its fine-tune hears, and the commands are the ones for Llama-3.1-8B and NatureLM-audio.

    \b
    Examples:
      mergekit-bio demo
      mergekit-bio demo --out demo/ --engine transformers
    """
    from mergekit_bio.cli.run_progress import RunOutput
    from mergekit_bio.demo import run
    from mergekit_bio.engine.choice import choose_engine
    from mergekit_bio.eval.records.read import read_runs
    from mergekit_bio.eval.report.build import build_report, to_document
    from mergekit_bio.eval.report.files import write_report
    from mergekit_bio.merging.merge import merge
    from mergekit_bio.merging.verify import verify

    output = Output(as_json=as_json, quiet=quiet)
    choose_engine(engine)  # one that is not there is said before anything is written
    # Off a terminal, forty-four cells of a second each would be forty-four lines.
    listener = RunOutput(quiet=quiet or as_json or not sys.stderr.isatty())
    stage = _Stages(output, kept=out is not None)
    with tempfile.TemporaryDirectory(prefix="mergekit-bio-demo-") as scratch:
        folder = out or Path(scratch) / "demo"
        typed = shlex.quote(str(folder))
        with stage("A base that follows instructions, a fine-tune that hears, and recordings of invented animals"):
            run.write_sources(folder, listener)
        with stage(
            "Merge at eleven alphas, in one pass",
            ["mergekit-bio merge", f"--base {typed}/base", f"--adapter {typed}/adapter", "--alpha 0:1:0.1",
             f"--out {typed}/sweep"],
            "mergekit-bio merge --alpha 0:1:0.1 --out sweep",
        ):  # fmt: skip
            merge(base=folder / "base", adapter=folder / "adapter", alphas=["0:1:0.1"], out=folder / "sweep")
        with stage(
            "Fold every tensor again, in float64",
            ["mergekit-bio verify", f"{typed}/sweep", "--against-sources"],
            "mergekit-bio verify sweep --against-sources",
        ):
            for checkpoint in sorted((folder / "sweep").iterdir()):
                verify(checkpoint, against_sources=True)
        with run.shared_engine(engine, folder, listener, quiet=quiet) as slot, listener.shown():
            for recipe in run.RECIPES:
                title, real = _ASKED[recipe]
                with stage(f"{title} ({slot.name})", ["mergekit-bio eval", f"{typed}/{recipe}.yaml"], real):
                    run.ask(recipe, folder, slot, listener)
        runs = [folder / "runs" / recipe for recipe in run.RECIPES]
        with stage(
            "Score, compare, draw",
            ["mergekit-bio report", f"{typed}/runs/*", f"--out {typed}/report"],
            "mergekit-bio report runs/*",
        ):
            report = build_report(read_runs(runs))
            page = write_report(report, folder / "report", progress=output.progress)[0]
        points = run.curve(report)
        output.note("")
        output.result(
            {"curve": [vars(point) for point in points], "report": to_document(report), "page": str(page)},
            lambda console: _print_curve(console, points),
            [f"{point.alpha:g} {point.accuracy[run.CLOSED][0]:.3f}" for point in points],
        )
        if out is not None:
            output.note(f"The page with every answer: {page}")
        else:
            output.note("To keep the model, the answers and the page: mergekit-bio demo --out demo/")


_BAR = 8
#: What the demo says fits a terminal of this many columns.
_WIDTH = 80
_INDENT = " " * 3
#: What a recipe asks, and what asks Llama-3.1-8B with NatureLM-audio the same.
_ASKED = {
    "demo_named": ("Ask what fine-tuning asked", "mergekit-bio eval watkins --model sweep"),
    "demo": ("Ask to pick species it never heard from a list", "mergekit-bio eval closed_set --model sweep"),
    "demo_combined": ("Ask for both names in one answer", "mergekit-bio eval watkins --model sweep"),
    "demo_in_context": ("Ask with audio examples", "mergekit-bio eval in_context_1 --model sweep"),
}


class _Stages:
    """Says what comes, the command for it, the command for the real model, and how long it took.

    Only the command for the real model is shown where what the other one names is not ``kept``.
    """

    def __init__(self, output: Output, *, kept: bool) -> None:
        self._output, self._kept = output, kept
        self._count = 0

    @contextmanager
    def __call__(self, title: str, command: "Sequence[str]" = (), real: str = "") -> Iterator[None]:
        """One stage; a line may break between the parts of ``command``."""
        self._count += 1
        self._output.note("\n" + textwrap.fill(f"{self._count}. {title}", _WIDTH, subsequent_indent=_INDENT))
        if command and self._kept:
            self._output.note(_command_lines(command))
        if real:
            self._output.note(f"{_INDENT}for the 8B model: $ {real}")
        start = time.perf_counter()
        yield
        self._output.note(f"{_INDENT}{time.perf_counter() - start:.1f} s")


def _command_lines(parts: "Sequence[str]") -> str:
    """A command as a shell takes it, over as many lines as it needs."""
    lines = [f"{_INDENT}$ {parts[0]}"]
    for part in parts[1:]:
        if len(f"{lines[-1]} {part} \\") <= _WIDTH:
            lines[-1] += f" {part}"
        else:
            lines.append(f"{_INDENT}    {part}")
    return " \\\n".join(lines)


def _print_curve(console: "Console", points: "Sequence[Point]") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mergekit_bio.demo.run import CLOSED, COMBINED, IN_CONTEXT, NAMED

    table = Table(
        title="Exact answers, with 95% intervals", title_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("alpha", justify="right")
    table.add_column("picks species it\nnever heard\nfrom a list", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_BAR)
    table.add_column("keeps\nto the\nlist", no_wrap=True, justify="right")
    table.add_column("names\nheard\nones", no_wrap=True, justify="right")
    table.add_column("gives both\nnames in one\nanswer", no_wrap=True)
    table.add_column("learns\nfrom\nclips", no_wrap=True, justify="right")
    best = {recipe: max(point.accuracy[recipe][0] for point in points) for recipe in points[0].accuracy}

    def shown(point: "Point", recipe: str, *, interval: bool = False) -> Text:
        value, low, high = point.accuracy[recipe]
        text = f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if interval else "")
        return Text(text, style="bold" if value == best[recipe] else "")

    for point in points:
        bar = "\N{FULL BLOCK}" * round(_BAR * point.accuracy[CLOSED][0])
        table.add_row(
            f"{point.alpha:.1f}", shown(point, CLOSED, interval=True), Text(bar, style="cyan"), f"{point.in_set:.2f}",
            shown(point, NAMED), shown(point, COMBINED, interval=True), shown(point, IN_CONTEXT),
        )  # fmt: skip
    console.print(table)
