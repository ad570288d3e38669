"""Starts vLLM's server with this package's parts in it."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from mergekit_bio.audio.chat_template import server_chat_template
from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.sweep import difference, verify
from mergekit_bio.engine.tokenization import read_audio_model_config
from mergekit_bio.errors import EngineError
from mergekit_bio.outside_data import read_json
from mergekit_bio.serve.settings import PLUGIN, ServeSettings

#: Most audios in a prompt, and longest prompt and answer together, unless flags say otherwise.
MAX_AUDIOS = 16
MAX_MODEL_LEN = 16384


def find_models(checkpoints: Sequence[str | Path]) -> dict[str, Path]:
    """Give every checkpoint its name: that of its directory or repository.

    Raises:
        EngineError: Two have the same name, or they are not of one sweep.
        CheckpointError: One has no ears.
    """
    models: dict[str, Path] = {}
    for checkpoint in checkpoints:
        source = resolve(checkpoint)
        if source.name in models:
            raise EngineError(f"two checkpoints are called {source.name}; rename one of the directories")
        read_audio_model_config(source.path)
        models[source.name] = source.path.resolve()
    first, *others = models.values()
    for other in others:
        verify(difference(first, other))
    return models


def parse_flags(models: dict[str, Path], flags: Sequence[str]) -> Any:
    """vLLM's own arguments, with defaults that suit the model and keep the server private; flags win over them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from mergekit_bio.engine.vllm.plugin import worker_class
    from mergekit_bio.engine.vllm.start import engine_dtype

    first = next(iter(models.values()))
    longest = read_audio_model_config(first)["text_config"]["max_position_embeddings"]
    defaults = {
        "--host": "127.0.0.1",
        "--served-model-name": list(models),
        "--chat-template": _chat_template(first),
        "--chat-template-content-format": "openai",
        "--limit-mm-per-prompt": f'{{"audio": {MAX_AUDIOS}}}',
        "--dtype": engine_dtype(first),
        "--max-model-len": str(min(longest, MAX_MODEL_LEN)),
        "--max-logprobs": "128",
        "--shutdown-timeout": "20",  # seconds for running requests and for its processes, which it would kill otherwise
        "--structured-outputs-config": '{"backend": "guidance"}',  # the one that finds every bad grammar beforehand
        "--worker-cls": worker_class(),
        "--worker-extension-cls": "mergekit_bio.engine.vllm.model.WeightReload",
        "--middleware": "mergekit_bio.serve.guard.Guard",
    }
    if len(models) > 1:
        defaults["--api-server-count"] = "1"  # one process decides whose weights are loaded
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags}  # vLLM warns of a flag that comes twice
    ours = [
        part
        for flag, value in defaults.items()
        if flag not in given
        for part in (flag, *([value] if isinstance(value, str) else value))
    ]
    parser = make_arg_parser(FlexibleArgumentParser(prog="mergekit-bio serve", description="vLLM's options"))
    args = parser.parse_args(["--model", str(first), *ours, *flags])
    validate_parsed_serve_args(args)
    if len(models) > 1 and (args.served_model_name != list(models) or args.api_server_count != 1):
        raise EngineError(
            "--served-model-name and --api-server-count cannot be set when several checkpoints are served"
        )
    return args


def serve(*, checkpoints: Sequence[str | Path], flags: Sequence[str], settings: ServeSettings) -> None:
    """Serve merged directories or hub ids, several of one sweep under their names, until a signal comes.

    Args:
        flags: vLLM's.
        settings: Limits; its models and media rules are filled in here.

    Raises:
        MergekitBioError: The checkpoints cannot be served, or not with these flags.
        MissingPackageError: vLLM is not installed.
    """
    from mergekit_bio.engine.vllm.plugin import register, require_vllm
    from mergekit_bio.engine.vllm.start import interruptible, objections

    require_vllm()
    register()
    models = find_models(checkpoints)
    args = parse_flags(models, flags)
    if len(models) == 1:
        models = {args.served_model_name[0]: next(iter(models.values()))}
    settings = replace(
        settings,
        models={name: str(path) for name, path in models.items()},
        prompt_template=prompt_template(args),
        allowed_local_media_path=args.allowed_local_media_path or None,
        allowed_media_domains=tuple(args.allowed_media_domains or ()),
    )
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ |= settings.to_environment() | {
        # vLLM adds routes only for plugins that are named here.
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, PLUGIN])),
        "VLLM_MEDIA_CONNECTOR": PLUGIN,
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    }
    os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "15")  # less than --shutdown-timeout
    from vllm.entrypoints.cli.serve import ServeSubcommand

    signal.signal(signal.SIGINT, _interrupt)
    with interruptible(), objections(Path(args.model)):
        ServeSubcommand.cmd(args)


def _interrupt(signum: int, frame: object) -> NoReturn:
    """What Python does on Ctrl-C; but asyncio puts its own, which waits for vLLM, in the place of Python's only."""
    raise KeyboardInterrupt


def prompt_template(args: Any) -> str | None:
    """What the chat template makes of one user's turn, with ``{}`` for it; None for a template that a flag gives."""
    return LLAMA3_TEMPLATE if args.chat_template == _chat_template(Path(args.model)) else None


def _chat_template(checkpoint: Path) -> str:
    return server_chat_template(read_json(inside(checkpoint, "processor_config.json"))["audio_token"])
