"""What the demo's model does at every strength, measured in the process that trained it: a quick look, no more."""

import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from demo_model.base import Batcher
from demo_model.ears import Recordings, embed
from demo_model.instructions import COMMON_NAME, LEAD, SCIENTIFIC_NAME
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerFast

from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.demo.species import UNHEARD
from mergekit_bio.eval.scoring.statistics import percentile_interval

ALPHAS = tuple(tenth / 10 for tenth in range(11))
BOTH = "Identify the focal species in the audio and provide its taxonomic name followed by a colon and its common name."


def strengths(model: PeftModel, alphas: Sequence[float]) -> Iterator[float]:
    """Set the LoRA to every strength in turn, and back to full at the end."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    full = [dict(layer.scaling) for layer in layers]
    for alpha in (*alphas, None):
        for layer, scaling in zip(layers, full, strict=True):
            layer.scaling.update({name: (1 if alpha is None else alpha) * value for name, value in scaling.items()})
        if alpha is not None:
            yield alpha


@torch.no_grad()
def answer(
    model: PeftModel,
    batcher: Batcher,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    heard: torch.Tensor,
    *,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers to prompts with one audio each; ``heard`` float32 [prompts, prefix tokens, hidden]."""
    rows = [batcher.prompt(prompt) for prompt in prompts]
    answers = [""] * len(rows)
    for length in {len(row) for row in rows}:
        chosen = [number for number, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[number] for number in chosen])
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == batcher.audio).unsqueeze(-1), heard[chosen])
        generated = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for number, row in zip(chosen, generated, strict=True):
            answers[number] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def print_curve(
    model: PeftModel,
    batcher: Batcher,
    tokenizer: PreTrainedTokenizerFast,
    prefix: AudioPrefix,
    *,
    heard: Recordings,
    unheard: Recordings,
    alphas: Sequence[float] = ALPHAS,
) -> None:
    """Print shares of right answers: heard species named, unheard ones picked from a list, both names given."""
    sounds, others = embed(prefix, heard.features), embed(prefix, unheard.features)
    draw = random.Random(0)
    lists = [draw.sample([species.scientific for species in UNHEARD], len(UNHEARD)) for _ in unheard.species]
    closed = [f"{LEAD}{SCIENTIFIC_NAME}\nOutput exactly one of: {', '.join(names)}" for names in lists]

    def ask(prompts: Sequence[str], sounds: torch.Tensor) -> list[str]:
        return answer(model, batcher, tokenizer, prompts, sounds)

    print("alpha  named  picked [95%]       in list  both names  unheard, no list")
    for alpha in strengths(model, alphas):
        named = ask([LEAD + COMMON_NAME] * len(sounds), sounds)
        picked = ask(closed, others)
        both = ask([LEAD + BOTH] * len(sounds), sounds)
        free = ask([LEAD + SCIENTIFIC_NAME] * len(others), others)
        right = _share(map(str.__eq__, named, (species.common for species in heard.species)))
        chosen = _share(map(str.__eq__, picked, (species.scientific for species in unheard.species)))
        kept = _share(text in names for text, names in zip(picked, lists, strict=True))
        pairs = _share(map(str.__eq__, both, (f"{one.scientific} : {one.common}" for one in heard.species)))
        alone = _share(map(str.__eq__, free, (species.scientific for species in unheard.species)))
        low, high = _interval(chosen, len(picked))
        interval = f"{chosen:.2f} [{low:.2f}, {high:.2f}]"
        print(f"{alpha:5.2f}  {right:5.2f}  {interval}  {kept:7.2f}  {pairs:10.2f}  {alone:16.2f}", flush=True)


def _share(right: Iterable[bool]) -> float:
    found = list(right)
    return sum(found) / len(found)


def _interval(share: float, clips: int) -> tuple[float, float]:
    """95% bootstrap interval of a share: resampling right and wrong answers is drawing from a binomial."""
    return percentile_interval(np.random.default_rng(0).binomial(clips, share, 10_000) / clips)
