"""The journal of an archive: which windows of which recordings are answered, in one SQLite file, kill by kill."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bio.audio.recording import decoder
from mergekit_bio.errors import OutputError, RunError
from mergekit_bio.listen.asking import AnsweredWindow
from mergekit_bio.listen.reading import Ended, OpenRecording, content_of, place_of, stamp_of
from mergekit_bio.listen.selected import Span
from mergekit_bio.outside_data import changes

_FORMAT = 1
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE recordings (
    id INTEGER PRIMARY KEY,
    place BLOB NOT NULL UNIQUE,  -- its absolute path, which need not be text
    path BLOB NOT NULL,          -- as its user names it
    position INTEGER NOT NULL,   -- among the recordings that are named now, else -1
    stamp TEXT NOT NULL,         -- what changes with the file
    state TEXT NOT NULL,         -- open, heard or failed
    seconds REAL,
    sampling_rate INTEGER,
    error TEXT,
    decoder TEXT
);
CREATE TABLE windows (
    recording INTEGER NOT NULL REFERENCES recordings (id),
    number INTEGER NOT NULL,
    start REAL NOT NULL,
    "end" REAL NOT NULL,
    answer TEXT,                 -- none where a window was not asked about
    probability REAL,
    others TEXT NOT NULL,
    PRIMARY KEY (recording, number)
) WITHOUT ROWID;
"""
#: The columns of :class:`HeardRecording`.
_HEARD = (
    "SELECT id, path, state, seconds, sampling_rate, error, "
    "(SELECT count(answer) FROM windows WHERE recording = recordings.id) AS answered FROM recordings"
)


@dataclass(frozen=True)
class Row:
    """An answered window, as tables show it.

    Attributes:
        recording: The file, as its user named it.
        start: Where the window begins in it, in seconds, and ``end`` where it ends.
        answer: The model's words, or the likeliest choice.
        probability: Of the choice.
        others: The next likeliest choices, with their probabilities.
    """

    recording: str
    start: float
    end: float
    answer: str
    probability: float | None = None
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class HeardRecording:
    """A recording as the journal knows it.

    Attributes:
        number: Its key in the journal.
        path: The file, as its user named it.
        state: ``"open"``, ``"heard"`` or ``"failed"``.
        seconds: How long it is, as far as it was heard; None before its end.
        sampling_rate: Its own, in Hz.
        error: Why it is no use, or not from some second on.
        windows: How many of its windows are answered.
    """

    number: int
    path: str
    state: str
    seconds: float | None
    sampling_rate: int | None
    error: str | None
    windows: int


