"""Adapters made by PEFT, merged by us and by PEFT in float64: every setting that shapes the merged weights."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from merging.oracle import neighbours, read_tensors, same_bits, ulps
from merging.tiny import VOCABULARY, Case, load, train, unmerged
from safetensors.torch import load_file

import mergekit_bio

ALPHAS = (0.0, 0.25, 1.0)
TOKENS = torch.arange(24).reshape(2, 12) * 5 % (VOCABULARY - 5)
CASES = [
    Case.of("rank 1", r=1),
    Case.of("rank above the width", r=40),
    Case.of("lora_alpha", lora_alpha=3),
    Case.of("use_rslora", use_rslora=True, r=6),
    Case.of("rank_pattern", rank_pattern={"q_proj": 7, "layers.1.self_attn.v_proj": 3}),
    Case.of("alpha_pattern", alpha_pattern={"k_proj": 5, r".*\.2\..*o_proj": 40}),
    Case.of("first matching pattern wins", alpha_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 9}),
    Case.of("patterns and rslora", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 11}),
    Case.of("fan_in_fan_out", "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    Case.of("fan_in_fan_out, all-linear", "gpt2", target_modules="all-linear", fan_in_fan_out=True),
    Case.of("Conv1D beside Linear", "gpt2", target_modules=["c_proj", "lm_head"], stays_tied=False),
    Case.of("fan_in_fan_out, DoRA", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    Case.of("fan_in_fan_out, bias all", "gpt2", target_modules=["c_fc"], fan_in_fan_out=True, bias="all"),
    Case.of("fan_in_fan_out, lora_bias", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True),
    Case.of("target_modules regex", target_modules=r".*layers\.[02]\..*(up|q)_proj"),
    Case.of("target_modules full name", target_modules=["model.layers.1.mlp.down_proj"]),
    Case.of("all-linear", target_modules="all-linear"),
    Case.of("layers_to_transform", layers_to_transform=[0, 2]),
    Case.of("one layer_to_transform, layers_pattern", layers_to_transform=1, layers_pattern="layers"),
    Case.of("exclude_modules list", exclude_modules=["layers.1.self_attn.q_proj", "o_proj"]),
    Case.of("exclude_modules regex", target_modules="all-linear", exclude_modules=r".*\.mlp\..*"),
    Case.of("bias lora_only", "qwen2", bias="lora_only"),
    Case.of("bias all", "qwen2", bias="all"),
    Case.of("bias all, every projection biased", "llama-biased", bias="all", target_modules=["q_proj"]),
    Case.of("lora_bias", "qwen2", lora_bias=True, target_modules=["q_proj", "v_proj"]),
    Case.of("lora_bias, bias lora_only, rslora", "llama-biased", lora_bias=True, bias="lora_only", use_rslora=True),
    Case.of("modules_to_save norm and head", modules_to_save=["input_layernorm", "lm_head"]),
    Case.of("modules_to_save embedding", modules_to_save=["embed_tokens"]),
    Case.of("modules_to_save a whole block", modules_to_save=["mlp"]),
    Case.of("embedding LoRA", target_modules=["q_proj", "embed_tokens"]),
    Case.of("head LoRA", target_modules=["q_proj", "lm_head"]),
    Case.of("embedding and head LoRA", target_modules=["embed_tokens", "lm_head"]),
    Case.of("tied, attention only", "llama-tied"),
    Case.of("tied, embedding LoRA", "llama-tied", stays_tied=False, target_modules=["q_proj", "embed_tokens"]),
    Case.of("tied, head LoRA", "llama-tied", stays_tied=False, target_modules=["q_proj", "lm_head"]),
    Case.of("tied, embedding saved", "llama-tied", stays_tied=False, modules_to_save=["embed_tokens"]),
    Case.of("tied, head saved", "llama-tied", stays_tied=False, modules_to_save=["lm_head"]),
    Case.of("tied, embedding LoRA kept tied", "llama-tied", target_modules=["embed_tokens"], ensure_weight_tying=True),
    Case.of(
        "tied, embedding saved and kept tied", "llama-tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    Case.of("resized", added_tokens=3),
    Case.of("resized, both sides saved", added_tokens=3, modules_to_save=["embed_tokens", "lm_head"]),
    Case.of("resized, both sides LoRA", added_tokens=3, target_modules=["embed_tokens", "lm_head"]),
    Case.of("resized, tied", "llama-tied", added_tokens=3),
    Case.of("shrunk", added_tokens=-5),
    Case.of("shrunk, tied", "llama-tied", added_tokens=-5),
    Case.of("shrunk, both sides LoRA", added_tokens=-5, target_modules=["embed_tokens", "lm_head"]),
    Case.of("tokens", trainable_token_indices=[3, 5]),
    Case.of("tokens, tied", "llama-tied", trainable_token_indices=[3, 5]),
    Case.of("tokens of both sides", trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [4]}),
    Case.of(
        "tokens of both sides, tied",
        "llama-tied",
        stays_tied=False,
        trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [4]},
    ),
    Case.of("tokens, resized", added_tokens=3, trainable_token_indices=[3, 61, 62, 63]),
    Case.of("tokens, resized, tied", "llama-tied", added_tokens=3, trainable_token_indices=[3, 61, 62, 63]),
    Case.of("DoRA", use_dora=True),
    Case.of("DoRA, rslora, patterns", use_dora=True, use_rslora=True, rank_pattern={"v_proj": 3}),
    Case.of("DoRA, embedding", use_dora=True, target_modules=["embed_tokens", "o_proj"]),
    Case.of("DoRA, tied embedding", "llama-tied", stays_tied=False, use_dora=True, target_modules=["embed_tokens"]),
    Case.of("DoRA, bias all, modules_to_save", "qwen2", use_dora=True, bias="all", modules_to_save=["norm"]),
    Case.of("DoRA, resized, both sides", added_tokens=2, use_dora=True, target_modules=["embed_tokens", "lm_head"]),
    Case.of("initialised by gaussian", init_lora_weights="gaussian"),
    Case.of("initialised by orthogonal", init_lora_weights="orthogonal"),
    Case.of("bfloat16 adapter", adapter_dtype=torch.bfloat16),
    Case.of("float16 adapter, DoRA", adapter_dtype=torch.float16, use_dora=True),
    Case.of("mistral", "mistral", target_modules="all-linear"),
    Case.of("qwen2", "qwen2", target_modules="all-linear", bias="lora_only"),
    Case.of("qwen3", "qwen3", target_modules="all-linear", use_rslora=True),
    Case.of("gemma", "gemma", target_modules="all-linear"),
    Case.of("gemma, embedding LoRA", "gemma", stays_tied=False, target_modules=["embed_tokens", "up_proj"]),
    Case.of("gemma2", "gemma2", target_modules="all-linear", use_dora=True),
    Case.of(
        "everything at once",
        "qwen2",
        target_modules=["q_proj", "k_proj", "embed_tokens", "down_proj"],
        exclude_modules=["layers.1.mlp.down_proj"],
        use_rslora=True,
        rank_pattern={"k_proj": 6},
        alpha_pattern={"down_proj": 3},
        bias="all",
        modules_to_save=["post_attention_layernorm", "lm_head"],
    ),
]


def each_case(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))(test)


@pytest.fixture
def trained(base_of, tmp_path) -> Callable[[Case], tuple[Path, Path, dict[str, torch.Tensor]]]:
    """A case's base, its adapter, and PEFT's float64 merge of the two under the checkpoint's names."""

    def make(case: Case) -> tuple[Path, Path, dict[str, torch.Tensor]]:
        base, adapter = base_of(case.base), tmp_path / "adapter"
        train(case, base, adapter)
        # Where both sides share one weight, PEFT merges the adapter of one side into both, and of both sides twice;
        # so it gets a head of its own to merge into.
        full = unmerged(case, base, adapter, untie=True).merge_and_unload().state_dict()
        if case.stays_tied and "lm_head.weight" not in read_tensors(base):
            del full["lm_head.weight"]
        return base, adapter, full

    return make


