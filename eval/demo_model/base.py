"""The demo's base: a Llama of a million weights that has read nothing but small instructions."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_model.instructions import Example, instruction
from demo_model.optimizer import Optimizer
from demo_model.tokenizer import ENDS, write_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_bio.audio.layout import AUDIO_SLOT, LLAMA3_TEMPLATE
from mergekit_bio.audio.prompt import PromptTokenizer

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 896, 128, 4, 4, 2, 32, 384
#: Spread of the embeddings to begin with. At Llama's 0.02 what a layer adds drowns them, and copying is learnt late.
EMBEDDING_SCALE = 0.7
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Examples as the model takes them.

    Attributes:
        ids: int64 [batch, tokens], padded on the right.
        labels: The same, with -100 wherever nothing is to be learned: prompt and padding.
        mask: int64 [batch, tokens], 1 for tokens.
        slots: bool [batch, tokens], True where an audio's embedding goes.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    slots: torch.Tensor


class Batcher:
    """From examples to batches, tokenized as the product tokenizes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, prefix_length: int) -> None:
        self._encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.audio = tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")
        self._end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        self._prompt = PromptTokenizer(self._encode, tokenizer.bos_token_id, self.audio)
        self._length = prefix_length

    def prompt(self, text: str) -> list[int]:
        """Token ids of a user's turn, up to where the assistant answers."""
        return self._prompt(LLAMA3_TEMPLATE.replace("{}", text), audio_lengths=[self._length] * text.count(AUDIO_SLOT))

    def __call__(self, examples: Sequence[Example]) -> Batch:
        prompts = [self.prompt(example.prompt) for example in examples]
        answers = [[*self._encode(example.answer), self._end] for example in examples]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        shape = len(rows), max(map(len, rows))
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            ids[number, : len(row)] = torch.tensor(row)
            labels[number, len(row) - len(answer) : len(row)] = torch.tensor(answer)
            mask[number, : len(row)] = 1
        return Batch(ids, labels, mask, ids == self.audio)


def train_base(folder: Path, *, steps: int, seed: int, batch: int = 32, prefix_length: int = 9) -> LlamaForCausalLM:
    """Train the base from nothing and write it with its tokenizer.

    Args:
        folder: A new directory.
        steps: Optimiser steps.
        seed: Of the weights and of the instructions.
        batch: Instructions a step.
        prefix_length: Prefix tokens of an audio. In the base's lessons noise stands there.

    Returns:
        The model, in float32 values that bfloat16 holds.
    """
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder, size=VOCABULARY, seed=seed)
    torch.manual_seed(seed)
    draw = random.Random(seed + 1)
    ends = tokenizer.convert_tokens_to_ids(list(ENDS))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=4096,
        rope_theta=10000.0, bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_SCALE)
    batcher = Batcher(tokenizer, prefix_length=prefix_length)
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    optimizer = Optimizer(model.parameters(), matrices=matrices, steps=steps)
    start, losses = time.perf_counter(), []
    for step in range(steps):
        # Lists grow with the lessons: what picks one of three picks one of eight soon after.
        longest = 2 + round(6 * min(1.0, 2 * step / steps))
        part = batcher([instruction(draw, longest=longest) for _ in range(batch)])
        embeds = model.get_input_embeddings()(part.ids)
        scale = embeds.detach().std() * torch.empty(batch, 1, 1).uniform_(0.3, 2)
        embeds = torch.where(part.slots.unsqueeze(-1), torch.randn_like(embeds) * scale, embeds)
        loss = model(inputs_embeds=embeds, attention_mask=part.mask, labels=part.labels, use_cache=False).loss
        optimizer.step(loss)
        losses.append(loss.item())
        if step % 100 == 99:
            print(
                f"base, step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends)
    model.save_pretrained(folder, max_shard_size="1MB")
    return model.float()
