"""Going through recordings one by one: what cannot be used is named and counted, and the others are done."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mergekit_bio.cli.console import Output


def hear_each(recordings: Sequence[Path], hear: Callable[[Path], object], output: Output) -> dict[str, str]:
    """Call ``hear`` with every recording.

    Returns:
        What is wrong with those that could not be used, at all or to their end: recording -> message.
    """
    from mergekit_bio.errors import AudioError

    failed: dict[str, str] = {}
    several = len(recordings) > 1
    with output.progress("listening", total=len(recordings)) as advance:
        for recording in recordings:
            try:
                hear(recording)
            except AudioError as error:
                failed[str(recording)] = str(error)
                if several:
                    output.note(f"skipped: {error}")
            advance(1)
    if failed and several:
        output.note(f"{len(failed)} of {len(recordings)} recordings could not be used")
    return failed


def check_any_used(recordings: Sequence[Path], failed: Mapping[str, str]) -> None:
    """Raise AudioError where ``failed`` holds every recording."""
    from mergekit_bio.errors import AudioError

    if all(str(recording) in failed for recording in recordings):
        first = next(iter(failed.values()))
        several = f"none of the {len(recordings)} recordings could be used; the first: "
        raise AudioError(f"{several if len(recordings) > 1 else ''}{first}")
