"""The fast engine: vLLM in this process, with Transformers' beam search on top."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.decoding.beams import BeamSearch, candidates
from mergekit_bio.engine.decoding.labels import Query, build_trie, choose, score_labels
from mergekit_bio.engine.interface import Decoding, Generation, LabelScore, Loaded, Prompt, Timings
from mergekit_bio.engine.prefix_cache import PrefixCache
from mergekit_bio.engine.sweep import difference
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.errors import EngineError, PromptError

#: Log-probabilities a token that a beam search may ask for, at most.
MAX_LOGPROBS = 128

#: Added to the placeholder's logit, so that it is never generated: as a token it means nothing.
_NEVER = -100.0

_EXTENSION = "mergekit_bio.engine.vllm.model.WeightReload"

#: How long vLLM's processes may take to end by themselves; then they are killed.
_SECONDS_TO_STOP = 30.0

#: The engines of this process that are running.
_open: set[int] = set()

#: Those that wait for the others to be closed.
_closed: list[Any] = []


class VllmEngine:
    """Continuous batching and prefix caching; on GPUs, also tensor parallel and on Ray.

    Beams and closed lists are loops over one-token requests: each step's prompts lie in the prefix cache, whole
    blocks of them at least.

    Args:
        checkpoint: A merged directory, or a hub id.
        dtype: Of Llama and its cache; ``"auto"`` takes the checkpoint's.
        max_model_len: Longest prompt and answer together; by default what fits the model and 16384.
        max_audios: Most audios in a prompt.
        prefixes: Where audio prefixes come from; by default vLLM runs the tower.
        **vllm_options: More arguments of ``vllm.LLM``, such as ``tensor_parallel_size`` or ``enforce_eager``.

    Attributes:
        prefixes: Where audio prefixes come from; may be changed between calls.

    Raises:
        EngineError: vLLM cannot run the checkpoint, or not with these options.
        MissingPackageError: vLLM is not installed.
    """

    name = "vllm"

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
        from mergekit_bio.engine.vllm.plugin import register, require_vllm, worker_class
        from mergekit_bio.engine.vllm.start import interruptible, objections

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
        with interruptible(), objections(self.checkpoint):
            self._llm = LLM(
                str(self.checkpoint),
                dtype=dtype,
                max_model_len=self._max_len,
                limit_mm_per_prompt={"audio": max_audios},
                enable_mm_embeds=True,
                max_logprobs=MAX_LOGPROBS,
                worker_extension_cls=_EXTENSION,
                disable_log_stats=False,  # with them come the times of first tokens
                generation_config="vllm",  # every setting comes with the request
                **{"worker_cls": worker_class(), "use_tqdm_on_load": False} | vllm_options,
            )
        _open.add(id(self))

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """See :meth:`mergekit_bio.engine.interface.Engine.generate`."""
        requests = [self._request(prompt, room=decoding.max_new_tokens) for prompt in prompts]
        eos = decoding.eos_token_ids if decoding.eos_token_ids is not None else self.tokenization.eos_token_ids
        if decoding.num_beams > 1:
            return self._beams(prompts, requests, decoding, eos)
        placeholder = self.tokenization.audio_token_id
        params = [sampling_params(decoding, eos, placeholder, seed=decoding.seed + n) for n in range(len(requests))]
        start = time.perf_counter()
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return [self._generation(output, eos, seconds) for output in outputs]

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """See :meth:`mergekit_bio.engine.interface.Engine.choose`."""
        root = build_trie(labels, self.tokenization.encode)
        start = time.perf_counter()
        requests = [self._request(prompt, room=1) for prompt in prompts]
        choices = choose(
            root,
            prompts=len(prompts),
            eos_token_ids=self.tokenization.eos_token_ids,
            next_logprobs=self._next_logprobs(requests),
        )
        timings = Timings(total=time.perf_counter() - start)
        return [
            Generation(choice.label, choice.token_ids, choice.logprobs, "stop", self._length(prompt, request), timings)
            for choice, prompt, request in zip(choices, prompts, requests, strict=True)
        ]

    def loglikelihood(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[list[LabelScore]]:
        """See :meth:`mergekit_bio.engine.interface.Engine.loglikelihood`."""
        root = build_trie(labels, self.tokenization.encode)
        requests = [self._request(prompt, room=1) for prompt in prompts]
        return score_labels(root, labels, prompts=len(prompts), next_logprobs=self._next_logprobs(requests))

    def load(self, checkpoint: str | Path) -> Loaded:
        """See :meth:`mergekit_bio.engine.interface.Engine.load`."""
        start = time.perf_counter()
        target = resolve(checkpoint).path
        change = difference(self.checkpoint, target)
        try:
            fingerprints = {change.check(loaded) for loaded in self._replace(target, change.names)}
        except EngineError:
            self._replace(self.checkpoint, change.names)  # back to what was sound
            raise
        finally:
            self._reset_caches()
        self.checkpoint = target
        return Loaded(target, len(change.names), change.nbytes, time.perf_counter() - start, fingerprints.pop())

    def close(self) -> None:
        """Stop vLLM and free its memory.

        The engines of one process share vLLM's communication groups, which the first one to stop would take down: an
        engine that is not the last to be closed is kept until then.
        """
        import gc

        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        _open.discard(id(self))
        _closed.append(self._llm)
        del self._llm
        if not _open:
            for llm in _closed:
                llm.llm_engine.engine_core.shutdown(timeout=_SECONDS_TO_STOP)
            del llm
            _closed.clear()
            gc.collect()
            cleanup_dist_env_and_memory()

    def _replace(self, checkpoint: Path, names: Sequence[str]) -> list[dict[str, str]]:
        """Replace tensors in every worker; each reads them whole and says what it read."""
        if not names:
            return [{}]
        answers: list[dict[str, str]] = self._llm.collective_rpc("reload_tensors", args=(str(checkpoint), list(names)))
        return answers

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
                f"{self._max_len}; raise max_model_len, or give fewer audios or examples"
            )
        request: dict[str, Any] = {"prompt_token_ids": ids}
        if prompt.audios:
            audio = list(prompt.audios) if self.prefixes is None else self.prefixes(prompt.audios)
            request["multi_modal_data"] = {"audio": audio}
            # Known by content already: vLLM need not hash it again at every step.
            request["multi_modal_uuids"] = {"audio": [clip.digest for clip in prompt.audios]}
        return request

    def _length(self, prompt: Prompt, request: dict[str, Any]) -> int:
        return self.tokenization.prompt_length(request["prompt_token_ids"], prompt.audios)

    def _generation(self, output: Any, eos: Sequence[int], seconds: float) -> Generation:
        (completion,) = output.outputs
        ids = tuple(completion.token_ids)
        metrics = output.metrics
        total = metrics.last_token_ts - metrics.queued_ts if metrics else seconds
        return Generation(
            text=self.tokenization.decode(ids),
            token_ids=ids,
            logprobs=tuple(step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)),
            finish_reason="stop" if ids[-1] in eos else "length",
            prompt_tokens=len(output.prompt_token_ids),
            timings=Timings(total=total, first_token=metrics.first_token_latency if metrics else None),
        )

    def _beams(
        self, prompts: Sequence[Prompt], requests: list[dict[str, Any]], decoding: Decoding, eos: Sequence[int]
    ) -> list[Generation]:
        width = candidates(num_beams=decoding.num_beams, eos=len(eos))
        if width >= MAX_LOGPROBS:
            raise EngineError(
                f"{decoding.num_beams} beams with {len(eos)} end tokens need {width + 1} log-probabilities a step; "
                f"the engine gives {MAX_LOGPROBS}: take fewer beams"
            )
        params = self._one_token(logprobs=width + 1)  # one more, for the placeholder that is left out
        generations: list[Generation] = []
        lengths = [self._length(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
        for group in self._groups(lengths, beams=decoding.num_beams, room=decoding.max_new_tokens):
            start = time.perf_counter()
            searches = [
                BeamSearch(
                    num_beams=decoding.num_beams,
                    max_new_tokens=decoding.max_new_tokens,
                    eos_token_ids=eos,
                    length_penalty=decoding.length_penalty,
                    early_stopping=decoding.early_stopping,
                )
                for _ in group
            ]
            seconds = [0.0] * len(group)
            while going := [n for n, search in enumerate(searches) if not search.done]:
                steps = [(group[n], beam.token_ids) for n in going for beam in searches[n].running]
                outputs = iter(self._step([_continued(requests[n], ids) for n, ids in steps], params))
                for n in going:
                    searches[n].advance(
                        [
                            likeliest(next(outputs), width, without=self.tokenization.audio_token_id)
                            for _ in searches[n].running
                        ]
                    )
                    seconds[n] = time.perf_counter() - start
            for n, search, taken in zip(group, searches, seconds, strict=True):
                best = search.finished[0]
                generations.append(
                    Generation(
                        text=self.tokenization.decode(best.token_ids),
                        token_ids=best.token_ids,
                        logprobs=best.logprobs,
                        finish_reason="stop" if best.token_ids[-1] in eos else "length",
                        prompt_tokens=lengths[n],
                        timings=Timings(total=taken),
                        score=best.score,
                    )
                )
        return generations

    def _next_logprobs(self, requests: list[dict[str, Any]]) -> Callable[[Sequence[Query]], list[list[float]]]:
        """What walks a trie of labels: each query is a one-token request that names the tokens it asks about."""

        def ask(queries: Sequence[Query]) -> list[list[float]]:
            from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS as LIMIT

            parts = [
                (n, tokens, asked[start : start + LIMIT])
                for n, tokens, asked in queries
                for start in range(0, len(asked), LIMIT)
            ]
            outputs = iter(
                self._step(
                    [_continued(requests[n], tokens) for n, tokens, _ in parts],
                    [self._one_token(logprob_token_ids=list(asked)) for _, _, asked in parts],
                )
            )
            answers: list[list[float]] = []
            for _, _, asked in queries:
                answer: list[float] = []
                for start in range(0, len(asked), LIMIT):
                    (found,) = next(outputs).outputs[0].logprobs
                    answer += [found[token].logprob for token in asked[start : start + LIMIT]]
                answers.append(answer)
            return answers

        return ask

    def _one_token(self, **asked: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, **asked)

    def _step(self, requests: list[dict[str, Any]], params: Any) -> list[Any]:
        if not requests:
            return []
        outputs: list[Any] = self._llm.generate(requests, params, use_tqdm=False)
        return outputs

    def _groups(self, lengths: Sequence[int], *, beams: int, room: int) -> Iterator[list[int]]:
        """Prompts in order, so many at once that their beams stay in the prefix cache from step to step."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        capacity = (cache.num_gpu_blocks or 1) * cache.block_size
        group: list[int] = []
        used = 0
        for n, length in enumerate(lengths):
            # A beam has blocks of its own from where it parts from the others.
            needed = length + beams * (room + cache.block_size)
            if group and used + needed > capacity:
                yield group
                group, used = [], 0
            group.append(n)
            used += needed
        if group:
            yield group


def _continued(request: dict[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
    return request | {"prompt_token_ids": [*request["prompt_token_ids"], *token_ids]}


def sampling_params(decoding: Decoding, eos: Sequence[int], placeholder: int, *, seed: int) -> Any:
    """Greedy or sampled generation as vLLM's ``SamplingParams``."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        seed=seed if decoding.temperature > 0 else None,
        ignore_eos=True,
        stop_token_ids=list(eos),
        logit_bias={placeholder: _NEVER},
        logprobs=0,
        detokenize=False,
    )


def likeliest(output: Any, width: int, *, without: int) -> list[tuple[int, float]]:
    """The likeliest next tokens of a one-token request, leaving one out, with their log-probabilities."""
    found = [(token, entry.logprob) for token, entry in output.outputs[0].logprobs[0].items() if token != without]
    return sorted(found, key=lambda extension: extension[1], reverse=True)[:width]