def unadapted(base: Path, adapter: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights at alpha 0: the base's, with rows that the adapter adds, without those it lacks."""
    weights = read_tensors(base)
    stored = load_file(adapter / "adapter_model.safetensors")
    if "lm_head.weight" in names and "lm_head.weight" not in weights:
        (embedding,) = (name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
        weights["lm_head.weight"] = weights[embedding]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        places = (f"{module}.base_layer.weight", f"{module}.token_adapter.base_layer.weight", f"{module}.weight")
        resized = next((stored[place] for place in places if place in stored), None)
        if name in weights and resized is not None:
            rows = torch.cat([weights[name].float(), resized[len(weights[name]) :].float()])
            weights[name] = rows[: len(resized)]
    return weights


def rounded_to_nearest(rounded: torch.Tensor, exact: torch.Tensor, base: torch.Tensor) -> bool:
    """Correctly rounded, or as near to it as float32 arithmetic can tell.

    That is the other neighbour where ``exact`` may be a tie; where base and delta nearly cancel, float32 errs by more
    than the distance of the neighbours.

    Args:
        rounded: bfloat16, the result.
        exact: float64, what was to be rounded.
        base: The weight at alpha 0. Float32 errs by a few last places of the larger of ``base`` and the result.
    """
    below, above = neighbours(exact)
    error = 16 * torch.finfo(torch.float32).eps * torch.maximum(exact.abs(), base.double().abs())
    tie = (exact - (below.double() + above.double()) / 2).abs() <= error
    neighbour = (rounded == below) | (rounded == above)
    nearest = (rounded == exact.to(torch.bfloat16)) | ((rounded.double() - exact).abs() <= error)
    return bool((nearest | (neighbour & tie)).all())


@each_case
def test_merge_equals_peft_in_float64_rounded_once(case, trained, tmp_path):
    base, adapter, full = trained(case)
    before = unadapted(base, adapter, full)
    for dtype in ("float32", "bfloat16"):
        settings = {"base": base, "adapter": adapter, "dtype": dtype, "rounding": "nearest", "fsync": False}
        checkpoints = mergekit_bio.merge(**settings, alphas=ALPHAS, out=tmp_path / dtype)
        for alpha, checkpoint in zip(ALPHAS, checkpoints, strict=True):
            merged = read_tensors(checkpoint.path)
            assert set(merged) == set(full)
            changed = 0
            for name, tensor in merged.items():
                exact = before[name].double() + alpha * (full[name] - before[name].double())
                assert tensor.shape == exact.shape, name
                if torch.equal(exact, before[name].double()):
                    assert same_bits(tensor, before[name].to(tensor.dtype)), name
                    continue
                changed += 1
                if dtype == "float32":
                    assert ulps(tensor, exact.float()).max() <= 1, name
                else:
                    assert rounded_to_nearest(tensor, exact, before[name]), name
            assert changed or alpha == 0


@each_case
def test_merged_checkpoint_computes_what_the_unmerged_model_computes(case, trained, tmp_path):
    base, adapter, full = trained(case)
    (checkpoint,) = mergekit_bio.merge(
        base=base, adapter=adapter, alphas=[1.0], out=tmp_path / "out", dtype="float32", fsync=False
    )
    with torch.no_grad():
        expected = unmerged(case, base, adapter)(TOKENS).logits
        actual = load(checkpoint.path)(TOKENS).logits
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    config = json.loads((checkpoint.path / "config.json").read_text())
    assert config["vocab_size"] == VOCABULARY + case.added_tokens
    if "lm_head.weight" in full:
        assert config["tie_word_embeddings"] is False
