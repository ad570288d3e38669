"""Adapters as people have them: incomplete ones and whole ones that look it, other tools' settings, other files."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from merging.architectures import ARCHITECTURES, build, edit, load, logits, merge, train, unmerged
from merging.oracle import read_tensors, same_bits
from merging.tiny import LLAMA, TIED, Case, write_base
from merging.tiny import train as train_case
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mergekit_bio.adapter.inspect import inspect
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.cli.app import app
from mergekit_bio.errors import MergekitBioError
from mergekit_bio.merging.merge import plan_merge
from mergekit_bio.merging.request import MergeRequest
from mergekit_bio.merging.verify import verify

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def made(base_of, tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """A base and an adapter that PEFT has made for it, once for each set of settings; not to be changed."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def make(base: str = "llama", **settings: Any) -> tuple[Path, Path]:
        key = f"{base}-{settings}"
        if key not in known:
            known[key] = root / str(len(known))
            train_case(Case.of(key, base, **settings), base_of(base), known[key])
        return base_of(base), known[key]

    return make


def notes(base: Path, adapter: Path) -> str:
    plan = plan_merge(MergeRequest(base=base, adapter=adapter, alphas=[1.0]))
    return "\n".join(plan.adapters[0].adapter.notes)


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(MergekitBioError) as caught:
        plan_merge(MergeRequest(base=base, adapter=adapter, alphas=[1.0]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(adapter: Path, place: Path, tensors: Callable[[dict], dict] = dict, **settings: Any) -> Path:
    """A copy with other tensors or settings."""
    copy = shutil.copytree(adapter, place)
    save_file(tensors(load_file(copy / WEIGHTS)), copy / WEIGHTS, {"format": "pt"})
    edit(copy / CONFIG, **settings)
    return copy


def without(part: str) -> Callable[[dict], dict]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


# Whole, though the base has more


@pytest.fixture(scope="module")
def with_more_layers(tmp_path_factory) -> Path:
    """A base whose files hold a third layer and one that predicts a further token, and whose configuration has two."""
    base = tmp_path_factory.mktemp("more") / "base"
    config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    layer = {name: tensor for name, tensor in weights.items() if ".layers.1." in name}
    more = {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in layer.items()}
    more |= {name.replace("model.layers.1.", "mtp.layers.0."): tensor.clone() for name, tensor in layer.items()}
    save_file(weights | more, base / "model.safetensors", {"format": "pt"})
    return base


def test_layers_that_transformers_does_not_build_need_no_lora_and_stay(with_more_layers, tmp_path):
    base = with_more_layers
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    train(model, tmp_path / "adapter", {"target_modules": ["q_proj", "down_proj"]})
    assert notes(base, tmp_path / "adapter") == ""
    merged = merge(base, tmp_path / "adapter", tmp_path / "out")
    full = unmerged(model.double(), tmp_path / "adapter").merge_and_unload().state_dict()
    weights, before = read_tensors(merged), read_tensors(base)
    assert weights.keys() == before.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor.double(), full.get(name, before[name].double()), rtol=2.4e-7, atol=1e-9)


def test_a_full_fine_tune_without_the_layers_that_transformers_does_not_build(with_more_layers, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(with_more_layers)
    with torch.no_grad():
        model.lm_head.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    assert "and 17 more tensors" in notes(with_more_layers, tmp_path / "tuned")
    merged = read_tensors(merge(with_more_layers, tmp_path / "tuned", tmp_path / "out"))
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in merged.items() if name in tuned)


def test_a_module_that_is_adapted_and_saved_is_saved(made, tmp_path):
    base, adapter = made(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    merged = merge(base, adapter, tmp_path / "out")
    expected = logits(unmerged(load(base), adapter))
    assert (logits(load(merged)) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_an_adapter_without_a_layer_or_a_module_of_its_targets_is_incomplete(made, tmp_path):
    base, adapter = made(bias="none")
    for part in ("layers.1.", "layers.2.self_attn.k_proj", "v_proj"):
        broken = change(adapter, tmp_path / part, without(part))
        line = refusal(base, broken)
        assert "the adapter is incomplete" in line and part.strip(".") in line


def test_an_adapter_of_the_language_model_alone_says_that_it_has_nothing_for_the_tower(tmp_path):
    build(ARCHITECTURES["llava"]).save_pretrained(tmp_path / "base")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    train(model.model.language_model, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    said = notes(tmp_path / "base", tmp_path / "adapter")
    assert "nothing for vision_tower.encoder.layers, of which its target_modules name 2 modules" in said
    assert "its * is language_model.model.* in the files" in said


# What the file lacks of what the configuration says


@pytest.mark.parametrize(
    ("settings", "part", "said"),
    [
        ({"bias": "lora_only"}, ".bias", "bias 'lora_only', but its file holds no biases"),
        ({"bias": "all"}, ".bias", "bias 'all', but its file holds no biases"),
        ({"modules_to_save": ["lm_head"]}, "lm_head", "lm_head was trained, but its file lacks it"),
        ({"trainable_token_indices": [3]}, "token_adapter", "trainable_token_indices, but its file holds no rows"),
    ],
)
def test_what_a_file_lacks_of_what_its_configuration_says_is_noted(settings, part, said, made, tmp_path):
    base, adapter = made("qwen2", **settings)
    assert notes(base, adapter) == ""
    assert said in notes(base, change(adapter, tmp_path / "lacks", without(part)))


def test_a_base_without_biases_has_none_to_miss(made):
    assert notes(*made("llama", bias="lora_only")) == ""


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "embed_tokens"]}, {"use_dora": True}])
def test_a_lora_that_was_not_trained_is_noted_unless_doras_magnitude_was(settings, made, tmp_path):
    base, adapter = made(**settings)
    assert "zero" not in notes(base, adapter)
    zero = {"lora_B", "lora_embedding_A"}

    def untrain(tensors: dict) -> dict:
        return {name: tensor * (not any(part in name for part in zero)) for name, tensor in tensors.items()}

    said = notes(base, change(adapter, tmp_path / "untrained", untrain))
    assert ("every LoRA B in its file is zero" in said) == ("use_dora" not in settings)


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "whose weights are quantized"),
        ("TheBloke/Llama-2-7B-GPTQ", "whose weights are quantized"),
        ("/mnt/models/Llama-3.1-8B-Instruct-AWQ", "whose weights are quantized"),
        ("Qwen/Qwen2-7B", "it was trained on Qwen/Qwen2-7B, by its own word"),
        ("somebody/llama", ""),  # a copy of the same name
        ("/mnt/models/trained-on-another-machine", ""),
        (None, ""),
    ],
)
def test_another_base_than_the_adapter_names_is_noted(trained_on, said, made, tmp_path):
    base, adapter = made()
    noted = notes(base, change(adapter, tmp_path / "adapter", base_model_name_or_path=trained_on))
    assert said in noted
    assert bool(said) == bool(noted)


