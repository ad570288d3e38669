"""What ``/predict`` and the page ask of the engine: prompts within the server's limits."""

from collections.abc import Sequence
from typing import Any

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.interface import Decoding, Generation
from mergekit_bio.engine.vllm.online import ChoiceScorer, answer
from mergekit_bio.errors import PromptError


def check_size(state: Any, prompt: str, *, audios: int) -> None:
    """Refuse what can never be answered before any work goes into it.

    Args:
        state: The application's, as :class:`mergekit_bio.serve.endpoint.PredictionsEndpoint` has filled it.
        prompt: Complete, with a slot for each audio.
        audios: How many there are.

    Raises:
        PromptError: It is too long to ever fit, or there are more audios than the server takes.
    """
    most = state.mergekit_bio_max_characters
    if len(prompt) > most:
        raise PromptError(f"the prompt has {len(prompt)} characters; more than {most} never fit")
    most = state.vllm_config.model_config.multimodal_config.get_limit_per_prompt("audio")
    if audios > most:
        raise PromptError(f"at most {most} audios may be provided in one prompt")


async def generate(state: Any, *, prompt: str, clips: list[Clip], decoding: Decoding, adapter: Any) -> Generation:
    """Answer a complete prompt; see :func:`mergekit_bio.engine.vllm.online.answer`."""
    engine, tokenization = state.engine_client, state.mergekit_bio_tokenization
    return await answer(engine, tokenization, prompt=prompt, clips=clips, decoding=decoding, adapter=adapter)


async def choose(
    state: Any, *, prompt: str, clips: list[Clip], choices: Sequence[str], negligible: float, adapter: Any
) -> tuple[dict[str, float], int]:
    """Score choices as answers; see :meth:`mergekit_bio.engine.vllm.online.ChoiceScorer.scores`."""
    scorer: ChoiceScorer = state.mergekit_bio_scorer
    return await scorer.scores(prompt=prompt, clips=clips, choices=choices, negligible=negligible, adapter=adapter)
