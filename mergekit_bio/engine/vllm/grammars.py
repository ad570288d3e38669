"""Grammars that llguidance accepts and cannot work with: found before a request reaches the engine.

It checks a grammar's form beforehand, and how much work it is while the engine waits for it: ``(a{1000}){1000}`` takes
a second of everybody's time, and then the answer is empty.
"""

from functools import lru_cache
from threading import Lock
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.structured_output.backend_guidance import GuidanceBackend, serialize_guidance_grammar
from vllm.v1.structured_output.request import get_structured_output_key

#: A tenth and a quarter of what llguidance allows itself: some 2 ms to begin, and 4 ms a token.
_FIRST_FUEL, _STEP_FUEL = 100_000, 50_000
_MAX_CHARACTERS = 1 << 20


class GrammarCheck:
    """Tries grammars: the first token, and what may follow it.

    Args:
        tokenizer: The model's.
        vocab_size: Of the model.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ll_tokenizer: Any = None
        self._building = Lock()
        self._problem = lru_cache(maxsize=64)(self._try)

    def __call__(self, params: Any) -> None:
        """Raise VLLMValidationError for ``SamplingParams`` with a grammar that llguidance gives up on."""
        if getattr(params, "structured_outputs", None) is None:
            return
        kind, specification = get_structured_output_key(params.structured_outputs)
        if len(specification) > _MAX_CHARACTERS:
            raise VLLMValidationError(f"the grammar is longer than {_MAX_CHARACTERS} characters")
        if problem := self._problem(kind, specification):
            raise VLLMValidationError(f"the grammar is too much work: {problem}")

    def _try(self, kind: Any, specification: str) -> str | None:
        import llguidance

        try:
            grammar = serialize_guidance_grammar(kind, specification)
        except (ValueError, KeyError, TypeError):
            return None  # vLLM says so
        with self._building:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = GuidanceBackend._build_ll_tokenizer(self._tokenizer, self._vocab_size)
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=_FIRST_FUEL, step_lexer_fuel=_STEP_FUEL, verbose_errors=False
        )
        matcher = llguidance.LLMatcher(self._ll_tokenizer, grammar, log_level=0, limits=limits)
        if matcher.get_error():
            return None  # likewise
        allowed = matcher.compute_bitmask()
        first = next((8 * n + (byte & -byte).bit_length() - 1 for n, byte in enumerate(allowed) if byte), None)
        if first is not None and not matcher.is_error():
            matcher.consume_token(first)
            if not matcher.is_error() and not matcher.is_stopped():
                matcher.compute_bitmask()
        return " ".join(matcher.get_error().replace("<non-verbose/>", "").split()) or None
