"""Prompts as requests to vLLM, and what its answers say; the beam search that the offline and online engine share."""

from collections.abc import Sequence
from typing import Any

from mergekit_bio.engine.decoding.beams import BeamSearch
from mergekit_bio.engine.interface import Decoding, Generation
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.errors import EngineError

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


def one_token(**wanted: Any) -> Any:
    """``SamplingParams`` of a request for the next token, with the log-probabilities that are wanted."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, **wanted)


def generation(
    output: Any, decoding: Decoding, tokenization: Tokenization, *, prompt_tokens: int, seconds: float
) -> Generation:
    """A finished request's answer."""
    (completion,) = output.outputs
    token_ids = tuple(completion.token_ids)
    logprobs = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]
    return tokenization.generation(token_ids, logprobs, decoding, prompt_tokens=prompt_tokens, seconds=seconds)


class PromptBeams:
    """The beam search of one prompt, fed by requests for one token.

    Whoever has the engine runs what :meth:`requests` gives and hands the outputs to :meth:`advance`, until
    :attr:`done`.

    Args:
        request: The prompt in vLLM's form.
        decoding: How to generate.
        tokenization: Of the checkpoint.

    Raises:
        EngineError: A step would need more log-probabilities than vLLM gives.
    """

    def __init__(self, request: dict[str, Any], decoding: Decoding, tokenization: Tokenization) -> None:
        eos = tokenization.end_tokens(decoding)
        self._search = BeamSearch(
            num_beams=decoding.num_beams,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_ids=eos,
            length_penalty=decoding.length_penalty,
            early_stopping=decoding.early_stopping,
        )
        width = self._search.width
        if width >= MAX_LOGPROBS:
            raise EngineError(
                f"{decoding.num_beams} beams with {len(eos)} end tokens need {width + 1} log-probabilities a step; the "
                f"engine gives {MAX_LOGPROBS}: take fewer beams"
            )
        self._request, self._decoding, self._tokenization = request, decoding, tokenization
        # One more than the search looks at, for the placeholder, which is left out.
        self.params = one_token(logprobs=width + 1)

    @property
    def done(self) -> bool:
        """Whether the best hypothesis is found."""
        return self._search.done

    def requests(self) -> list[dict[str, Any]]:
        """What has to be asked for the next step: the prompt with every running beam's tokens behind it."""
        return [continued(self._request, beam.token_ids) for beam in self._search.running]

    def advance(self, outputs: Sequence[Any]) -> None:
        """Make a step with vLLM's outputs for :meth:`requests`, in their order."""
        self._search.advance([self._likeliest(output) for output in outputs])

    def generation(self, *, prompt_tokens: int, seconds: float) -> Generation:
        """The best hypothesis, once it is found."""
        best = self._search.finished[0]
        return self._tokenization.generation(
            best.token_ids,
            best.logprobs,
            self._decoding,
            prompt_tokens=prompt_tokens,
            seconds=seconds,
            score=best.score,
        )

    def _likeliest(self, output: Any) -> list[tuple[int, float]]:
        """The likeliest next tokens but the placeholder, with their log-probabilities."""
        entries = output.outputs[0].logprobs[0].items()
        placeholder = self._tokenization.audio_token_id
        extensions = [(token, entry.logprob) for token, entry in entries if token != placeholder]
        return sorted(extensions, key=lambda extension: extension[1], reverse=True)[: self._search.width]
