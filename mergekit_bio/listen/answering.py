"""A question about an archive, from recordings to a table: answered as it goes, and gone on with where it stopped."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.decoding import Note
from mergekit_bio.audio.recording import read_parts, read_windows
from mergekit_bio.audio.waveform import MIN_SECONDS
from mergekit_bio.checkpoint.identity import merge_strength, weights_identity
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.choice import choose_engine
from mergekit_bio.engine.interface import EngineSettings, Prompt
from mergekit_bio.engine.pool import OneWorker, Workers
from mergekit_bio.engine.ray_pool import cluster_for
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.errors import AudioError, OutputError
from mergekit_bio.listen.asking import AnsweredWindow, ListenWorker, OwnEngine, answers_to
from mergekit_bio.listen.clip_files import Likeliest, write_clips
from mergekit_bio.listen.journal import HeardRecording, Journal, Row
from mergekit_bio.listen.progress import Listener, RecordingCounter
from mergekit_bio.listen.question import Question
from mergekit_bio.listen.reading import OpenRecording, each_once
from mergekit_bio.listen.selected import Span
from mergekit_bio.listen.stretches import Heard, Stretch, hear_all
from mergekit_bio.listen.summary import Summary
from mergekit_bio.listen.tables.choice import is_folder, journal_file, table_class
from mergekit_bio.listen.tables.interface import About, Table, time_of


@dataclass(frozen=True, kw_only=True)
class AskRequest:
    """What a user asks for.

    Attributes:
        model: A merged directory, a hub id, or the name that servers know it by.
        named: What the user named: files, and folders of them.
        question: What is asked about every window.
        engine: The engine's name; None takes the first that is installed, or that asks servers.
        settings: What it is started with.
        out: The table, a file or a folder; None keeps no answers on the disk.
        table_format: ``--format``.
        overwrite: Ask anew, and replace the table.
        workers: See :func:`mergekit_bio.engine.ray_pool.cluster_for`.
        ray: Of a running cluster.
        windows: Start and end of each recording's windows, in seconds; None for the whole recordings.
        least_probability: Choices that are less likely are left out of what is shown and written.
        clips: How many of the likeliest windows of each answer are cut to files, and the folder for them.
    """

    model: str
    named: Sequence[Path]
    question: Question
    engine: str | None = None
    settings: EngineSettings = field(default_factory=EngineSettings)
    out: Path | None = None
    table_format: str | None = None
    overwrite: bool = False
    workers: int | None = None
    ray: str | None = None
    windows: Mapping[Path, tuple[Span, ...]] | None = None
    least_probability: float = 0.0
    clips: tuple[int, Path] | None = None


@dataclass(frozen=True)
class Outcome:
    """What has come of it.

    Attributes:
        recordings: How many were asked about.
        windows: How many of their windows are answered, now or before.
        failed: Those that are no use, each with its error.
        broken: Those that were heard up to where they break.
        summary: What the answers add up to.
        clips: How many windows were cut to files.
        clips_error: Why not all of them could be; None where they could.
    """

    recordings: int
    windows: int
    failed: dict[str, str]
    broken: dict[str, str]
    summary: Summary
    clips: int = 0
    clips_error: str | None = None


def ask_archive(
    request: AskRequest,
    recordings: Sequence[Path],
    listener: Listener,
    *,
    answered: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> Outcome:
    """Ask about every window of every recording that is not answered yet, and write the answers down as they come.

    Args:
        request: What is asked, of whom, and where it goes.
        recordings: The files, in order.
        listener: Is told how it goes.
        answered: Is given new answers as they come.

    Raises:
        MergekitBioError: It cannot go on. Answers so far are kept where the request has an ``out``.
    """
    with ExitStack() as stack:
        recordings = each_once(recordings)
        # 1. Who will answer.
        table_kind = table_class(request.out, request.table_format) if request.out else None
        engine, note = choose_engine(request.engine, servers=request.settings.servers)
        if note:
            listener.note(f"note: {note}")
        settings = replace(request.settings, heard_once=True)
        slot = stack.enter_context(EngineSlot(engine, settings))
        folder = Path(request.model) if engine.remote else resolve(request.model).path
        weights = {"served": slot.revision(request.model)} if engine.remote else weights_identity(folder)
        if request.question.choices and engine.remote:  # before anything is written: whether the servers take the list
            slot.at(request.model).loglikelihood([], request.question.choices)
        # 2. The journal of what is answered already, which refuses another question; and the table made of it.
        dtype = settings.options.get("dtype")
        identity = request.question.identity() | {
            "checkpoint": weights,
            "engine": engine.name,
            "dtype": None if dtype in (None, "auto") else str(dtype),
        }
        journal = stack.enter_context(_journal(request, identity))
        still_open, changed = journal.open_recordings(recordings, request.windows)
        if changed:
            they = f"{changed} recordings have" if changed > 1 else "1 recording has"
            listener.note(f"note: {they} changed and will be asked about anew")
        if others := journal.others():
            listener.note(
                f"note: {journal.file} has answers about {others} other recordings, which are not named now and so not "
                "in the table"
            )
        about = About(
            root=_root(request.named),
            model=request.model,
            alpha=merge_strength(folder),
            prompt=request.question.prompt,
            channel=request.question.channel,
            choices=bool(request.question.choices),
        )
        table = table_kind(request.out, about) if table_kind and request.out else None
        if table is not None:
            table.begin(journal)
        # 3. Ask: one engine in this process, or Ray's workers with one each. What comes back goes into the journal, and
        # into the table as far as that can grow.
        if not still_open and request.out:
            listener.note(f"note: nothing is asked: {journal.file} has all answers")
        if still_open:
            listener.note(f"loading {request.model}")
            cluster = stack.enter_context(
                cluster_for(engine, settings.options, workers=request.workers, address=request.ray, note=listener.note)
            )
            workers: Workers[Stretch, Heard[AnsweredWindow]]
            if cluster is None:
                workers = OneWorker(stack.enter_context(closing(ListenWorker(request.question, request.model, slot))))
            else:
                make = partial(OwnEngine, request.question, request.model, engine.name, settings)
                workers = stack.enter_context(cluster.workers(make))
            _Asking(journal, table, listener, answered, workers).ask(recordings, still_open)
        # 4. The whole table, in order; what it adds up to; and what is worth hearing.
        if table is not None:
            table.finish(journal)
        heard = list(map(journal.recording, recordings))
        summary, best = _summed_up(journal, heard, most=request.clips[0] if request.clips else 0)
        clips, clips_error = 0, None
        if request.clips is not None:
            cut = partial(read_parts, mixed=False)
            try:
                clips = write_clips(best.ranked(), request.clips[1], cut=cut, note=listener.note)
            except OutputError as error:  # after all answers are there: they are not lost for it
                clips_error = str(error)
        return Outcome(
            recordings=len(heard),
            windows=sum(recording.windows for recording in heard),
            failed={one.path: one.error for one in heard if one.error is not None and not _was_heard(one)},
            broken={one.path: one.error for one in heard if one.error is not None and _was_heard(one)},
            summary=summary,
            clips=clips,
            clips_error=clips_error,
        )


class _Asking:
    """Hands out what is open, and writes down what comes back."""

    def __init__(
        self,
        journal: Journal,
        table: Table | None,
        listener: Listener,
        answered: Callable[[Sequence[Row]], None],
        workers: Workers[Stretch, Heard[AnsweredWindow]],
    ) -> None:
        self._journal, self._table, self._listener = journal, table, listener
        self._answered, self._workers = answered, workers

    def ask(self, recordings: Sequence[Path], still_open: Sequence[OpenRecording]) -> None:
        """Ask about all of it; see :func:`mergekit_bio.listen.stretches.hear_all`."""
        failed = sum(self._journal.recording(path).state == "failed" for path in recordings)
        counter = RecordingCounter(
            len(recordings), still_open, failed=failed, listener=self._listener, workers=lambda: self._workers.up
        )
        for result in hear_all(self._workers, still_open, note=self._listener.note):
            self._write_down(result, counter)

    def _write_down(self, result: Heard[AnsweredWindow], counter: RecordingCounter) -> None:
        self._journal.add(result.windows, result.ended)
        rows = [
            Row(window.recording, window.start, window.end, window.answer.text, window.answer.probability,
                window.answer.others)
            for window in result.windows
            if window.answer.text is not None
        ]  # fmt: skip
        rows = [row for row in rows if self._journal.is_shown(row)]
        if self._table is not None:
            ended = [self._journal.recording(recording.recording) for recording in result.ended]
            self._table.add(self._journal, rows, ended)
        self._answered(rows)
        for text in result.notes:
            self._listener.note(f"note: {text}")
        counter.add(len(result.windows), result.ended, seconds=result.seconds)


def ask_together(
    recordings: Sequence[Path],
    question: Question,
    model: str,
    *,
    engine: str | None,
    settings: EngineSettings,
    note: Note,
) -> Row:
    """Ask once about several recordings, the first window of each, one a slot of the prompt.

    Raises:
        AudioError: A recording is no use.
        MergekitBioError: The engine cannot run the model, or the prompt does not fit the recordings.
    """
    chosen, _ = choose_engine(engine, servers=settings.servers)
    clips = tuple(_beginning(path, question, note) for path in recordings)
    with EngineSlot(chosen, replace(settings, max_audios=len(clips))) as slot:
        (answer,) = answers_to(slot.at(model), question, [Prompt(question.text, clips)])
    name, end = " + ".join(map(str, recordings)), max(clip.end for clip in clips)
    return Row(name, 0.0, end, answer.text or "", answer.probability, answer.others)


def _summed_up(journal: Journal, recordings: Sequence[HeardRecording], *, most: int) -> tuple[Summary, Likeliest]:
    """What the answers about recordings add up to, and the ``most`` likeliest windows of each answer."""
    summary, best = Summary(), Likeliest(most)
    for recording in recordings:
        quiet, unlikely = journal.not_shown(recording)
        summary.quiet += quiet
        summary.unlikely += unlikely
        for row in journal.rows(recording):
            summary.add(row.recording, row.answer, time_of(row))
            if most and row.probability is not None:
                best.add(row.answer, row.probability, recording=row.recording, start=row.start, end=row.end)
    return summary, best


def _was_heard(recording: HeardRecording) -> bool:
    """Whether it has at least one window."""
    return (recording.seconds or 0.0) >= MIN_SECONDS


def _beginning(path: Path, question: Question, note: Note) -> Clip:
    """The first window of a recording; where that ends because the recording breaks, a note says so."""
    windows = read_windows(path, window=question.window, channel=question.channel, note=note)
    clip = next(windows)
    try:
        if clip.end < question.window:
            next(windows, None)
    except AudioError as error:
        note(str(error))
    finally:
        windows.close()
    return clip


def _journal(request: AskRequest, identity: dict[str, Any]) -> Journal:
    """The journal beside the table; a table that is not made of it is left alone.

    Raises:
        OutputError: The table exists already, or its folder does not.
        RunError: See :class:`mergekit_bio.listen.journal.Journal`.
    """
    more: dict[str, Any] = {
        "unsaid": Question(prompt="").identity(), "least_probability": request.least_probability
    }  # fmt: skip
    if (out := request.out) is None:
        return Journal(None, identity, **more)
    file = journal_file(out)
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder")
    if not request.overwrite and not file.exists() and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise OutputError(f"{out}: exists already; choose another --out or pass --overwrite")
    if is_folder(out):
        out.mkdir(exist_ok=True)
    journal = Journal(file, identity, overwrite=request.overwrite, **more)
    try:
        journal.claim(out, overwrite=request.overwrite)
    except BaseException:
        journal.__exit__()
        raise
    return journal


def _root(named: Sequence[Path]) -> Path:
    """The folder that holds all that the user named."""
    return Path(os.path.commonpath([path.absolute() if path.is_dir() else path.absolute().parent for path in named]))
