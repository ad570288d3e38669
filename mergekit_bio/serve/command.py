"""Starts vLLM's server with this package's parts in it."""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from mergekit_bio.audio.chat_template import server_chat_template
from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.checkpoint.manifest import checkpoints_of_sweep
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.tokenization import read_audio_model_config
from mergekit_bio.engine.vllm.dial import LARGEST
from mergekit_bio.errors import EngineError, FlagError, MissingPackageError
from mergekit_bio.outside_data import read_json
from mergekit_bio.serve.address import address_errors, check_certificate
from mergekit_bio.serve.dial import DialRequest, PreparedDial, prepared_dial
from mergekit_bio.serve.keys import check_vllms_keys, is_open_to_all, read_keys
from mergekit_bio.serve.request_log import STANDARD_OUTPUT, RequestLog
from mergekit_bio.serve.settings import PLUGIN, DialSettings, ServeSettings

#: Most audios in a prompt, and longest prompt and answer together, unless flags say otherwise.
MAX_AUDIOS = 16
MAX_MODEL_LEN = 16384
#: Strengths of one batch: those that are listed, and one more. Strengths that are kept in memory.
MAX_STRENGTHS, KEPT_STRENGTHS = 12, 32

#: vLLM's flags that a dial sets itself.
_OF_THE_DIAL = (
    "--enable-lora",
    "--no-enable-lora",
    "--lora-modules",
    "--default-mm-loras",
    "--enable-tower-connector-lora",
)


def parse_flags(checkpoint: Path, names: Sequence[str], flags: Sequence[str], dial: PreparedDial | None = None) -> Any:
    """vLLM's own arguments, with defaults that suit the model and keep the server private; flags win over them.

    Args:
        checkpoint: The directory that vLLM loads.
        names: What the model is called.
        flags: vLLM's.
        dial: What is served at every strength.

    Raises:
        EngineError: A flag is one that a dial sets itself.
        FlagError: vLLM cannot read a flag.
    """
    from mergekit_bio.engine.vllm.plugin import worker_class
    from mergekit_bio.engine.vllm.start import engine_dtype

    longest = read_audio_model_config(checkpoint)["text_config"]["max_position_embeddings"]
    defaults: dict[str, str | Sequence[str]] = {
        "--host": "127.0.0.1",
        "--served-model-name": names,
        "--chat-template": _chat_template(checkpoint),
        "--chat-template-content-format": "openai",
        "--limit-mm-per-prompt": f'{{"audio": {MAX_AUDIOS}}}',
        "--dtype": engine_dtype(checkpoint),
        "--max-model-len": str(min(longest, MAX_MODEL_LEN)),
        "--max-logprobs": "128",
        "--shutdown-timeout": "7",  # seconds for running requests and for its processes, which it would kill otherwise
        "--structured-outputs-config": '{"backend": "guidance"}',  # the one that finds every bad grammar beforehand
        "--worker-cls": worker_class(),
    }
    given = _named(flags)
    if dial is not None:
        if wrong := sorted(given.intersection(_OF_THE_DIAL)):
            raise EngineError(
                f"{wrong[0]} cannot be set where every strength is served: the dial has vLLM's LoRA slots"
            )
        defaults |= {
            "--enable-lora": (),
            "--max-lora-rank": str(dial.slots.slot_rank),
            "--max-loras": str(MAX_STRENGTHS),
            "--lora-target-modules": dial.slots.vllm_layers,
        }
    ours = [
        part
        for flag, value in defaults.items()
        if flag not in given
        for part in (flag, *([value] if isinstance(value, str) else value))
    ]
    args = _parsed(["--model", str(checkpoint), *ours, *flags])
    if dial is not None and args.max_cpu_loras is None:
        args.max_cpu_loras = max(KEPT_STRENGTHS, args.max_loras)
    args.middleware = [*args.middleware, "mergekit_bio.serve.guard.Guard"]  # around a user's own
    if getattr(args, "grpc", False):
        raise EngineError("--grpc: this server's routes and its guard are HTTP's; leave it out")
    return args


def check_flags(flags: Sequence[str]) -> None:
    """Refuse flags that vLLM cannot read, before anything is fetched or made.

    Raises:
        FlagError: A flag or its value is unknown, or a checkpoint stands behind the flags.
    """
    if (checkpoint := _parsed(flags).model_tag) is not None:
        raise FlagError(f"{checkpoint}: what is served stands before the flags: serve {checkpoint} {flags[0]} ...")


def _parsed(flags: Sequence[str]) -> Any:
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    try:
        args = _flag_parser().parse_args(list(flags))
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise FlagError(" ".join(str(error).removeprefix("Error: ").split())) from error
    return args


