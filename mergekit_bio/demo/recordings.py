"""Folders of recordings of the invented species, as a user's own would be: wav files and a metadata.csv."""

import csv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from mergekit_bio.demo.calls import SAMPLING_RATE, call
from mergekit_bio.demo.species import Species


def write_recordings(
    folder: Path,
    species: Sequence[Species],
    *,
    each: int,
    seed: int,
    label: Literal["common", "scientific"] = "common",
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Record ``each`` calls of every species into a new folder.

    It gets ``metadata.csv`` (file_name, label: the name that ``label`` says) and 16-bit wav files of 10 s at 16 kHz,
    whose sound ``seed`` decides. ``progress`` is called with 1 for each.
    """
    folder.mkdir(parents=True)
    calling = [kind for kind in species for _ in range(each)]
    seeds = np.random.SeedSequence(seed).spawn(len(calling))

    def record(number: int) -> tuple[str, str]:
        kind = calling[number]
        name = f"{kind.common.replace(' ', '-')}-{number % each:02d}.wav"
        clip = call(voice=kind.voice, phrase=kind.phrase, random=np.random.default_rng(seeds[number]))
        soundfile.write(folder / name, clip, SAMPLING_RATE)
        progress(1)
        return name, getattr(kind, label)

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(record, range(len(calling))))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "label"), *rows])
