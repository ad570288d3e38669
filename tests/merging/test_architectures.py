"""Adapters for models with other names in files than in memory, other heads, or none; PEFT says what is right."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from merging.architectures import ARCHITECTURES, VISION, build, edit, load, logits, merge, rename, train, unmerged
from merging.oracle import read_tensors, same_bits
from merging.tiny import TIED, VOCABULARY
from safetensors.torch import load_file, save_file

from mergekit_bio.adapter.interface import Base
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import AdapterError, VerificationError
from mergekit_bio.merging.layouts import CONV1D
from mergekit_bio.merging.verify import verify


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Base and adapter of an architecture, made once."""
    root = tmp_path_factory.mktemp("architectures")

    def make(name: str) -> tuple[Path, Path]:
        architecture, base, adapter = ARCHITECTURES[name], root / name / "base", root / name / "adapter"
        if not base.exists():
            build(architecture).save_pretrained(base)
            rename(base / "model.safetensors", *architecture.hub_names)
            model = getattr(transformers, architecture.model).from_pretrained(base)
            settings = {"target_modules": architecture.targets, "task_type": "CAUSAL_LM"} | architecture.settings
            train(model, adapter, settings)
        return base, adapter

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_model_has_the_weights_that_peft_gives_it(name, sources, tmp_path):
    architecture, (base, adapter) = ARCHITECTURES[name], sources(name)
    merged = merge(base, adapter, tmp_path / "out")
    # Where both sides share one weight, PEFT merges one side's adapter into both: it gets a head to merge into.
    full = unmerged(load(base, untie=architecture.unties), adapter).merge_and_unload().state_dict()
    model = load(merged)
    actual = model.state_dict()
    assert actual.keys() == full.keys()
    for key, expected in full.items():
        torch.testing.assert_close(actual[key], expected, rtol=2.4e-7, atol=1e-9, msg=key)
    expected = logits(unmerged(load(base), adapter))
    assert (logits(model) - expected).abs().max() <= 1e-6 * expected.abs().max()
    # Only an untied head is a tensor more.
    before, after = (set(Checkpoint.open(path).tensors) for path in (base, merged))
    head = {architecture.head} if architecture.unties else set()
    assert after == {architecture.prefix + name for name in before} | head
    assert verify(merged, against_sources=True).recomputed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embedding_and_head_are_those_of_transformers(name, sources):
    architecture, (directory, _) = ARCHITECTURES[name], sources(name)
    model, base = load(directory), Base(resolve(directory), Checkpoint.open(directory))
    if name != "bert, classifier":  # whose embedding is adapted as any other module
        stored = base.checkpoint.read(base.input_embedding).double()
        assert torch.equal(stored, model.get_input_embeddings().weight)
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else None
    assert base.head == architecture.head
    assert base.tied == (head is not None and head.weight is model.get_input_embeddings().weight)
    if head is not None and not base.tied:
        assert torch.equal(base.checkpoint.read(base.head).double(), head.weight)


