"""A small archive, and what asks about it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from mergekit_bio.engine.interface import EngineSettings
from mergekit_bio.listen.answering import AskRequest, Outcome, ask_archive
from mergekit_bio.listen.progress import Standing
from mergekit_bio.listen.question import Question

QUESTION = Question(prompt="Which species is it?", num_beams=1, max_new_tokens=4)
#: Name, seconds, rate and channels of each; their windows are of 10 s.
RECORDINGS = (
    ("a.wav", 3, 16_000, 1),
    ("site 1/b.flac", 25, 8_000, 1),
    ("site 1/c.wav", 30, 44_100, 2),
    ("site 2/b.flac", 11, 22_050, 1),
)
#: (Recording, start, end) of every window.
WINDOWS = [
    ("a.wav", 0, 3),
    *(("site 1/b.flac", start, min(start + 10, 25)) for start in (0, 10, 20)),
    *(("site 1/c.wav", start, start + 10) for start in (0, 10, 20)),
    *(("site 2/b.flac", start, min(start + 10, 11)) for start in (0, 10)),
]


def write_recording(file: Path, seconds: float, rate: int = 16_000, channels: int = 1, *, seed: int | None = None):
    """Tones in noise, another in every file of another name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(sum(file.name.encode()) if seed is None else seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = generator.uniform(300, 3000) * (1 + 0.2 * np.sin(2 * np.pi * time / 4))
    samples = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / rate) + generator.normal(0, 0.02, time.size)
    soundfile.write(file, np.stack([samples] * channels, axis=1), rate)


def write_archive(folder: Path) -> Path:
    for name, seconds, rate, channels in RECORDINGS:
        write_recording(folder / name, seconds, rate, channels)
    return folder


class Listening:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.failures: dict[str, str | None] = {}
        self.heard: list[Standing] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def failed(self, recording) -> None:
        self.failures[recording.recording] = recording.error

    def standing(self, standing: Standing) -> None:
        self.heard.append(standing)


def ask(model: Path, folder: Path, out: Path | None = None, *, listener=None, answered=None, **more) -> Outcome:
    """Ask about a folder as the command does, by default with Transformers in float32."""
    from mergekit_bio.audio.finding import find_recordings

    settings = EngineSettings(options={"dtype": "float32", "device": "cpu"})
    values = {"question": QUESTION, "engine": "transformers", "settings": settings} | more
    request = AskRequest(model=str(model), named=[folder], out=out, **values)
    collected: dict = {} if answered is None else {"answered": answered}
    return ask_archive(request, find_recordings([folder]).recordings, listener or Listening(), **collected)


def rows_without_a_table(model: Path, folder: Path, **more) -> list[tuple]:
    """(Path, start, end, answer) of every window, as they come."""
    rows: list[tuple] = []

    def answered(new: Sequence) -> None:
        rows.extend((row.recording, row.start, row.end, row.answer) for row in new)

    ask(model, folder, answered=answered, **more)
    return rows
