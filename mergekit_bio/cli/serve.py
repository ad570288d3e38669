"""``mergekit-bio serve``: an OpenAI-compatible server for merged checkpoints."""

from typing import Annotated

import typer


def serve(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT... [VLLM FLAGS]",
            help="Merged directories or hub ids, then any flags of `vllm serve`: --port, --api-key, "
            "--tensor-parallel-size, --data-parallel-size, --distributed-executor-backend ray, "
            "--allowed-local-media-path, --allowed-media-domains, ...",
        ),
    ],
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request.")] = 64,
    max_batch: Annotated[int, typer.Option(min=1, help="Most items in a /predict request.")] = 64,
    max_audio_seconds: Annotated[float, typer.Option(min=0.5, help="Longest recording.")] = 600.0,
) -> None:
    """Serve merged checkpoints: OpenAI's API with audio in chat, and the predictions_v1 contract, on one port.

    Binds 127.0.0.1 unless --host says otherwise. Several checkpoints of one sweep are offered as models by their
    directory names, from one copy of the weights: requests for another one wait until it is swapped in. /predict and
    /info are the first one's; /NAME/predict and /NAME/info any other's.

    \b
    Examples:
      mergekit-bio serve merged/NatureLM-audio-alpha-0.50 --port 8000
      mergekit-bio serve sweep/alpha-0.40 sweep/alpha-1.00 --tensor-parallel-size 2 --api-key secret
    """
    from mergekit_bio.serve.command import serve as start
    from mergekit_bio.serve.settings import ServeSettings

    first_flag = next((index for index, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    checkpoints, flags = arguments[:first_flag], arguments[first_flag:]
    if not checkpoints:
        raise typer.BadParameter("name a checkpoint before the flags")
    settings = ServeSettings(
        models={}, max_body_bytes=max_body_mb << 20, max_batch=max_batch, max_audio_seconds=max_audio_seconds
    )
    start(checkpoints=checkpoints, flags=flags, settings=settings)
