"""``mergekit-bio embed``: recordings to vectors, for similarity and clustering."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mergekit_bio.cli.console import JsonOption, QuietOption
from mergekit_bio.cli.engine_options import RayOption
from mergekit_bio.cli.listening import ChannelOption, DeviceOption, ListenOutput, tell_failed


def embed(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A merged model with an audio tower, or NatureLM-audio; or a hub id.")
    ],
    audio: Annotated[list[Path], typer.Argument(metavar="AUDIO", help="Recordings, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: .safetensors or .npz.")],
    window: Annotated[float, typer.Option(help="Seconds an embedding stands for, 0.5 to 10.")] = 10.0,
    hop: Annotated[float | None, typer.Option(help="Seconds between windows.", show_default="the window")] = None,
    channel: ChannelOption = "mean",
    prefixes: Annotated[
        bool | None,
        typer.Option(
            "--prefixes/--no-prefixes",
            help="Write what Llama reads, too: 0.5 MB a window of an 8B model. [default: unless all of them would take "
            "more than 4 GB]",
        ),
    ] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of the vectors.")] = "float32",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes that embed side by side, on Ray: a GPU each, or an equal share of the cores. [default: one "
            "for every GPU, if Ray is installed, else 1]",
        ),
    ] = None,
    ray: RayOption = None,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Embed recordings: the mean of the encoder's output, and the prefix that Llama reads, for every 10 s.

    A recording that cannot be used is named and counted, and the others are embedded. The file holds the arrays
    encoder, prefix, recording, start and end, a row for every window. It is written when all is embedded; until then
    parts of it stand in the folder OUT.parts, and the same command goes on where it was stopped, with any number of
    workers. Rows are in the order of the recordings.

    \b
    Examples:
      mergekit-bio embed merged/half recordings/ --out embeddings.safetensors
      mergekit-bio embed EarthSpeciesProject/NatureLM-audio wren.wav -o wren.npz
      mergekit-bio embed merged/half archive/ --dtype float16 --out archive.npz
      mergekit-bio embed merged/half archive/ --workers 8 --out archive.npz
    """
    from mergekit_bio.audio.finding import find_recordings
    from mergekit_bio.audio.recording import check_windows, parse_channel
    from mergekit_bio.listen.embeddings import EmbedRequest, embed_archive

    check_windows(window=window, hop=hop)
    output = ListenOutput(as_json=as_json, quiet=quiet)
    heard_channel = parse_channel(channel)
    found = find_recordings(audio)
    for text in found.notes:
        output.note(f"note: {text}")
    request = EmbedRequest(
        model=model, out=out, window=window, hop=hop or window, channel=heard_channel, prefixes=prefixes, dtype=dtype,
        device=device, overwrite=overwrite, workers=workers, ray=ray,
    )  # fmt: skip
    with output.shown(several=len(found.recordings) > 1):
        embedded = embed_archive(request, found.recordings, output)
    failed = [{"recording": path, "error": error} for path, error in (embedded.failed | embedded.broken).items()]
    if not embedded.clips:
        tell_failed(embedded.heard, embedded.failed, embedded.broken, output)
    output.result(
        {
            "out": str(out), "recordings": embedded.recordings, "clips": embedded.clips, "failed": failed,
            "prefixes": embedded.prefixes,
        },
        lambda console: console.print(
            f"{embedded.clips} windows of {embedded.recordings} recordings -> {out}", soft_wrap=True
        ),
        lines=[str(out)],
    )  # fmt: skip
    tell_failed(embedded.heard, embedded.failed, embedded.broken, output)
