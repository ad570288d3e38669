"""Prompts through vLLM's asynchronous engine: greedy, sampled, or with Transformers' beam search; and what every
request of a server must have before the engine sees it."""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.interface import Decoding, Generation
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.engine.vllm.beams import PromptBeams, Rollout, gave_up
from mergekit_bio.engine.vllm.dial import Dial
from mergekit_bio.engine.vllm.requests import generation, never_generate, sampling_params
from mergekit_bio.errors import PromptError


def prepare_requests(engine: Any, dial: Dial | None, *, never: int | None, check: Callable[[Any], None] | None) -> None:
    """See to it that no request reaches a server's engine without what it needs, whichever route it came by.

    Args:
        engine: vLLM's ``EngineClient``, which all of its routes ask.
        dial: What gives a request without an adapter the default strength's. None where there are no LoRA slots.
        never: The token that no answer may hold: the audio placeholder. None where vLLM takes no biases.
        check: Raises where it objects to the grammar in a request's ``SamplingParams``; it may take a while.
    """
    generate = engine.generate

    async def prepared(prompt: Any, params: Any, *args: Any, lora_request: Any = None, **named: Any) -> Any:
        if check is not None and params.structured_outputs is not None:
            await asyncio.to_thread(check, params)
        adapter = dial[None] if dial is not None and lora_request is None else lora_request
        if never is not None:
            params = never_generate(never, params)
        async with aclosing(generate(prompt, params, *args, lora_request=adapter, **named)) as outputs:
            async for output in outputs:
                yield output

    engine.generate = prepared


async def answer(
    engine: Any,
    tokenization: Tokenization,
    *,
    prompt: str,
    clips: list[Clip],
    decoding: Decoding,
    adapter: Any = None,
) -> Generation:
    """Answer a complete prompt.

    Args:
        engine: vLLM's ``EngineClient``.
        tokenization: Of the checkpoint that it runs.
        prompt: Headers included, with a slot for each clip.
        clips: The audios.
        decoding: How to generate.
        adapter: vLLM's ``LoRARequest``, where the engine has LoRA slots.

    Raises:
        PromptError: The prompt does not fit.
        EngineError: vLLM gave it up.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    ids = await asyncio.to_thread(tokenization.processor.tokenize, prompt)
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
    if decoding.num_beams > 1:
        beams = PromptBeams(request, decoding, tokenization)
        await _search(engine, beams, adapter)
        return beams.generation(prompt_tokens=length, seconds=loop.time() - start)
    output = await _run(engine, request, sampling_params(decoding, tokenization, seed=decoding.seed), adapter)
    return generation(output, decoding, tokenization, prompt_tokens=length, seconds=loop.time() - start)


async def _search(engine: Any, beams: PromptBeams, adapter: Any) -> None:
    """Run a beam search; when the client goes away, vLLM is told to drop all its requests."""
    tasks: dict[Rollout, asyncio.Task[None]] = {}

    async def follow(rollout: Rollout) -> None:
        # Closed where the search has left it, vLLM's stream drops the request.
        outputs_of = engine.generate(rollout.request, rollout.params, rollout.request_id, lora_request=adapter)
        async with aclosing(outputs_of) as outputs:
            async for output in outputs:
                forks, abandoned = beams.take(rollout, output)
                for other in abandoned:
                    if other is not rollout:
                        tasks.pop(other).cancel()
                for fork in forks:
                    tasks[fork] = group.create_task(follow(fork))
                if rollout in abandoned:
                    return

    try:
        async with asyncio.TaskGroup() as group:
            for rollout in beams.rollouts:
                tasks[rollout] = group.create_task(follow(rollout))
    except ExceptionGroup as failures:
        # One request failed, and the others were dropped.
        raise failures.exceptions[0] from None


async def _run(engine: Any, request: dict[str, Any], params: Any, adapter: Any) -> Any:
    """Drain one request; when the client goes away, vLLM is told to drop it."""
    output = None
    async for partial in engine.generate(request, params, f"predict-{uuid.uuid4().hex}", lora_request=adapter):
        output = partial
    if output is None or output.outputs[0].finish_reason == "abort":  # its answer may have no token
        raise gave_up()
    return output
