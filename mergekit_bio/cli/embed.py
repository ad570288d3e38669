"""``mergekit-bio embed``: recordings to vectors, for similarity and clustering."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption
from mergekit_bio.cli.listening import check_any_used, hear_each


def embed(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A merged model with an audio tower, or NatureLM-audio; or a hub id.")
    ],
    audio: Annotated[list[Path], typer.Argument(metavar="AUDIO", help="Recordings, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: .safetensors or .npz.")],
    window: Annotated[float, typer.Option(help="Seconds an embedding stands for, 0.5 to 10.")] = 10.0,
    hop: Annotated[float | None, typer.Option(help="Seconds between windows.", show_default="the window")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Embed recordings: the prefix that Llama reads, and the mean of the encoder's output, for every 10 s.

    A recording that cannot be used is named and counted, and the others are embedded. The file holds the arrays
    prefix, encoder, recording, start and end, a row for every window.

    \b
    Examples:
      mergekit-bio embed merged/alpha-0.50 recordings/ --out embeddings.safetensors
      mergekit-bio embed EarthSpeciesProject/NatureLM-audio wren.wav --window 5 --out wren.npz
    """
    from mergekit_bio.audio.device import pick_device
    from mergekit_bio.audio.finding import find_recordings
    from mergekit_bio.audio.prefix import AudioPrefix
    from mergekit_bio.audio.recording import check_windows
    from mergekit_bio.listen.embeddings import open_embeddings

    output = Output(as_json=as_json, quiet=quiet)
    check_windows(window=window, hop=hop)
    recordings = find_recordings(audio).recordings
    with open_embeddings(out, overwrite=overwrite) as embeddings:
        output.note(f"loading {model}")
        prefix = AudioPrefix.from_pretrained(model).to(pick_device(device))
        failed = hear_each(
            recordings, lambda recording: embeddings.add(prefix, recording, window=window, hop=hop), output
        )
        check_any_used(recordings, failed)
        clips, used = embeddings.clips, len(embeddings.recordings)
    output.result(
        {"out": str(out), "recordings": used, "clips": clips, "failed": failed},
        lambda console: console.print(f"{clips} clips of {used} recordings -> {out}", soft_wrap=True),
        lines=[str(out)],
    )
