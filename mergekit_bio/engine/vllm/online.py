"""One prompt through vLLM's asynchronous engine: greedy, sampled, or with Transformers' beam search."""

import asyncio
import uuid
from typing import Any

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.decoding.beams import BeamSearch, candidates
from mergekit_bio.engine.interface import Decoding, Generation, Timings
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.engine.vllm.offline import MAX_LOGPROBS, likeliest, sampling_params
from mergekit_bio.errors import EngineError, PromptError


async def answer(
    engine: Any, tokenization: Tokenization, *, prompt: str, clips: list[Clip], decoding: Decoding
) -> Generation:
    """Answer a complete prompt.

    Args:
        engine: vLLM's ``EngineClient``.
        tokenization: Of the checkpoint that it runs.
        prompt: Headers included, with a slot for each clip.
        clips: The audios.
        decoding: How to generate.

    Raises:
        PromptError: The prompt does not fit.
        EngineError: vLLM gave it up.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    ids = tokenization.processor.tokenize(prompt)
    length = tokenization.prompt_length(ids, clips)
    limit = engine.model_config.max_model_len
    if length + decoding.max_new_tokens > limit:
        raise PromptError(
            f"the prompt is {length} tokens long and {decoding.max_new_tokens} are to follow, but the server takes "
            f"{limit}"
        )
    request: dict[str, Any] = {"prompt_token_ids": ids}
    if clips:
        request["multi_modal_data"] = {"audio": list(clips)}
        request["multi_modal_uuids"] = {"audio": [clip.digest for clip in clips]}
    eos = decoding.eos_token_ids if decoding.eos_token_ids is not None else tokenization.eos_token_ids
    placeholder = tokenization.audio_token_id
    score = None
    if decoding.num_beams == 1:
        output = await _run(engine, request, sampling_params(decoding, eos, placeholder, seed=decoding.seed))
        token_ids = tuple(output.outputs[0].token_ids)
        logprobs = tuple(s[t].logprob for s, t in zip(output.outputs[0].logprobs, token_ids, strict=True))
    else:
        best = await _beams(engine, request, decoding, eos, placeholder)
        token_ids, logprobs, score = best.token_ids, best.logprobs, best.score
    return Generation(
        text=tokenization.decode(token_ids),
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason="stop" if token_ids[-1] in eos else "length",
        prompt_tokens=length,
        timings=Timings(total=loop.time() - start),
        score=score,
    )


async def _beams(
    engine: Any, request: dict[str, Any], decoding: Decoding, eos: tuple[int, ...], placeholder: int
) -> Any:
    from vllm import SamplingParams

    width = candidates(num_beams=decoding.num_beams, eos=len(eos))
    if width >= MAX_LOGPROBS:
        raise EngineError(f"{decoding.num_beams} beams are too many for {len(eos)} end tokens")
    search = BeamSearch(
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_ids=eos,
        length_penalty=decoding.length_penalty,
        early_stopping=decoding.early_stopping,
    )
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, logprobs=width + 1)
    while not search.done:
        steps = [
            _run(engine, request | {"prompt_token_ids": [*request["prompt_token_ids"], *beam.token_ids]}, params)
            for beam in search.running
        ]
        search.advance([likeliest(output, width, without=placeholder) for output in await asyncio.gather(*steps)])
    return search.finished[0]


async def _run(engine: Any, request: dict[str, Any], params: Any) -> Any:
    """Drain one request; when the client goes away, vLLM is told to drop it."""
    output = None
    async for partial in engine.generate(request, params, f"predict-{uuid.uuid4().hex}"):
        output = partial
    if output is None or output.outputs[0].finish_reason == "abort":  # its answer may have no token
        raise EngineError("vLLM gave the request up, as it does when the server stops")
    return output