# Settings of other tools


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lorap_emb_lr", 1e-6),
        ("lorap_lr_ratio", 16.0),
        ("lora_dtype", "bfloat16"),
        ("swift_type", "LORA"),
        ("unsloth_version", "2025.3.1"),
    ],
)
def test_a_setting_of_another_tool_that_changes_no_weight_is_noted(key, value, made, tmp_path):
    base, adapter = made()
    assert f"{key} = {value!r}" in notes(base, change(adapter, tmp_path / "adapter", **{key: value}))


@pytest.mark.parametrize("value", [None, False, 0, [], {}, ""])
def test_a_setting_that_nobody_knows_is_refused_unless_it_is_off(value, made, tmp_path):
    base, adapter = made()
    assert notes(base, change(adapter, tmp_path / "off", of_tomorrow=value)) == ""
    assert "of_tomorrow = 'on'" in refusal(base, change(adapter, tmp_path / "on", of_tomorrow="on"))


def test_gaussian_is_gaussian_however_it_is_written(made, tmp_path):
    base, adapter = made(init_lora_weights="gaussian")
    assert notes(base, change(adapter, tmp_path / "adapter", init_lora_weights="Gaussian")) == ""


# Other files


def test_an_old_bin_whose_tensors_take_gradients_folds_as_its_safetensors_do(made, tmp_path):
    base, adapter = made(modules_to_save=["lm_head"])
    old = shutil.copytree(adapter, tmp_path / "old")
    tensors = load_file(old / WEIGHTS)
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, old / "adapter_model.bin")
    (old / WEIGHTS).unlink()
    one, other = (read_tensors(merge(base, folder, tmp_path / f"of-{folder.name}")) for folder in (adapter, old))
    assert all(same_bits(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
@pytest.mark.parametrize("config", ["", CONFIG])
def test_a_folder_of_pickled_weights_is_told_to_be_converted(name, config, made, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    base, adapter = made()
    if config:
        shutil.copy(adapter / config, tmp_path / "folder" / config)
    line = refusal(base, tmp_path / "folder")
    assert f"its {name} would run pickled code: convert it to safetensors first" in line


def test_an_adapter_in_a_folder_below_is_named(made, tmp_path):
    base, adapter = made()
    for step in (500, 1000):
        shutil.copytree(adapter, tmp_path / "run" / f"checkpoint-{step}")
    line = refusal(base, tmp_path / "run")
    assert "name one of the folders in it: checkpoint-1000, checkpoint-500" in line
    with pytest.raises(MergekitBioError, match="checkpoint-1000, checkpoint-500"):
        inspect(resolve(tmp_path / "run"))


def test_empty_tensors_are_named_as_what_zero_3_leaves(made, tmp_path):
    base, adapter = made()
    empty = change(adapter, tmp_path / "empty", lambda tensors: {name: torch.empty(0) for name in tensors})
    assert "DeepSpeed ZeRO-3" in refusal(base, empty)


def test_llavas_own_pickled_rest_is_noted(made, tmp_path):
    base, adapter = made()
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    (copy / "non_lora_trainables.bin").write_bytes(b"")
    assert "non_lora_trainables.bin is pickled, and not read" in notes(base, copy)


# Rows of embeddings


def test_a_vocabulary_shrinks_for_both_sides_where_the_adapter_brings_one(made, tmp_path):
    """What resize_token_embeddings cuts off of the side that the adapter does not hold, the merge cuts off too."""
    base, adapter = made(added_tokens=-5)
    cut = change(adapter, tmp_path / "adapter", without("lm_head"))
    one, other = (merge(base, folder, tmp_path / f"out-{folder.name}") for folder in (adapter, cut))
    weights = read_tensors(one)
    assert weights["lm_head.weight"].shape == weights["model.embed_tokens.weight"].shape == (56, 32)
    assert all(same_bits(weights[name], tensor) for name, tensor in read_tensors(other).items())
    assert json.loads((other / "config.json").read_text())["vocab_size"] == 56
    told = CliRunner().invoke(app, shlex.split(f"merge --base {base} --adapter {cut} --alpha 1 --dry-run")).stderr
    for name in ("model.embed_tokens", "lm_head"):
        assert f"{name}.weight: 56 of the base's 61 rows stay, as many as the adapter has" in told
    assert verify(other, against_sources=True).recomputed


def test_rows_of_tokens_that_the_configuration_does_not_name_are_refused(made, tmp_path):
    base, adapter = made(trainable_token_indices=[3, 5])
    for stated in ([3], [3, 61], [3, "5"], {"lm_head": [3, 5], "other": [1]}, None):
        line = refusal(base, change(adapter, tmp_path / str(stated), trainable_token_indices=stated))
        assert "trainable_token_indices" in line and "embed_tokens" in line


def test_rows_of_tokens_in_a_tied_head_that_is_stored_are_its_own_too(tmp_path):
    write_base("llama-tied", tmp_path / "base")
    weights = read_tensors(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TIED)).save_pretrained(tmp_path / "base")
    weights |= {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({name: tensor.float() for name, tensor in weights.items()}, tmp_path / "base" / "model.safetensors")
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    train(load(tmp_path / "base").float(), tmp_path / "adapter", settings)
    expected = logits(unmerged(load(tmp_path / "base"), tmp_path / "adapter"))
    merged = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (logits(load(merged)) - expected).abs().max() <= 1e-6 * expected.abs().max()
