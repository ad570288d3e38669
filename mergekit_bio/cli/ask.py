"""``mergekit-bio ask``: a question about recordings, answered in the shell."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption
from mergekit_bio.cli.listening import check_any_used, hear_each

if TYPE_CHECKING:
    from mergekit_bio.listen.ask import Answer


def ask(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A merged model with an audio tower, or its hub id.")],
    audio: Annotated[list[Path], typer.Argument(metavar="AUDIO", help="Recordings, or folders of them.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; <AudioHere> marks where an audio goes.")],
    window: Annotated[float, typer.Option(help="Seconds that are heard at a time, 0.5 to 10.")] = 10.0,
    hop: Annotated[float | None, typer.Option(help="Seconds between windows.", show_default="the window")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy decoding.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 300,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Ask a merged model about recordings.

    Without <AudioHere> in the prompt, every recording is asked about on its own, in windows of 10 s to its end. With
    several, the recordings fill them in order and there is one answer. A recording that cannot be used is named and
    counted, and the others are answered; so is one that breaks midway, up to there.

    \b
    Examples:
      mergekit-bio ask merged/alpha-0.50 wren.wav --prompt "What is the common name for the focal species in the audio?"
      mergekit-bio ask merged/alpha-0.50 a.flac b.mp3 -p "Is <AudioHere> the same species as <AudioHere>?" --json
    """
    from mergekit_bio.audio.finding import find_recordings
    from mergekit_bio.audio.layout import AUDIO_SLOT
    from mergekit_bio.audio.prompt import check_audio_count, render_prompt
    from mergekit_bio.audio.recording import check_windows
    from mergekit_bio.listen.ask import Asker
    from mergekit_bio.model.loading import load_model

    output = Output(as_json=as_json, quiet=quiet)
    check_windows(window=window, hop=hop)
    recordings = find_recordings(audio).recordings
    slots = prompt.count(AUDIO_SLOT)
    together = slots > 1 or (slots == 1 and len(recordings) > 1)
    # Before a minute of loading, what can be said at once.
    if together:
        check_audio_count(slots=slots, audios=len(recordings))
    render_prompt(prompt, template="{}", num_audios=max(slots, 1))
    output.note(f"loading {model}")
    asker = Asker(*load_model(model, device=device), num_beams=beams, max_new_tokens=max_new_tokens)
    failed: list[dict[str, str]] = []
    answers: list[Answer] = []
    if together:
        answers.append(asker.together(recordings, prompt))
    else:
        failed = hear_each(
            recordings,
            lambda recording: answers.extend(asker.each_window(recording, prompt, window=window, hop=hop)),
            output,
        )
    document = {"prompt": prompt, "answers": [vars(answer) for answer in answers], "failed": failed}
    if answers or not failed:
        output.result(
            document,
            lambda console: console.print("\n".join(map(_line, answers)), soft_wrap=True),
            lines=[answer.text for answer in answers],
        )
    check_any_used(recordings, failed)


def _line(answer: "Answer") -> str:
    return f"{' + '.join(answer.recordings)} [{answer.start:.1f}-{answer.end:.1f} s]  {answer.text}"
