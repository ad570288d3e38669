"""``mergekit-bio serve``: an OpenAI-compatible server for a merged checkpoint, or for every strength of an adapter."""

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mergekit_bio.merging.request import MergeRequest

if TYPE_CHECKING:
    from mergekit_bio.serve.dial import DialRequest


def serve(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT] [VLLM FLAGS]",
            help="A merged directory or hub id, or none for the dial; then any flags of `vllm serve`: --port, "
            "--api-key, --tensor-parallel-size, --data-parallel-size, --distributed-executor-backend ray, --max-loras, "
            "--allowed-local-media-path, --allowed-media-domains, ...",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help=f"Base of the dial: directory or hub id[@revision]. [default: {MergeRequest.base}]"),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help=f"Adapter of the dial: one LoRA. [default: {MergeRequest.adapter}]")
    ] = None,
    alpha: Annotated[str | None, typer.Option(help="The strength that NAME alone stands for. [default: 0.5]")] = None,
    dial: Annotated[
        bool, typer.Option("--dial", help="Serve every strength of what the checkpoints were merged from, unmerged.")
    ] = False,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who may ask: NAME: KEY a line; read again when it changes.")
    ] = None,
    request_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A line of JSON a request: who, when, how much; no content. - for stdout."),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="A page at /page, to ask in a browser: record, drop, compare two strengths.")
    ] = False,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request.")] = 64,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Most items in a /predict request, if so many recordings fit into one.")
    ] = 8,
    max_audio_seconds: Annotated[float, typer.Option(min=0.5, help="Longest recording.")] = 600.0,
    beams: Annotated[int, typer.Option(min=1, max=16, help="Beams of /predict, unless the request says.")] = 2,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer of /predict, in tokens, unless the request says.")
    ] = 300,
    system_turns: Annotated[
        Literal["drop", "keep"], typer.Option(help="System turns in /predict: NatureLM-audio was trained without.")
    ] = "drop",
) -> None:
    """Serve OpenAI's API with audio in chat, and the predictions_v1 contract, on one port.

    Without a checkpoint, every strength of an adapter is served at once: alpha as a dial. Ask for the model NAME@0.35,
    any strength from 0 to 2 with up to three digits; NAME is the adapter's. /NAME@0.35/predict and /NAME@0.35/info are
    for beans-next; /predict and /info are those of --alpha. The base is not copied: the adapter is applied while vLLM
    computes, so answers may differ in a token from those of a merge that was rounded to 16 bits.

    /predict also scores a list of choices, which `ask --choices --server URL` and recipes with loglikelihood ask for.

    With one checkpoint, exactly that is served, its own rounded weights. Binds 127.0.0.1 unless --host says otherwise.

    \b
    Examples:
      mergekit-bio serve --port 8000                # NatureLM-audio, every alpha
      mergekit-bio serve --base llama/ --adapter lora/ --alpha 0.4
      mergekit-bio serve merged/half --api-key KEY --tensor-parallel-size 2
      mergekit-bio serve --page                     # and in a browser, at /page
    """
    from mergekit_bio.errors import FlagError
    from mergekit_bio.serve.command import serve as start
    from mergekit_bio.serve.request_log import STANDARD_OUTPUT
    from mergekit_bio.serve.settings import ServeSettings

    given = arguments or []
    first_flag = next((index for index, argument in enumerate(given) if argument.startswith("-")), len(given))
    checkpoints, flags = given[:first_flag], given[first_flag:]
    settings = ServeSettings(
        api_keys=api_keys and api_keys.absolute(),
        request_log=request_log and (request_log if request_log == STANDARD_OUTPUT else request_log.absolute()),
        max_body_bytes=max_body_mb << 20,
        max_batch=max_batch,
        max_audio_seconds=max_audio_seconds,
        num_beams=beams,
        max_new_tokens=max_new_tokens,
        system_turns=system_turns,
    )
    options = {"base": base, "adapter": adapter, "alpha": alpha}
    given_options = {key: value for key, value in options.items() if value is not None}
    source = _source(checkpoints, given_options, dial=dial)
    try:
        start(source=source, flags=flags, settings=settings, page=page)
    except FlagError as error:
        own = [name for option in context.command.params for name in option.opts if name.startswith("-")]
        raise typer.BadParameter(_advised(str(error), [*own, *error.known])) from None


def _advised(problem: str, known: list[str]) -> str:
    """What is wrong with a flag; of one that is unknown, which one may have been meant."""
    _, _, unknown = problem.partition("unrecognized arguments: ")
    near = get_close_matches(unknown.partition(" ")[0].partition("=")[0], known, n=1)
    return f"{problem}; did you mean {near[0]}?" if near else problem


def _source(checkpoints: list[str], options: dict[str, Any], *, dial: bool) -> "str | DialRequest":
    """What is to be served."""
    from dataclasses import replace

    from mergekit_bio.serve.dial import DialRequest, request_of_merges

    if not checkpoints:
        if dial:
            raise typer.BadParameter("--dial is about merged checkpoints: name some before the flags")
        return DialRequest(**options)
    if wrong := next((key for key in ("base", "adapter") if key in options), None):
        raise typer.BadParameter(
            f"--{wrong} is for the dial, and {checkpoints[0]} is a checkpoint: leave one of them out"
        )
    if dial:
        return replace(request_of_merges(checkpoints), **options)
    if "alpha" in options:
        raise typer.BadParameter(f"{checkpoints[0]} has its own alpha; --alpha is for the dial")
    if len(checkpoints) > 1:
        raise typer.BadParameter(
            "a server has one merged checkpoint: start one for each, on a --port of its own, or serve every strength "
            "of what they were merged from with --dial"
        )
    return checkpoints[0]
