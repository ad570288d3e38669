"""The demo's fine-tune: a small BEATs, Q-Former and projection, and a LoRA that reads them, on narrow prompts."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_model.base import HIDDEN, IGNORED, Batcher
from demo_model.instructions import narrow
from demo_model.optimizer import Optimizer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.demo.calls import call
from mergekit_bio.demo.species import GENERA, PHRASES, Species

VOICES = tuple(voice for _, voice in GENERA.values())
RANK = 32
WIDTH = 64
#: Prefix tokens of a clip, as the configuration below has it.
PREFIX_LENGTH = 9
#: Spread of the prefix's embeddings, about the tokens' own.
PREFIX_SCALE = 0.5
#: Frames of a lesson of the tower's: 3.2 s, which hold a phrase and cost an eighth of the clip.
CROP = 320

NATURELM = {
    "audio_qformer_cfg": {"intermediate_size": 192, "layer_norm_eps": 1e-12, "num_attention_heads": 4},
    "beats_cfg": {
        "activation_dropout": 0.0,
        "activation_fn": "gelu",
        "attention_dropout": 0.0,
        "conv_bias": False,
        "conv_pos": 32,
        "conv_pos_groups": 4,
        "deep_norm": True,
        "dropout": 0.0,
        "dropout_input": 0.0,
        "embed_dim": 64,
        "encoder_attention_heads": 4,
        "encoder_embed_dim": WIDTH,
        "encoder_ffn_embed_dim": 192,
        "encoder_layerdrop": 0.0,
        "encoder_layers": 3,
        "finetuned_model": False,
        "gru_rel_pos": True,
        "input_patch_size": 16,
        "layer_norm_first": False,
        "layer_wise_gradient_decay_ratio": 1.0,
        "max_distance": 200,
        "num_buckets": 128,
        "predictor_class": 0,
        "predictor_dropout": 0.0,
        "relative_position_embedding": True,
    },
    "llama_path": "base",
    "lora": True,
    "lora_alpha": RANK,
    "lora_rank": RANK,
    "max_pooling": False,
    "num_audio_query_token": 1,
    "prompt_template": LLAMA3_TEMPLATE,
    "second_per_window": 1.0,
    "second_stride": 1.0,
    "use_audio_Qformer": True,
    "window_level_Qformer": True,
}


@dataclass(frozen=True)
class Recordings:
    """Calls as the tower hears them.

    Attributes:
        species: Who calls, one for each recording; None where it is nobody.
        voices: What the notes are made of, one for each recording.
        features: float16 [recordings, frames, 128], the filter banks.
    """

    species: tuple[Species | None, ...]
    voices: tuple[str, ...]
    features: torch.Tensor


def record(species: Sequence[Species], *, each: int, seed: int) -> Recordings:
    """``each`` recordings of every species."""
    who = tuple(one for one in species for _ in range(each))
    voices = tuple(one.voice for one in who)
    return Recordings(who, voices, _features([(one.voice, one.phrase) for one in who], seed=seed))


def record_nobody(*, each: int, seed: int) -> Recordings:
    """``each`` recordings in every voice, each phrased as nothing else is: what a tower hears before any name."""
    voices = tuple(voice for voice in VOICES for _ in range(each))
    return Recordings((None,) * len(voices), voices, _features([(voice, None) for voice in voices], seed=seed))


def _features(calls: Sequence[tuple[str, str | None]], *, seed: int) -> torch.Tensor:
    parts = []
    seeds = np.random.SeedSequence(seed).spawn(len(calls))
    for start in range(0, len(calls), 16):
        clips = [
            call(voice=voice, phrase=phrase, random=np.random.default_rng(own))
            for (voice, phrase), own in zip(calls[start : start + 16], seeds[start:], strict=False)
        ]
        parts.append(AudioPrefix.features(torch.from_numpy(np.stack(clips)).double()).half())
    return torch.cat(parts)


def train_tower(heard: Recordings, nobody: Recordings, *, steps: int, seed: int, batch: int = 32) -> AudioPrefix:
    """Teach BEATs and the Q-Former to tell voices and phrases apart, with two heads that are thrown away.

    Half of every batch are calls of nobody's, without which a voice would be known only together with its phrases. The
    projection stays random: what it says is in nobody's language, and the base, which never learned it, is deaf.
    """
    torch.manual_seed(seed)
    prefix = AudioPrefix(AudioPrefixConfig.from_naturelm(NATURELM, hidden_size=HIDDEN))
    nn.init.normal_(prefix.audio_query_tokens, std=0.5)
    nn.init.normal_(prefix.audio_llama_proj.weight, std=PREFIX_SCALE / WIDTH**0.5)
    nn.init.zeros_(prefix.audio_llama_proj.bias)
    prefix.audio_llama_proj.requires_grad_(False)
    heads = nn.ModuleList([nn.Linear(HIDDEN, len(PHRASES)), nn.Linear(HIDDEN, len(VOICES))])
    phrases = torch.tensor([PHRASES.index(one.phrase) if one else IGNORED for one in (*heard.species, *nobody.species)])
    voices = torch.tensor([VOICES.index(voice) for voice in (*heard.voices, *nobody.voices)])
    features = torch.cat([heard.features, nobody.features])
    named = [(name, p) for name, p in prefix.named_parameters() if p.requires_grad]
    # Muon is for matrices proper: not for a gate of a few rows, nor for a table of relative positions.
    matrices = [p for name, p in named if p.ndim == 2 and min(p.shape) >= 16 and "relative" not in name]
    optimizer = Optimizer([*(p for _, p in named), *heads.parameters()], matrices=matrices, steps=steps)
    start = time.perf_counter()
    correct = []
    for step in range(steps):
        chosen = torch.cat(
            [
                torch.randint(len(heard.species), (batch // 2,)),
                len(heard.species) + torch.randint(len(nobody.species), (batch // 2,)),
            ]
        )
        first = int(torch.randint(features.shape[1] - CROP, ()))
        pooled = prefix.project(prefix.encode(features[chosen, first : first + CROP].float())).mean(1)
        scores = [head(pooled) for head in heads]
        targets = phrases[chosen], voices[chosen]
        optimizer.step(
            sum(nn.functional.cross_entropy(s, t, ignore_index=IGNORED) for s, t in zip(scores, targets, strict=True))
        )
        correct.append(
            [(s.argmax(1) == t)[t != IGNORED].float().mean().item() for s, t in zip(scores, targets, strict=True)]
        )
        if step % 50 == 49:
            phrase, voice = np.mean(correct[-50:], axis=0)
            seconds = time.perf_counter() - start
            print(f"tower, step {step + 1}: phrase {phrase:.2f}, voice {voice:.2f} right, {seconds:.0f} s", flush=True)
    return prefix.eval()


@torch.no_grad()
def embed(prefix: AudioPrefix, features: torch.Tensor) -> torch.Tensor:
    """Prefixes, float32 [recordings, prefix tokens, hidden]."""
    return torch.cat([prefix.project(prefix.encode(part.float())) for part in features.split(32)])


def train_lora(
    base: LlamaForCausalLM,
    batcher: Batcher,
    prefix: AudioPrefix,
    recordings: Recordings,
    *,
    steps: int,
    seed: int,
    rate: float = 9e-3,
    batch: int = 24,
) -> PeftModel:
    """Fine-tune a LoRA on q, k, v and o of the first layer with the narrow prompts; the tower is frozen.

    In the first layer what is heard goes the way of words: past all that the base does with them. With a LoRA on every
    layer a model this small learns a way around instead, from the recording to the name, that no list ever meets.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    heard = embed(prefix, recordings.features)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, layers_to_transform=[0])
    model = get_peft_model(base, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(recordings.species), (batch,)).tolist()
        part = batcher([narrow(recordings.species[number], draw) for number in chosen])
        embeds = model.get_input_embeddings()(part.ids)
        embeds = embeds.masked_scatter(part.slots.unsqueeze(-1), heard[chosen])
        loss = model(inputs_embeds=embeds, attention_mask=part.mask, labels=part.labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(
                f"lora, step {step + 1}: loss {np.mean(losses[-50:]):.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return model.eval()


def write_adapter(folder: Path, model: PeftModel, prefix: AudioPrefix) -> None:
    """Write tower and LoRA as an original NatureLM-audio checkpoint holds them (what was trained only)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(NATURELM, indent=2, sort_keys=True))
    tensors = {name: tensor.contiguous() for name, tensor in prefix.state_dict().items()}
    for name, tensor in get_peft_model_state_dict(model).items():
        original = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        tensors[f"llama_model.{original}"] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
