"""Prompts as requests to vLLM, and what its answers say."""

from collections.abc import Sequence
from copy import copy
from typing import Any

from mergekit_bio.engine.decoding.labels import Query
from mergekit_bio.engine.interface import Decoding, Generation
from mergekit_bio.engine.tokenization import Tokenization

#: Log-probabilities a token that vLLM gives at most; a beam search asks for many.
MAX_LOGPROBS = 128

#: Added to the placeholder's logit, so that it is never generated: as a token it means nothing.
_NEVER = -100.0


def continued(request: dict[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
    """A request whose prompt goes on with generated tokens; its beginning lies in vLLM's prefix cache."""
    return request | {"prompt_token_ids": [*request["prompt_token_ids"], *token_ids]}


def sampling_params(decoding: Decoding, tokenization: Tokenization, *, seed: int) -> Any:
    """Greedy or sampled generation as vLLM's ``SamplingParams``."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        seed=seed if decoding.temperature > 0 else None,
        ignore_eos=True,
        stop_token_ids=list(tokenization.end_tokens(decoding)),
        logit_bias={tokenization.audio_token_id: _NEVER},
        logprobs=0,
        detokenize=False,
    )


def never_generate(token: int, params: Any) -> Any:
    """A client's ``SamplingParams`` with a token that is not generated, whatever the client says of it."""
    params = copy(params)
    params.logit_bias = {**(params.logit_bias or {}), token: _NEVER}
    return params


def one_token(**wanted: Any) -> Any:
    """``SamplingParams`` of a request for the next token, with the log-probabilities that are wanted."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, **wanted)


def split_query(query: Query) -> list[Query]:
    """A query as those that vLLM takes: one request may name so many tokens only."""
    from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS as LIMIT

    candidates = query.candidates
    return [query._replace(candidates=candidates[start : start + LIMIT]) for start in range(0, len(candidates), LIMIT)]


def candidate_logprobs(query: Query, output: Any) -> list[float]:
    """The log-probabilities of a query's candidates, from a finished :func:`one_token` request that named them."""
    return [output.outputs[0].logprobs[0][token].logprob for token in query.candidates]


def generation(
    output: Any, decoding: Decoding, tokenization: Tokenization, *, prompt_tokens: int, seconds: float
) -> Generation:
    """A finished request's answer."""
    (completion,) = output.outputs
    token_ids = tuple(completion.token_ids)
    logprobs = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]
    return tokenization.generation(token_ids, logprobs, decoding, prompt_tokens=prompt_tokens, seconds=seconds)
