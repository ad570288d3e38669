"""What a command prints: results on stdout (table, JSON or bare lines), everything else on stderr; and its options."""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the essential result, one item a line.")]

#: Tables are laid out for this many columns at most, wherever they go.
MAX_WIDTH = 100
#: Seconds between two lines of progress where there is no terminal.
LINE_EVERY = 60.0


def tell(text: str) -> None:
    """Print on stderr. A terminal gets lines that break between words."""
    if sys.stderr.isatty():
        wrapper = textwrap.TextWrapper(
            max(20, shutil.get_terminal_size().columns),
            subsequent_indent="  ",
            break_long_words=False,  # paths can be copied
            break_on_hyphens=False,
        )
        text = "\n".join(map(wrapper.fill, text.split("\n")))
    print(text, file=sys.stderr, flush=True)


class Output:
    """How one command talks: chosen by ``--json`` and ``--quiet``.

    Args:
        as_json: Print the result as one JSON document and nothing else on stdout.
        quiet: Print bare result lines, no notes and no progress.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        # A file name may hold what the terminal's encoding does not: it is shown escaped.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

    def note(self, text: str) -> None:
        """Say something to the person at the terminal (stderr); silent under ``--quiet``."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Say what a user must know even under ``--quiet`` (stderr). A terminal gets lines that break between words."""
        tell(text)

    def result(self, document: Any, render: Callable[["Console"], None], lines: Iterable[str] = ()) -> None:
        """Print what the command was run for (stdout).

        Args:
            document: The complete result, as JSON-serialisable values.
            render: Draws the human form on a rich console.
            lines: The essential result, for ``--quiet``.
        """
        if self.as_json:
            print(_json(document, sys.stdout.encoding or "utf-8"), flush=True)
        elif self.quiet:
            for line in lines:
                print(line, flush=True)
        else:
            render(stdout_console())

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "items") -> Iterator[Callable[[int], None]]:
        """A progress bar on stderr while the block runs; the value is called with each step's size.

        Drawn only on a terminal and not under ``--quiet``.

        Args:
            description: What is being done.
            total: The sum of all steps: bytes or items.
            unit: ``"bytes"`` shows sizes and a rate in bytes, anything else counts.
        """
        if self.quiet or not sys.stderr.isatty():
            yield lambda _: None
            return
        from rich import progress

        amount = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        columns = amount if unit == "bytes" else [progress.MofNCompleteColumn()]
        with progress_bars(*columns, progress.TimeElapsedColumn(), progress.TimeRemainingColumn()) as bars:
            task = bars.add_task(description, total=total)
            yield lambda step: bars.advance(task, step)


def _json(document: Any, encoding: str) -> str:
    """A document as it is, or with JSON's own escapes where the encoding lacks a character.

    A path whose bytes are no text is written as in tables, ``\\udcff`` for the byte ``ff``: strict readers of JSON
    refuse Python's half of a surrogate pair.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False)
    text = re.sub("[\ud800-\udfff]", lambda half: f"\\\\u{ord(half[0]):04x}", text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=2)
    return text


def progress_bars(*columns: "ProgressColumn", bar_width: int = 40) -> "Progress":
    """Bars on stderr that vanish at their end, with these columns behind the description and the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    description = TextColumn("{task.description}", markup=False)
    return Progress(description, BarColumn(bar_width), *columns, console=Console(stderr=True), transient=True)


def table_of_numbers(title: str, *columns: str, texts: int = 1, **style: Any) -> "Table":
    """A table whose first columns, ``texts`` of them, stand at the left, and all others at the right."""
    from rich.table import Table

    table = Table(title=title, **style)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < texts else "right", overflow="fold")
    return table


def stdout_console() -> "Console":
    """A rich console on stdout, at most ``MAX_WIDTH`` columns wide."""
    return _console(stderr=False)


def stderr_console() -> "Console":
    """The same on stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=False, markup=False, emoji=False)
    if not console.is_terminal or console.width > MAX_WIDTH:
        console.width = MAX_WIDTH
    return console


def human_rate(rate: float, things: str = "") -> str:
    """So many a second, or where that is less than one, a minute: ``"3.2 windows/s"``."""
    things = things and f" {things}"
    return f"{rate:.1f}{things}/s" if rate >= 1 else f"{60 * rate:.1f}{things}/min"


def time_left(seconds: float) -> str:
    """``725`` -> ``"0:12:05 left"``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} left"


def human_bytes(count: float) -> str:
    """``1536`` -> ``"1.5 kB"``: decimal units, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
