"""Beam search for one prompt with Transformers' semantics, as a state machine that any engine can drive.

Follows ``GenerationMixin._beam_search`` of huggingface/transformers: of the extensions of all beams the best
``max(2, 1 + end tokens) * beams`` are looked at; of these, the ones that end and are among the best ``beams`` become
finished hypotheses, scored by their mean (to the length penalty) log-probability; the best that do not end go on.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mergekit_bio.engine.interface import EarlyStopping


@dataclass(frozen=True)
class Hypothesis:
    """A sequence of generated tokens.

    Attributes:
        token_ids: The tokens.
        logprobs: Of each token.
        total: Their sum.
        score: ``total / len(token_ids) ** length_penalty``, once finished.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    score: float = float("-inf")

    def extended(self, token_id: int, logprob: float) -> "Hypothesis":
        """With one token more."""
        return Hypothesis((*self.token_ids, token_id), (*self.logprobs, logprob), self.total + logprob)


class BeamSearch:
    """The state of one prompt's search.

    Args:
        num_beams: How many beams go on and how many finished hypotheses are kept.
        max_new_tokens: Where every beam ends.
        eos_token_ids: Tokens that end a beam.
        length_penalty: Exponent of the length that a finished hypothesis's log-probability is divided by.
        early_stopping: Stop with ``num_beams`` finished hypotheses (True), when the running beams are unlikely to get
            better (False), or when they cannot (``"never"``).

    Attributes:
        running: The beams to extend, best first; one, empty, at the beginning.
        finished: The best finished hypotheses, best first.
        done: Nothing is left to do.
    """

    def __init__(
        self,
        *,
        num_beams: int,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
    ) -> None:
        self._num_beams, self._max_new_tokens = num_beams, max_new_tokens
        self._eos = frozenset(eos_token_ids)
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self.running: list[Hypothesis] = [Hypothesis()]
        self.finished: list[Hypothesis] = []
        self.done = False

    @property
    def width(self) -> int:
        """Extensions looked at in a step, so that ``num_beams`` that do not end are among them.

        So many of each beam are enough for :meth:`advance`.
        """
        return max(2, 1 + len(self._eos)) * self._num_beams

    def advance(self, extensions: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Make one step.

        Args:
            extensions: For each running beam its likeliest next tokens with their log-probabilities.
        """
        # 1. Rank all extensions of all beams by their log-probability.
        every = [
            (beam.total + logprob, beam, token_id, logprob)
            for beam, options in zip(self.running, extensions, strict=True)
            for token_id, logprob in options
        ]
        best = sorted(every, key=lambda extension: extension[0], reverse=True)[: self.width]
        ranked = [beam.extended(token_id, logprob) for _, beam, token_id, logprob in best]
        length = len(ranked[0].token_ids)
        ended = [h.token_ids[-1] in self._eos or length == self._max_new_tokens for h in ranked]
        # 2. Those that end are finished if they are among the best num_beams; a worse one that ends is dropped.
        ending = [h for h, end in zip(ranked[: self._num_beams], ended, strict=False) if end]
        scored = [Hypothesis(h.token_ids, h.logprobs, h.total, h.total / length**self._length_penalty) for h in ending]
        self.finished = sorted(self.finished + scored, key=lambda h: h.score, reverse=True)[: self._num_beams]
        # 3. The best that do not end go on.
        self.running = [h for h, end in zip(ranked, ended, strict=True) if not end][: self._num_beams]
        self.done = not self.running or self._is_settled(length)

    def _is_settled(self, length: int) -> bool:
        """Whether the finished hypotheses are as good as they get, by the rule of ``early_stopping``."""
        if len(self.finished) < self._num_beams:
            return False
        if self._early_stopping is True:
            return True
        hopeful = self._early_stopping == "never" and self._length_penalty > 0
        best_length = self._max_new_tokens if hopeful else length
        return self.running[0].total / best_length**self._length_penalty <= self.finished[-1].score