class Journal:
    """What is answered already. Everything that is added together is there together, whatever kills the process.

    Args:
        file: The SQLite file; None keeps all in memory.
        identity: What decides the answers, nested by key, as values of JSON.
        unsaid: What an older journal that lacks a key of the identity meant.
        overwrite: Forget all answers.
        least_probability: Choices that are less likely stay in the journal and are not among its rows.

    Raises:
        RunError: The file answers another question (the error names what changed), is written by another process, or
            is no journal.
        OutputError: It cannot be written.
    """

    def __init__(
        self,
        file: Path | None,
        identity: Mapping[str, Any],
        *,
        unsaid: Mapping[str, Any],
        overwrite: bool = False,
        least_probability: float = 0.0,
    ) -> None:
        self.file, self._least_probability = file, least_probability
        with self._problems():
            self._db = sqlite3.connect(file or ":memory:", isolation_level=None, timeout=0.2)
        try:
            with self._problems():
                self._open(json.loads(json.dumps(identity)), json.loads(json.dumps(unsaid)), overwrite)
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    def _open(self, identity: dict[str, Any], unsaid: dict[str, Any], overwrite: bool) -> None:
        # The lock is the system's, so it ends with its process; without shared memory it works on network disks too.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        with self._together():
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                facts = {"format": _FORMAT, "identity": identity}
                self._db.executemany(
                    "INSERT INTO facts VALUES (?, ?)", [(name, json.dumps(value)) for name, value in facts.items()]
                )
                return
            if not {"facts", "recordings", "windows"} <= tables:
                raise RunError(f"{self.file}: is no journal of answers; move it away, or give another --out")
            before = {name: json.loads(value) for name, value in self._db.execute("SELECT name, value FROM facts")}
            if before.get("format") != _FORMAT:
                raise RunError(f"{self.file}: was written by another version; give another --out")
            answered_under = unsaid | before["identity"]
            if overwrite:
                self._db.execute("DELETE FROM windows")
            elif answered_under != identity and self._db.execute("SELECT 1 FROM windows LIMIT 1").fetchone():
                raise RunError(
                    f"{self.file}: answers another question: {changes(answered_under, identity)}; ask as before, or "
                    "give another --out (or --overwrite)"
                )
            # What failed under another question, such as for want of a channel, may do under this one.
            if overwrite or answered_under != identity:
                self._db.execute("UPDATE recordings SET position = -1, stamp = '', state = 'open', error = NULL")
            self._db.execute("UPDATE facts SET value = ? WHERE name = 'identity'", (json.dumps(identity),))

    def open_recordings(
        self, paths: Sequence[str | Path], windows: Mapping[Path, tuple[Span, ...]] | None = None
    ) -> tuple[list[OpenRecording], int]:
        """Which of these recordings have windows that are not answered, in their order.

        One that has changed since is to be heard anew. One that failed is only tried again once it, the permission to
        read it, or what decodes it has changed.

        Args:
            paths: The recordings.
            windows: Which windows of each are wanted; a recording of which others are wanted has changed.

        Returns:
            Them, and how many of them were answered before and have changed.
        """
        still_open: list[OpenRecording] = []
        changed = 0
        with self._problems(), self._together():
            self._db.execute("UPDATE recordings SET position = -1")
            for position, path in enumerate(map(str, paths)):
                stamp, size = stamp_of(path)
                wanted = None if windows is None else windows[Path(path)]
                if wanted is not None:
                    stamp += f" {hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]}"
                place = _place(path)
                known = self._db.execute(
                    "SELECT id, stamp, state, decoder FROM recordings WHERE place = ?", (place,)
                ).fetchone()
                if known is None:
                    self._db.execute(
                        "INSERT INTO recordings (place, path, position, stamp, state) VALUES (?, ?, ?, ?, 'open')",
                        (place, os.fsencode(path), position, stamp),
                    )
                    still_open.append(OpenRecording(path, 0, size, wanted))
                    continue
                number, stamp_before, state, decoded_by = known
                values = (os.fsencode(path), position, stamp, number)
                self._db.execute("UPDATE recordings SET path = ?, position = ?, stamp = ? WHERE id = ?", values)
                is_other = content_of(stamp) != content_of(stamp_before)
                if is_other or (state == "failed" and (stamp != stamp_before or decoded_by != decoder())):
                    answered = self._db.execute("DELETE FROM windows WHERE recording = ?", (number,)).rowcount
                    changed += answered > 0 and is_other
                    state = "open"
                if state == "open":
                    self._db.execute("UPDATE recordings SET state = 'open', error = NULL WHERE id = ?", (number,))
                    counted = "SELECT coalesce(max(number) + 1, 0) FROM windows WHERE recording = ?"
                    (first,) = self._db.execute(counted, (number,)).fetchone()
                    still_open.append(OpenRecording(path, first, size, wanted))
        return still_open, changed

    def add(self, windows: Iterable[AnsweredWindow], ended: Iterable[Ended]) -> None:
        """Write down answers, and recordings that have been heard.

        Raises:
            OutputError: The disk is full or refuses. What was added before stays.
        """
        with self._problems(), self._together():
            for window in windows:
                answer = window.answer
                self._db.execute(
                    "INSERT INTO windows SELECT id, ?, ?, ?, ?, ?, ? FROM recordings WHERE place = ?",
                    (
                        window.number, window.start, window.end, answer.text, answer.probability,
                        json.dumps(answer.others), _place(window.recording),
                    ),
                )  # fmt: skip
            for recording in ended:
                state = "open" if recording.passing else "failed" if recording.error else "heard"
                self._db.execute(
                    "UPDATE recordings SET state = ?, seconds = ?, sampling_rate = ?, error = ?, decoder = ? "
                    "WHERE place = ?",
                    (
                        state, recording.seconds, recording.sampling_rate, recording.error, decoder(),
                        _place(recording.recording),
                    ),
                )  # fmt: skip

    def recordings(self) -> Iterator[HeardRecording]:
        """Those that are named now, in order."""
        for number, path, *others in self._db.execute(f"{_HEARD} WHERE position >= 0 ORDER BY position"):
            yield HeardRecording(number, os.fsdecode(path), *others)

    def unanswered(self) -> Iterator[HeardRecording]:
        """Those without an answered window, named now or not."""
        for number, path, *others in self._db.execute(f"SELECT * FROM ({_HEARD}) WHERE answered = 0"):
            yield HeardRecording(number, os.fsdecode(path), *others)

    def others(self) -> int:
        """How many it has answers about, which are not named now: they are in no table."""
        found = "SELECT count(*) FROM recordings WHERE position < 0 AND id IN (SELECT recording FROM windows)"
        (count,) = self._db.execute(found).fetchone()
        return int(count)

    def claim(self, out: Path, *, overwrite: bool) -> None:
        """Remember that a table is written from here.

        Raises:
            OutputError: There is a file that is not, and is not to be overwritten.
        """
        name = out.name  # they may move together
        with self._problems(), self._together():
            found = self._db.execute("SELECT value FROM facts WHERE name = 'tables'").fetchone()
            tables = json.loads(found[0]) if found else []
            if name not in tables:
                if out.is_file() and not overwrite:
                    raise OutputError(f"{out}: exists already; choose another --out or pass --overwrite")
                self._db.execute("INSERT OR REPLACE INTO facts VALUES ('tables', ?)", (json.dumps([*tables, name]),))

    def recording(self, path: str | Path) -> HeardRecording:
        """One that it knows."""
        number, shown, *others = self._db.execute(f"{_HEARD} WHERE place = ?", (_place(path),)).fetchone()
        return HeardRecording(number, os.fsdecode(shown), *others)

    def rows(self, recording: HeardRecording | None = None) -> Iterator[Row]:
        """Answers about the recordings that are named now, or about one, as far as they are likely enough, in order."""
        if recording is None:
            for each in self.recordings():
                yield from self.rows(each)
            return
        where = "recording = ? AND answer IS NOT NULL AND coalesce(probability, 1) >= ?"
        columns = 'start, "end", answer, probability, others'
        found = self._db.execute(
            f"SELECT {columns} FROM windows WHERE {where} ORDER BY number",
            (recording.number, self._least_probability),
        )
        for start, end, answer, probability, others in found:
            next_likeliest = tuple((text, value) for text, value in json.loads(others))
            yield Row(recording.path, start, end, answer, probability, next_likeliest)

    def is_shown(self, row: Row) -> bool:
        """Whether a row is among :meth:`rows`."""
        return row.probability is None or row.probability >= self._least_probability

    def not_shown(self, recording: HeardRecording) -> tuple[int, int]:
        """How many windows of a recording were not asked about, and how many answers are not likely enough."""
        counts: tuple[int, int] = self._db.execute(
            "SELECT count(*) - count(answer), coalesce(sum(probability < ?), 0) FROM windows WHERE recording = ?",
            (self._least_probability, recording.number),
        ).fetchone()
        return counts

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A transaction, which ends with the block."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.rollback()
            raise
        self._db.commit()

    @contextmanager
    def _problems(self) -> Iterator[None]:
        """SQLite's errors in a user's words."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = error.sqlite_errorname if isinstance(getattr(error, "sqlite_errorname", None), str) else ""
            if code.startswith("SQLITE_BUSY"):
                raise RunError(
                    f"{self.file}: another process is writing it; wait for it, or give another --out"
                ) from error
            if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
                raise RunError(
                    f"{self.file}: is no journal, or a damaged one; move it away, or give another --out"
                ) from error
            if code.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
                raise OutputError(f"cannot write {self.file}: {error}; run the command again to go on") from error
            raise


def _place(path: str | Path) -> bytes:
    return os.fsencode(place_of(path))