# Which way round a square weight is stored


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_modules_kind_and_not_fan_in_fan_out_decides_how_a_square_weight_is_folded(base, flag, base_of, tmp_path):
    """PEFT of before 0.3 wrote the flag for any single target; it asks for the module's class."""
    directory, adapter = base_of(base), tmp_path / "adapter"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    train(model, adapter, {"target_modules": {"llama": ["q_proj"], "gpt2": ["attn.c_proj"]}[base]})
    edit(adapter / "adapter_config.json", fan_in_fan_out=flag)
    merged = merge(directory, adapter, tmp_path / "out")
    expected = logits(unmerged(load(directory), adapter))
    assert (logits(load(merged)) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert verify(merged, against_sources=True).recomputed


def test_verify_does_not_take_the_plans_word_for_how_a_square_weight_is_stored(base_of, tmp_path, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(base_of("llama"), dtype=torch.float32)
    train(model, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    monkeypatch.setattr(Base, "conv1d_modules", frozenset({"q_proj"}))  # a fault in the reading, in merge and verify
    merged = merge(base_of("llama"), tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(VerificationError, match=r"lora_A.* as for a conv1d module, but in a llama it is linear"):
        verify(merged, against_sources=True)


def test_the_architectures_with_conv1d_are_those_of_transformers():
    found: dict[str, set[str]] = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        if modules := set(re.findall(r"self\.(\w+) = Conv1D\(", file.read_text())):
            found.setdefault(file.parent.name, set()).update(modules)
    assert {kind.removesuffix("-gpt"): set(modules) for kind, modules in CONV1D.items()} == found


# Tied heads


@pytest.mark.parametrize("name", ["opt", "cohere", "starcoder2", "gemma3"])
def test_a_head_stored_beside_its_embedding_is_loaded_after_it_was_changed(name, sources, tmp_path):
    """Files of Transformers 4 hold both, and say nothing of the tie where the architecture ties by default."""
    architecture, (original, adapter) = ARCHITECTURES[name], sources(name)
    base = shutil.copytree(original, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (embedding,) = (key for key in weights if key.endswith("embed_tokens.weight"))
    save_file(weights | {architecture.head: weights[embedding].clone()}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))

    merged = merge(base, adapter, tmp_path / "out")
    written = json.loads((merged / "config.json").read_text())
    assert all(part["tie_word_embeddings"] is False for part in (written, written.get("text_config", written)))
    expected = logits(unmerged(load(base), adapter))
    assert (logits(load(merged)) - expected).abs().max() <= 1e-6 * expected.abs().max()

    # Neither side of the tie is changed: nothing is said.
    train(load(base).float(), tmp_path / "other", {"target_modules": ["q_proj"]})
    untouched = merge(base, tmp_path / "other", tmp_path / "untouched")
    written = json.loads((untouched / "config.json").read_text())
    assert not any("tie_word_embeddings" in part for part in (written, written.get("text_config", {})))


def test_the_language_models_part_of_a_configuration_says_what_the_whole_says(sources, tmp_path):
    base = shutil.copytree(sources("llava")[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    edit(
        base / "config.json",
        torch_dtype="float32",
        text_config=config["text_config"] | {"dtype": "float32", "torch_dtype": "float32"},
        vision_config=config["vision_config"] | {"torch_dtype": "float32"},
    )
    model = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merged = merge(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    config = json.loads((merged / "config.json").read_text())
    dtypes = [part[key] for part in (config, config["text_config"]) for key in ("dtype", "torch_dtype")]
    assert {*dtypes, config["vision_config"]["torch_dtype"]} == {"bfloat16"}
    assert config["text_config"]["vocab_size"] == VOCABULARY + 3
    assert load(merged).get_output_embeddings().weight.shape[0] == VOCABULARY + 3


def test_a_full_fine_tune_that_lacks_the_tied_head_which_its_base_stores(tmp_path):
    """As Qwen3-0.6B is stored, and Transformers saves what is trained from it."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TIED, head_dim=8))
    for directory in (tmp_path / "base", tmp_path / "tuned"):
        model.save_pretrained(directory)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"].clone()
    mask = torch.full((4, 4), -torch.inf).triu(1)  # a causal mask, as old files have it
    constants = {"model.layers.0.attn.bias": mask, "model.layers.0.attn.masked_bias": torch.tensor(-torch.inf)}
    save_file(weights | constants | {"lm_head.weight": embedding}, file, {"format": "pt"})
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        merged = merge(tmp_path / "base", tmp_path / "tuned", tmp_path / name, dtype=name, rounding="nearest")
        actual = read_tensors(merged)
        assert torch.equal(actual.pop("lm_head.weight"), tuned["model.embed_tokens.weight"].to(dtype))
        assert all(torch.equal(actual.pop(key), constant.to(dtype)) for key, constant in constants.items())
        assert actual.keys() == tuned.keys()
        assert all(torch.equal(tensor, tuned[key].to(dtype)) for key, tensor in actual.items())
        assert verify(merged, against_sources=True).recomputed


# Names


def renamed(adapter: Path, place: Path, *changes: tuple[str, str]) -> Path:
    copy = shutil.copytree(adapter, place)
    for old, new in changes:
        rename(copy / "adapter_model.safetensors", old, new)
    return copy


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(
            "llava",
            [
                ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
                ("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model."),
                ("base_model.model.model.multi_modal_projector.", "base_model.model.multi_modal_projector."),
            ],
            id="by Transformers of before 4.52",
        ),
        pytest.param("qwen2_audio", [(f"lora_{x}.weight", f"lora_{x}.default.weight") for x in "AB"], id=".default."),
        pytest.param("voxtral", [("base_model.model.", "_orig_mod.base_model.model.")], id="compiled"),
        pytest.param("voxtral", [(".self_attn.", "._orig_mod.self_attn.")], id="layer by layer"),
        pytest.param("gemma3", [("base_model.model.", "net.base_model.model.")], id="a module around PEFT's"),
        pytest.param("opt", [("base_model.model.", "base_model.model.my_llm.")], id="a module inside PEFT's"),
        pytest.param("starcoder2", [("base_model.model.", "")], id="without PEFT's prefix"),
    ],
)  # fmt: skip
def test_what_is_around_a_model_does_not_matter(name, changes, sources, tmp_path):
    base, adapter = sources(name)
    one = read_tensors(merge(base, adapter, tmp_path / "one"))
    other = read_tensors(merge(base, renamed(adapter, tmp_path / "adapter", *changes), tmp_path / "other"))
    assert one.keys() == other.keys()
    assert all(same_bits(one[key], other[key]) for key in one)


@pytest.mark.parametrize("base", ["llama", "gpt2", "gpt2 without transformer"])
def test_an_adapter_that_was_trained_without_the_head(base, base_of, tmp_path):
    """AutoModel's names lack what the whole model puts in front; so do the files of GPT-2 on the hub."""
    kind = base.split()[0]
    directory = shutil.copytree(base_of(kind), tmp_path / "base")
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if kind != base:
        shutil.rmtree(directory)
        whole.save_pretrained(directory)
        rename(directory / "model.safetensors", "transformer.", "")
    body = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32)
    settings = {"target_modules": {"llama": ["q_proj", "up_proj"], "gpt2": ["c_proj", "c_attn"]}[kind], "r": 4}
    for model, name in ((whole, "of whole"), (body, "of body")):
        train(model, tmp_path / name, settings)
    ours = read_tensors(merge(directory, tmp_path / "of body", tmp_path / "one"))
    expected = read_tensors(merge(directory, tmp_path / "of whole", tmp_path / "other"))
    assert all(same_bits(ours[key], expected[key]) for key in expected)
    peft_logits = logits(unmerged(load(directory), tmp_path / "of whole"))
    assert (logits(load(tmp_path / "one")) - peft_logits).abs().max() <= 1e-6 * peft_logits.abs().max()


def test_names_that_may_mean_two_parts_of_the_base_are_refused_with_both(tmp_path):
    halves = {"text_config": {**VISION, "vocab_size": VOCABULARY, "eos_token_id": 1}, "vision_config": VISION}
    model = transformers.CLIPModel(transformers.CLIPConfig(**halves, projection_dim=16))
    model.save_pretrained(tmp_path / "base")
    train(model.vision_model, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    rename(tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.vision_model.", "base_model.model.")
    with pytest.raises(AdapterError) as caught:
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    q_proj = "encoder.layers.0.self_attn.q_proj.weight"
    assert all(f"{name}.{q_proj}" in str(caught.value) for name in ("text_model", "vision_model"))


def test_an_adapter_with_parts_that_the_base_lacks_is_refused_with_both_spellings(base_of, sources, tmp_path):
    """A tower's layers are not the language model's, though they end alike."""
    model = transformers.VoxtralForConditionalGeneration.from_pretrained(sources("voxtral")[0])
    train(model, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    theirs, ours = (rf"model\.{tower}layers\.0\.self_attn\.q_proj\.weight" for tower in (r"audio_tower\.", ""))
    with pytest.raises(AdapterError, match=rf"no tensor {theirs}, only such as {ours}; .*made for another model"):
        merge(base_of("llama"), tmp_path / "adapter", tmp_path / "out")


def test_a_classifiers_head_is_named_for_what_it_is(base_of, sources, tmp_path):
    with pytest.raises(AdapterError, match=r"score\.weight: is a classifier's head.*LlamaForCausalLM.*has none"):
        merge(base_of("llama"), sources("llama, classifier")[1], tmp_path / "out")