@cache
def _flag_parser() -> Any:
    """vLLM's parser, which says in one line what is wrong."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            known = tuple(flag for action in self._actions for flag in action.option_strings)
            raise FlagError(message, known)

    return make_arg_parser(Parser(prog="mergekit-bio serve", description="vLLM's options"))


def cache_options(args: Any, flags: Sequence[str]) -> dict[str, Any]:
    """The options that say how large vLLM's cache is and how many there are, however they are given.

    Args:
        args: vLLM's arguments, from its flags in whichever form or from a file (``-tp 2``, ``--config``).
        flags: Tell a share of the memory that a user has named from vLLM's default, which counts for nothing.
    """
    from vllm.engine.arg_utils import EngineArgs

    from mergekit_bio.engine.vllm.cpu_memory import SAID_BY, SPREAD_BY

    options = {option: getattr(args, option) for option in (*SAID_BY, *SPREAD_BY)}
    usual = args.gpu_memory_utilization == EngineArgs.gpu_memory_utilization
    if usual and "--gpu-memory-utilization" not in _named(flags):
        del options["gpu_memory_utilization"]
    return options


def serve(
    *, source: str | Path | DialRequest, flags: Sequence[str], settings: ServeSettings, page: bool = False
) -> None:
    """Serve one merged checkpoint, or an adapter at every strength, until a signal comes.

    Args:
        source: A merged directory or hub id, or what a dial is made of.
        flags: vLLM's.
        settings: Limits; what is served, and the rules for media, are filled in here.
        page: Whether there is a page for browsers.

    Raises:
        MergekitBioError: The source cannot be served, or not with these flags, or there are no keys to be
            read, or the request log cannot be written.
        MissingPackageError: vLLM is not installed, or Gradio, which the page needs.
    """
    from mergekit_bio.engine.vllm.cpu_memory import cache_memory
    from mergekit_bio.engine.vllm.leaving import keep_ctrl_c_for_this_process, leave_without_leaks
    from mergekit_bio.engine.vllm.plugin import register, require_vllm
    from mergekit_bio.engine.vllm.start import interruptible, objections

    if settings.api_keys is not None:
        read_keys(settings.api_keys)  # what is wrong with them is said now
        if is_open_to_all(settings.api_keys):
            print(f"note: {settings.api_keys}: everybody on this machine can read it; chmod o-r it", file=sys.stderr)
    if settings.request_log is not None:
        RequestLog(settings.request_log).close()
        if settings.request_log == STANDARD_OUTPUT:  # which then has nothing else; vLLM reads this when it is imported
            os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    leave_without_leaks()
    require_vllm()
    if page and find_spec("gradio") is None:
        raise MissingPackageError("gradio", "page", "serve --page")
    register()
    check_flags(flags)
    with ExitStack() as stack:
        # 1. What is served, on the disk.
        dial: PreparedDial | None = None
        if isinstance(source, DialRequest):
            dial = stack.enter_context(prepared_dial(source))
            told = DialSettings(str(dial.adapters), source.default, source.aliases, dial.revision, dial.weights)
            settings = replace(settings, dial=told)
            checkpoint, names = dial.model, [dial.name, *source.aliases]
        else:
            found = resolve(source)
            if several := checkpoints_of_sweep(found.path):
                raise EngineError(
                    f"{source}: is a sweep; name one of the folders in it: {', '.join(path.name for path in several)}. "
                    f"All of them are served with: mergekit-bio serve {source}/* --dial"
                )
            checkpoint, names = found.path.resolve(), [found.name]
        # 2. vLLM's arguments, and what our parts in its processes need to know.
        args = parse_flags(checkpoint, names, flags, dial)
        check_vllms_keys(args.api_key)
        check_certificate(args)
        if settings.request_log is not None:
            args.middleware.append("mergekit_bio.serve.request_log.RequestLogger")
            args.disable_uvicorn_access_log |= settings.request_log == STANDARD_OUTPUT
        if page:
            if args.api_server_count not in (None, 1):
                raise EngineError("--page needs one API server, for a visitor's requests belong together")
            args.api_server_count = 1
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mergekit-bio-page-"))
            settings = replace(settings, page=folder)
        if (cache := cache_memory(checkpoint, cache_options(args, flags))) is not None:
            args.kv_cache_memory_bytes = cache.bytes
            print(f"note: {cache.in_words}", file=sys.stderr)
        settings = replace(
            settings,
            directory=str(checkpoint),
            names=tuple(args.served_model_name),
            prompt_template=prompt_template(args),
            allowed_local_media_path=args.allowed_local_media_path or None,
            allowed_media_domains=tuple(args.allowed_media_domains or ()),
        )
        if dial is not None:
            name = settings.names[0]
            print(f"note: {name}@0 to {name}@{LARGEST // 1000} are served {dial.weights}", file=sys.stderr)
        plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
        os.environ |= settings.to_environment() | {
            # vLLM adds routes only for plugins that are named here.
            "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, PLUGIN])),
            "VLLM_MEDIA_CONNECTOR": PLUGIN,
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # it lets a client name any path
            "VLLM_USE_RUST_FRONTEND": "0",  # it knows neither our routes nor the guard
        }
        if args.structured_outputs_config.backend == "guidance":
            # What vLLM holds a call of a function to is written for xgrammar, and guidance refuses it.
            os.environ.setdefault("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0")
        from vllm.entrypoints.cli.serve import ServeSubcommand

        # 3. The server, until a signal comes.
        signal.signal(signal.SIGINT, _interrupt)
        keep_ctrl_c_for_this_process()
        with interruptible(), objections(Path(args.model)), address_errors(args):
            ServeSubcommand.cmd(args)


def _named(flags: Sequence[str]) -> set[str]:
    """The names of the flags that are given. vLLM warns of one that comes twice."""
    return {flag.partition("=")[0].replace("_", "-") for flag in flags}


def _interrupt(signum: int, frame: object) -> NoReturn:
    """What Python does on Ctrl-C; but asyncio puts its own, which waits for vLLM, in the place of Python's only."""
    raise KeyboardInterrupt


def prompt_template(args: Any) -> str | None:
    """What the chat template makes of one user's turn, with ``{}`` for it; None for a template that a flag gives."""
    return LLAMA3_TEMPLATE if args.chat_template == _chat_template(Path(args.model)) else None


def _chat_template(checkpoint: Path) -> str:
    return server_chat_template(read_json(inside(checkpoint, "processor_config.json"))["audio_token"])
