"""Going through recordings one by one: what cannot be used is named and counted, and the others are done."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mergekit_bio.cli.console import Output


def hear_each(recordings: Sequence[Path], hear: Callable[[Path], object], output: Output) -> dict[str, str]:
    """Call ``hear`` with every recording.

    Returns:
        What is wrong with those that could not be used: recording -> message.

    Raises:
        AudioError: None could be used.
    """
    from mergekit_bio.errors import AudioError

    failed: dict[str, str] = {}
    with output.progress("listening", total=len(recordings)) as advance:
        for recording in recordings:
            try:
                hear(recording)
            except AudioError as error:
                if len(recordings) == 1:
                    raise
                failed[str(recording)] = str(error)
                output.note(f"skipped: {error}")
            advance(1)
    if failed:
        output.note(f"{len(failed)} of {len(recordings)} recordings could not be used")
    if len(failed) == len(recordings):
        first = next(iter(failed.values()))
        raise AudioError(f"none of the {len(recordings)} recordings could be used; the first: {first}")
    return failed
