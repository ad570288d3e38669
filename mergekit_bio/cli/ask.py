"""``mergekit-bio ask``: a question about recordings, answered in the shell or in a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_bio.cli.choice_options import (
    ChoicesOption,
    ClipsOption,
    MinProbabilityOption,
    NoneOption,
    SkipQuietOption,
    WindowsOption,
    listed_choices,
    named_windows,
)
from mergekit_bio.cli.console import JsonOption, QuietOption, stderr_console
from mergekit_bio.cli.engine_options import (
    ENGINE_NAMES,
    ApiKeyOption,
    EngineOption,
    RayOption,
    ServerOption,
    WorkersOption,
    key_value,
)
from mergekit_bio.cli.listening import ChannelOption, DeviceOption, ListenOutput, tell_failed
from mergekit_bio.cli.summary import print_summary

if TYPE_CHECKING:
    from rich.console import Console

    from mergekit_bio.listen.journal import Row


def ask(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="A merged model with an audio tower, or its hub id; with --server its name there.",
        ),
    ],
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            help="The question; <AudioHere> marks where an audio goes, {species_list} where the choices go.",
        ),
    ],
    audio: Annotated[
        list[Path] | None,
        typer.Argument(metavar="AUDIO", help="Recordings, or folders of them; by default those beside --windows."),
    ] = None,
    choices: ChoicesOption = None,
    none: NoneOption = False,
    min_probability: MinProbabilityOption = None,
    clips: ClipsOption = None,
    windows: WindowsOption = None,
    skip_quiet: SkipQuietOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|DIR",
            help="Write the answers to .csv, .jsonl, .parquet or .txt as they come. The same command goes on where it "
            "was stopped, and asks about recordings that are new.",
        ),
    ] = None,
    table_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="raven|audacity",
            help="raven: a selection table a recording, in the folder --out, or one .txt for all; audacity: a label "
            "track a recording.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Ask anew, and replace what --out holds.")] = False,
    window: Annotated[float, typer.Option(help="Seconds that are heard at a time, 0.5 to 10.")] = 10.0,
    hop: Annotated[float | None, typer.Option(help="Seconds between windows.", show_default="the window")] = None,
    channel: ChannelOption = "mean",
    beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy decoding.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 300,
    engine: Annotated[
        str | None,
        typer.Option(
            help=f"{ENGINE_NAMES}. [default: http with --server; with --out the first that is installed; else "
            "transformers, which starts fastest]"
        ),
    ] = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    engine_option: EngineOption = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Ask a merged model about recordings.

    Without <AudioHere> in the prompt, every recording is asked about on its own, in windows of 10 s to its end. With
    several, the recordings fill them in order and there is one answer. A recording that cannot be used is named and
    counted, and the others are answered; so is one that breaks midway, up to there.

    \b
    Examples:
      mergekit-bio ask merged/half wren.wav --prompt "Which species is it?"
      mergekit-bio ask merged/half a.flac b.mp3 \\
          --prompt "Is <AudioHere> the same species as <AudioHere>?"
      mergekit-bio ask merged/half birds/ -p "Which species is it?" -o birds.csv
      mergekit-bio ask merged/half birds/ -p "Which?" -o labels/ --format audacity
      mergekit-bio ask merged/half birds/ -p "Which of {species_list}?" \\
          --choices species.txt --clips 5 clips/
      mergekit-bio ask merged/half wren.wav -p "Which?" --windows wren.txt
      mergekit-bio ask NatureLM-audio@0.5 wren.wav -p "Which species is it?" \\
          --server http://HOST:8000
    """
    from mergekit_bio.audio.finding import find_recordings
    from mergekit_bio.audio.layout import AUDIO_SLOT
    from mergekit_bio.audio.prompt import check_audio_count, render_prompt
    from mergekit_bio.audio.recording import check_windows, parse_channel
    from mergekit_bio.engine.decoding.choices import with_choices
    from mergekit_bio.engine.interface import EngineSettings
    from mergekit_bio.errors import AudioError, OutputError
    from mergekit_bio.listen.answering import AskRequest, ask_archive, ask_together
    from mergekit_bio.listen.clip_files import check_folder
    from mergekit_bio.listen.question import Question
    from mergekit_bio.listen.quiet import check_level
    from mergekit_bio.listen.tables.choice import table_class

    # 1. Before a minute of loading, what can be said at once.
    check_windows(window=window, hop=hop)
    output = ListenOutput(as_json=as_json, quiet=quiet)
    heard_channel = parse_channel(channel)
    check_level(skip_quiet)
    listed = listed_choices(choices, none=none, min_probability=min_probability, clips=clips, note=output.note)
    selected = None
    if windows:
        found, selected = named_windows(windows, audio or [], window=window, hop=hop or window)
    elif audio:
        found = find_recordings(audio)
    else:
        raise AudioError("name recordings, or folders of them")
    recordings = found.recordings
    if clips is not None:
        check_folder(clips[1], recordings)
    slots = prompt.count(AUDIO_SLOT)
    together = slots > 1 or (slots == 1 and len(recordings) > 1)
    if together:
        check_audio_count(slots=slots, audios=len(recordings))
        given = {
            "out": out,
            "windows": windows,
            "min-probability": min_probability,
            "skip-quiet": skip_quiet,
            "clips": clips,
        }
        for option in (option for option, value in given.items() if value is not None):
            raise OutputError(f"--{option}: is about single recordings, and this prompt is about several at once")
    render_prompt(with_choices(prompt, listed), template="{}", num_audios=max(slots, 1))
    if out is None and (table_format is not None or overwrite):
        raise OutputError(f"--{'overwrite' if overwrite else 'format'}: give it with --out")
    if out is not None:
        table_class(out, table_format)
        for given_file in (*(windows or ()), *([choices, choices.rpartition(":")[0]] if choices else [])):
            if out.is_file() and Path(given_file).is_file() and out.samefile(given_file):
                raise OutputError(f"{out}: is read by this command; give another --out")
    options = dict(map(key_value, engine_option or [])) | ({} if device == "auto" else {"device": device})
    settings = EngineSettings(options=options, servers=tuple(server or ()), api_key=api_key, quiet=quiet)
    if engine is None and out is None and not server:
        engine = "transformers"
    question = Question(
        prompt=prompt,
        window=window,
        hop=hop or window,
        channel=heard_channel,
        num_beams=beams,
        max_new_tokens=max_new_tokens,
        choices=listed,
        skip_quiet=skip_quiet,
        selected=selected is not None,
    )
    document: dict[str, Any]
    # 2. Ask.
    for text in found.notes:
        output.note(f"note: {text}")
    if together:
        output.note(f"loading {model}")
        row = ask_together(recordings, question, model, engine=engine, settings=settings, note=output.tell)
        document = {"prompt": prompt, "answers": [_answer(row, recordings)], "failed": []}
        output.result(document, lambda console: _print_rows([row], quiet=False), lines=[row.answer])
        return
    answers: list[Row] = []

    def answered(rows: "Sequence[Row]") -> None:
        """Print answers as they come, but for those that go into one document or a table."""
        if as_json and out is None:
            answers.extend(rows)
        elif out is None:
            _print_rows(rows, quiet=quiet)

    request = AskRequest(
        model=model,
        named=audio or recordings,
        question=question,
        engine=engine,
        settings=settings,
        out=out,
        table_format=table_format,
        overwrite=overwrite,
        workers=workers,
        ray=ray,
        windows=selected,
        least_probability=min_probability or 0.0,
        clips=clips,
    )
    with output.shown(several=len(recordings) > 1, bar=out is not None or as_json):
        outcome = ask_archive(request, recordings, output, answered=answered)
    # 3. Say what came of it.
    failed = [{"recording": path, "error": error} for path, error in (outcome.failed | outcome.broken).items()]
    summary = {"summary": outcome.summary.document()} | ({"clips": outcome.clips} if clips else {})
    if out is not None:
        document = {
            "prompt": prompt, "out": str(out), "recordings": outcome.recordings, "windows": outcome.windows,
            "failed": failed, **summary,
        }  # fmt: skip

        def render(console: "Console") -> None:
            line = f"{outcome.windows} windows of {outcome.recordings - len(outcome.failed)} recordings -> {out}"
            console.print(line, soft_wrap=True)
            print_summary(outcome.summary, console)

        output.result(document, render, lines=[str(out)])
    elif as_json and len(outcome.failed) < outcome.recordings:
        shown = [_answer(row, [row.recording]) for row in answers]
        output.result({"prompt": prompt, "answers": shown, "failed": failed, **summary}, lambda console: None)
    elif not quiet and (listed or len(recordings) > 1):
        print_summary(outcome.summary, stderr_console())  # stdout holds the answers
    if clips is not None and not outcome.clips_error:
        output.note(f"{outcome.clips} windows to listen to -> {clips[1]}")
    tell_failed(outcome.recordings, outcome.failed, outcome.broken, output)
    if outcome.clips_error:
        raise OutputError(outcome.clips_error)


def _print_rows(rows: "Sequence[Row]", *, quiet: bool) -> None:
    from mergekit_bio.listen.tables.lines import shown

    for row in rows:
        print(row.answer if quiet else shown(row), flush=True)


def _answer(row: "Row", recordings: "Sequence[str | Path]") -> dict[str, Any]:
    """An answer as JSON has it."""
    answer = {"recordings": list(map(str, recordings)), "start": row.start, "end": row.end, "text": row.answer}
    if row.probability is None:
        return answer
    others = [{"text": text, "probability": probability} for text, probability in row.others]
    return answer | {"probability": row.probability, "others": others}
