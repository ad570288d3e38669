"""The options of ``ask`` that say what may be answered, and about which windows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mergekit_bio.audio.finding import Found
    from mergekit_bio.listen.selected import Span

ChoicesOption = Annotated[
    str | None,
    typer.Option(
        "--choices",
        metavar="FILE",
        help="Answer with one of these, and say how likely it is among them: one a line, or a table's column "
        "(birds.csv:COLUMN).",
    ),
]
NoneOption = Annotated[bool, typer.Option("--none", help='Add "none of these" to the choices.')]
MinProbabilityOption = Annotated[
    float | None,
    typer.Option("--min-probability", min=0, max=1, metavar="P", help="Leave out, and count, choices below this."),
]
SkipQuietOption = Annotated[
    float | None,
    typer.Option(
        "--skip-quiet",
        metavar="DB",
        help="Do not ask about windows in which nothing is as loud as this, in dB of full scale, such as -60; they are "
        "counted.",
    ),
]
WindowsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--windows",
        metavar="TABLE",
        help="Ask about the windows in this table only: Raven's, Audacity's, or CSV with file,start,end. Several, or a "
        "folder of them, may be given.",
    ),
]
ClipsOption = Annotated[
    tuple[int, Path] | None,
    typer.Option("--clips", metavar="N DIR", help="Cut the N likeliest windows of each choice to files in DIR."),
]


def listed_choices(
    file: str | None,
    *,
    none: bool,
    min_probability: float | None,
    clips: tuple[int, Path] | None,
    note: Callable[[str], None],
) -> tuple[str, ...]:
    """The choices of ``--choices``; none where it is not given.

    Raises:
        PromptError: The list is no use, or what needs one is given without it.
        OutputError: The clips cannot go where they are to go.
    """
    from mergekit_bio.errors import OutputError, PromptError
    from mergekit_bio.listen.choices import read_choices
    from mergekit_bio.listen.clip_files import check_folder

    if file is None:
        given = {"none": none, "min-probability": min_probability is not None, "clips": clips is not None}
        for option in (option for option, is_given in given.items() if is_given):
            raise PromptError(f"--{option}: there is nothing to choose from; give a list with --choices FILE")
        return ()
    if clips is not None:
        if clips[0] < 1:
            raise OutputError(f"--clips {clips[0]}: cut at least one window of each answer")
        check_folder(clips[1])
    return read_choices(file, none=none, note=note)


def named_windows(
    tables: Sequence[Path], audio: Sequence[Path], *, window: float, hop: float
) -> "tuple[Found, dict[Path, tuple[Span, ...]]]":
    """The recordings that tables name windows of, and these windows. Its notes say what is refused or left out.

    Args:
        tables: What ``--windows`` names.
        audio: The recordings, and folders of them, that the tables may be about; none: those beside the tables, and
            others that they name by whole paths.
        window: Seconds that are heard at a time.
        hop: Seconds between windows.

    Raises:
        AudioError: A table is no use, or names nothing that can be asked about.
    """
    from mergekit_bio.audio.finding import Found, find_recordings
    from mergekit_bio.errors import AudioError
    from mergekit_bio.listen.selected import find_tables, select_windows

    files = find_tables(tables)
    beside: list[Path] = []
    for folder in dict.fromkeys(table.parent for table in files) if not audio else ():
        try:
            beside += find_recordings([folder]).recordings
        except AudioError:  # none there: the table names them by their paths
            continue
    found = find_recordings(audio) if audio else Found(beside, [])
    selected = select_windows(files, found.recordings, window=window, hop=hop, elsewhere=not audio)
    return Found([*selected.windows], [*found.notes, *selected.notes]), selected.windows
