"""Going through recordings one by one: what cannot be used is named and counted, and the others are done."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mergekit_bio.cli.console import Output


def hear_each(recordings: Sequence[Path], hear: Callable[[Path], object], output: Output) -> list[dict[str, str]]:
    """Call ``hear`` with every recording.

    Returns:
        Those that could not be used, at all or to their end: ``recording`` and ``error`` of each.
    """
    from mergekit_bio.errors import AudioError

    failed: list[dict[str, str]] = []
    several = len(recordings) > 1
    with output.progress("listening", total=len(recordings)) as advance:
        for recording in recordings:
            try:
                hear(recording)
            except AudioError as error:
                failed.append({"recording": str(recording), "error": str(error)})
                if several:
                    output.note(f"skipped: {error}")
            advance(1)
    if failed and several:
        output.note(f"{len(failed)} of {len(recordings)} recordings could not be used")
    return failed


def check_any_used(recordings: Sequence[Path], failed: Sequence[Mapping[str, str]]) -> None:
    """Raise AudioError where every recording has failed."""
    from mergekit_bio.errors import AudioError

    if len(failed) == len(recordings):
        several = f"none of the {len(recordings)} recordings could be used; the first: "
        raise AudioError(f"{several if len(recordings) > 1 else ''}{failed[0]['error']}")
