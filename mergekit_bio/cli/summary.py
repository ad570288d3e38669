"""What an archive's answers add up to, as tables on a terminal."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.cli.console import table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console

    from mergekit_bio.listen.summary import Summary

#: Of a long list the first so many lines are shown, and so many letters of a recording's name.
SHOWN, NAME = 12, 40


def print_summary(summary: "Summary", console: "Console") -> None:
    """How often each answer was given, in how many recordings and on how many days; then by day, and by recording."""
    from mergekit_bio.listen.summary import shortened

    several, days = len(summary.recordings) > 1, bool(summary.days)
    columns = ["answer", "windows", *["recordings"] * several, *["days"] * days]
    table = table_of_numbers("", *columns, box=None, padding=(0, 2, 0, 0))
    for answer, windows in summary.answers.most_common(SHOWN):
        in_recordings = [f"{summary.recordings_with(answer):,}"] * several
        table.add_row(shortened(answer), f"{windows:,}", *in_recordings, *[f"{summary.days_with(answer):,}"] * days)
    if summary.answers:
        console.print(table)
        _print_rest(len(summary.answers), "answers", console)
    if days:
        _print_counts("day", sorted(summary.days.items()), console)
    if several:
        names = _in_short([*summary.recordings])
        _print_counts("recording", [*zip(names, summary.recordings.values(), strict=True)], console)
    if summary.unlikely:
        console.print(f"{summary.unlikely:,} answers are left out: they are less likely than --min-probability")
    if summary.quiet:
        console.print(f"{summary.quiet:,} windows were not asked about: nothing in them is as loud as --skip-quiet")


def _print_counts(title: str, counts: Sequence[tuple[str, Counter[str]]], console: "Console") -> None:
    from rich.table import Table

    from mergekit_bio.listen.summary import in_words

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(title, no_wrap=True)
    table.add_column("answers", overflow="fold")
    for key, answers in counts[:SHOWN]:
        table.add_row(key, in_words(answers))
    console.print()
    console.print(table)
    _print_rest(len(counts), f"{title}s", console)


def _in_short(recordings: Sequence[str]) -> list[str]:
    """Recordings' names without the folder that all are in, and without the beginning of what is long."""
    from mergekit_bio.listen.tables.interface import as_text

    folder = os.path.commonpath([Path(recording).absolute().parent for recording in recordings])
    names = []
    for recording in recordings:
        name = as_text(os.path.relpath(recording, folder))
        names.append(name if len(name) <= NAME else "..." + name[3 - NAME :])
    return names


def _print_rest(count: int, things: str, console: "Console") -> None:
    if count > SHOWN:
        console.print(f"and {count - SHOWN:,} more {things}")
