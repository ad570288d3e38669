"""A prompt's beam search, fed by greedy decoding: the one beam search of the offline and the online engine.

A search wants the likeliest next tokens of each of its beams at every step. A request for one token a beam and step
would tell them, but a request costs far more than a token. So a request decodes greedily behind a beam and tells the
likeliest tokens at each step: a rollout.

1. While a beam goes on as greedy decoding does, its rollout has the answers, and nothing is asked.
2. Where a beam goes on with another token, it has left all rollouts, and a new one is asked for behind it. Its prompt
   lies in vLLM's prefix cache.
3. A rollout that no beam follows any more is given up at once.

So the engine decodes about one row for each beam, as if it knew of beams, and is asked once for each fork.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from mergekit_bio.engine.decoding.beams import BeamSearch
from mergekit_bio.engine.interface import Decoding, Generation
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.engine.vllm.requests import MAX_LOGPROBS, continued
from mergekit_bio.errors import EngineError

#: Tokens of a rollout at most. In a busy server a fork waits for its turn while the other rollouts of its prompt go on,
#: perhaps for nothing; this bounds how far.
_ROLLOUT_TOKENS = 64

#: Numbers the rollouts of this process.
_numbers = itertools.count()


@dataclass(eq=False)
class Rollout:
    """A greedy request behind a beam.

    Attributes:
        request_id: Its name in the engine.
        request: The prompt with the beam's tokens, in vLLM's form.
        params: Its ``SamplingParams``.
        token_ids: The beam's tokens and what was decoded behind them so far.
    """

    request_id: str
    request: dict[str, Any]
    params: Any
    token_ids: tuple[int, ...]


class PromptBeams:
    """The beam search of one prompt.

    Whoever has the engine runs :attr:`rollouts` and hands what comes of them to :meth:`take`, which says what to start
    and what to give up, until :attr:`done`.

    Args:
        request: The prompt in vLLM's form.
        decoding: How to generate.
        tokenization: Of the checkpoint.

    Attributes:
        rollouts: Those that run or are to be started.

    Raises:
        EngineError: A step would need more log-probabilities than vLLM gives.
    """

    def __init__(self, request: dict[str, Any], decoding: Decoding, tokenization: Tokenization) -> None:
        self._eos = tokenization.end_tokens(decoding)
        self._placeholder = tokenization.audio_token_id
        self._search = BeamSearch(
            num_beams=decoding.num_beams,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_ids=self._eos,
            length_penalty=decoding.length_penalty,
            early_stopping=decoding.early_stopping,
        )
        self._width = self._search.width
        if self._width >= MAX_LOGPROBS:
            raise EngineError(
                f"{decoding.num_beams} beams with {len(self._eos)} end tokens need {self._width + 1} "
                f"log-probabilities a step; the engine gives {MAX_LOGPROBS}: take fewer beams"
            )
        self._request, self._decoding, self._tokenization = request, decoding, tokenization
        # Beam -> its likeliest next tokens with their log-probabilities, where a rollout has told them.
        self._known: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        self.rollouts = [self._rollout(())]

    @property
    def done(self) -> bool:
        """Whether the best hypothesis is found."""
        return self._search.done

    @property
    def begun(self) -> bool:
        """Whether the engine has read the prompt."""
        return any(beam.token_ids for beam in self._search.running)

    def take(self, rollout: Rollout, output: Any) -> tuple[list[Rollout], list[Rollout]]:
        """Make the steps that a rollout's new tokens allow.

        Args:
            rollout: One of :attr:`rollouts`.
            output: vLLM's output for it, with what is new since the last.

        Returns:
            The rollouts to start, and those to give up.

        Raises:
            EngineError: vLLM gave the request up.
        """
        (completion,) = output.outputs
        if completion.finish_reason not in (None, "stop", "length"):
            raise gave_up()
        # 1. What the rollout tells: at each of its tokens, which others could have stood there.
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
            self._known[rollout.token_ids] = self._likeliest(entries)
            rollout.token_ids += (token,)
        if output.finished:
            self.rollouts.remove(rollout)
        # 2. Search as far as all beams are known.
        search, before = self._search, self._search.running
        while not search.done and all(beam.token_ids in self._known for beam in search.running):
            search.advance([self._known[beam.token_ids] for beam in search.running])
        if search.running is before and not output.finished:  # as at most tokens: others are waited for
            return [], []
        # 3. Forget what no beam follows. All beams are of one length, and nothing that they follow is shorter.
        beams = [] if search.done else [beam.token_ids for beam in search.running]
        length = len(beams[0]) if beams else 0
        self._known = {path: tokens for path, tokens in self._known.items() if path[:length] in beams}
        abandoned = [running for running in self.rollouts if running.token_ids[:length] not in beams]
        # 4. Ask for the beams of which nothing is known and nothing is under way.
        under_way = {running.token_ids for running in self.rollouts}
        forks = [self._rollout(beam) for beam in beams if beam not in self._known and beam not in under_way]
        self.rollouts = [running for running in self.rollouts if running not in abandoned] + forks
        return forks, abandoned

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

    def _rollout(self, beam: tuple[int, ...]) -> Rollout:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=min(_ROLLOUT_TOKENS, self._decoding.max_new_tokens - len(beam)),
            temperature=0,
            ignore_eos=True,
            # No beam goes on behind an end token, or behind the placeholder, which is no token to generate.
            stop_token_ids=[*self._eos, self._placeholder],
            # One more than the search looks at, for the placeholder, which is left out.
            logprobs=self._width + 1,
            output_kind=RequestOutputKind.DELTA,
            detokenize=False,
        )
        return Rollout(f"beam-{next(_numbers)}", continued(self._request, beam), params, beam)

    def _likeliest(self, entries: Any) -> list[tuple[int, float]]:
        """The likeliest next tokens but the placeholder, with their log-probabilities."""
        extensions = [(token, entry.logprob) for token, entry in entries.items() if token != self._placeholder]
        return sorted(extensions, key=lambda extension: extension[1], reverse=True)[: self._width]


def gave_up() -> EngineError:
    """The error of a request that vLLM ended before its time."""
    return EngineError("vLLM gave the request up, as it does when the server stops")
