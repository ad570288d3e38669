"""NatureLM-audio checkpoints that repeat weights of their base, in whatever form; and towers that are not whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging.oracle import read_tensors
from merging.refusal import refused
from safetensors.torch import load_file, save_file
from tiny_naturelm import make_base, make_naturelm, random_prefix

import mergekit_bio
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.merging.verify import verify

LLAMA = "llama_model.base_model.model."
ALIAS, EMBEDDING = "llama_embed_tokens.weight", f"{LLAMA}model.embed_tokens.weight"
POSITIONS = "audio_Qformer.bert.embeddings.position_ids"
BIAS = "beats.encoder.layers.{}.self_attn.relative_attention_bias.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def published(base: Path) -> Path:
    """A small checkpoint in the published layout."""
    return make_naturelm(base.with_name("naturelm"), base=base, prefix=random_prefix())


@pytest.fixture
def adapter(published: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], Tensors]], Path]:
    """The published layout, changed by a function of its tensors."""

    def make(change: Callable[[Tensors], Tensors]) -> Path:
        folder = tmp_path / "sources" / "adapter"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes((published / "config.json").read_bytes())
        tensors = change(load_file(published / "model.safetensors"))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return make


def sharded(folder: Path) -> None:
    """Spread the one file over two, with an index, as Transformers lays them out."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def with_base(tensors: Tensors, base: Tensors, some: Callable[[str], bool] = lambda _: True) -> Tensors:
    """Add the base's own tensors under PEFT's names."""
    for name, tensor in base.items():
        if some(name) and name != "model.embed_tokens.weight":
            module, _, kind = name.rpartition(".")
            layered = (
                f"{module}.base_layer.{kind}" if module.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) else name
            )
            tensors[f"{LLAMA}{layered}"] = tensor
    return tensors


VARIANTS: dict[str, Callable[[Tensors, Tensors], Tensors]] = {
    "as published": lambda tensors, base: tensors,
    "the embedding in float32": lambda tensors, base: tensors | {ALIAS: tensors[ALIAS].float()},
    "the embedding in float16": lambda tensors, base: tensors | {ALIAS: tensors[ALIAS].half()},
    "another [PAD] row": lambda tensors, base: changed_rows(tensors, rows=(327,)),
    "no [PAD] row": lambda tensors, base: tensors | {ALIAS: base["model.embed_tokens.weight"]},
    "two names": lambda tensors, base: tensors | {EMBEDDING: tensors[ALIAS].clone()},
    "the other name": lambda tensors, base: {EMBEDDING if name == ALIAS else name: t for name, t in tensors.items()},
    "no copy": lambda tensors, base: {name: t for name, t in tensors.items() if name != ALIAS},
    "one layer of the base": lambda tensors, base: with_base(tensors, base, lambda name: ".layers.1." in name),
    "all of the base, in float32": lambda tensors, base: with_base(tensors, {n: t.float() for n, t in base.items()}),
    "no predictor and no positions": lambda tensors, base: {
        name: t for name, t in tensors.items() if "predictor" not in name and name != POSITIONS
    },
    "a copy of the shared bias": lambda tensors, base: tensors | {BIAS.format(1): tensors[BIAS.format(0)].clone()},
}  # fmt: skip


@pytest.mark.parametrize("variant", [*VARIANTS, "sharded"])
def test_copies_of_the_base_change_nothing(base, published, adapter, tmp_path, variant):
    own = read_tensors(base)
    folder = adapter(lambda tensors: VARIANTS.get(variant, VARIANTS["as published"])(tensors, own))
    if variant == "sharded":
        sharded(folder)
    settings = {"base": base, "alphas": [0.5], "device": "cpu", "fsync": False}
    (merged,) = mergekit_bio.merge(adapter=folder, out=tmp_path / "merged", **settings)
    (expected,) = mergekit_bio.merge(adapter=published, out=tmp_path / "expected", **settings)

    written, wanted = read_tensors(merged.path), read_tensors(expected.path)
    carried = {name for name in wanted if "predictor" in name or name.endswith(POSITIONS)}
    assert wanted.keys() - written.keys() <= carried
    assert written.keys() <= wanted.keys()
    assert all(tensor.equal(wanted[name]) for name, tensor in written.items())
    verify(merged.path, against_sources=True)
    tower, published = (AudioPrefix.from_pretrained(path).state_dict() for path in (merged.path, expected.path))
    assert all(tensor.equal(published[name]) for name, tensor in tower.items())


def test_a_merge_without_what_nothing_reads_loads_in_transformers_without_a_word(base, adapter, tmp_path, caplog):
    from transformers import AutoModelForMultimodalLM

    import mergekit_bio.model

    folder = adapter(lambda tensors: VARIANTS["no predictor and no positions"](tensors, {}))
    (without,) = mergekit_bio.merge(base=base, adapter=folder, alphas=[1], out=tmp_path / "without", device="cpu")
    _, loading = AutoModelForMultimodalLM.from_pretrained(without.path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def changed_rows(tensors: Tensors, name: str = ALIAS, rows: tuple[int, ...] = (7, 200)) -> Tensors:
    tensor = tensors[name].clone()
    tensor[list(rows)] += 1
    return tensors | {name: tensor}


REFUSALS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another embedding": (
        changed_rows,
        r"llama_embed_tokens\.weight: differs from .* in 2 of 327 rows, the first is row 7; .*--base-from-adapter",
    ),
    "two names with other values": (
        lambda tensors: changed_rows(changed_rows(tensors) | {EMBEDDING: tensors[ALIAS]}, EMBEDDING, (9,)),
        r"differs from .*, its second name",
    ),
    "two names of which one is the base's": (
        lambda tensors: changed_rows(tensors | {EMBEDDING: tensors[ALIAS]}, EMBEDDING),
        r"llama_model.*embed_tokens\.weight: differs from llama_embed_tokens\.weight, its second name",
    ),
    "an embedding of another width": (
        lambda tensors: tensors | {ALIAS: torch.zeros(328, 16).bfloat16()},
        r"llama_embed_tokens\.weight: is BF16 \[328, 16\], but model\.embed_tokens\.weight of the base .*\[327, 64\]",
    ),
    "an embedding of whole numbers": (
        lambda tensors: tensors | {ALIAS: torch.zeros(328, 64, dtype=torch.int8)},
        r"llama_embed_tokens\.weight: is I8",
    ),
    "a tensor that the base has not": (
        lambda tensors: tensors | {f"{LLAMA}model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)},
        r"tensor llama_model.*layers\.9.*: the base .* has no model\.layers\.9\.mlp\.up_proj\.weight",
    ),
    "an unknown tensor of the tower": (
        lambda tensors: tensors | {"beats.encoder.layer_norm2.weight": torch.ones(1)},
        r"holds the tensor beats\.encoder\.layer_norm2\.weight, unknown to the audio tower",
    ),
    "a lost tensor of the tower": (
        lambda tensors: {name: t for name, t in tensors.items() if name != "ln_audio.bias"},
        r"lacks the tensor ln_audio\.bias of the audio tower",
    ),
    "a tensor of the tower of another shape": (
        lambda tensors: tensors | {"ln_audio.bias": torch.zeros(3)},
        r"ln_audio\.bias has the shape \(3,\)",
    ),
    "a tower in whole numbers": (
        lambda tensors: tensors | {"ln_audio.bias": torch.zeros_like(tensors["ln_audio.bias"], dtype=torch.int32)},
        r"ln_audio\.bias is I32",
    ),
    "another shared bias": (
        lambda tensors: tensors | {BIAS.format(1): tensors[BIAS.format(0)] + 1},
        r"layers\.1\.self_attn\.relative_attention_bias\.weight: differs from .*layers\.0",
    ),
    "LoRA names without .default.": (
        lambda tensors: {name.replace(".default.", "."): t for name, t in tensors.items()},
        r"tensor llama_model.*: its LoRA names lack '\.default\.'",
    ),
    "a tensor of nobody's": (
        lambda tensors: tensors | {"speech.weight": torch.ones(2)},
        r"tensor speech\.weight: is nothing this version can fold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_wrong_is_one_line_before_anything_is_written(base, adapter, tmp_path, case, dry_run):
    change, message = REFUSALS[case]
    folder = adapter(change)
    words = ["merge", "--base", base, "--adapter", folder, "--alpha", "0.5", "--out", tmp_path / "out"]
    line = refused(*words, *(["--dry-run"] if dry_run else []), watch=tmp_path)
    assert re.search(message, line), line
    assert str(folder) in line


def test_a_tower_of_another_width_is_refused_and_left_out_where_that_is_asked(base, adapter, tmp_path):
    def narrower(tensors: Tensors) -> Tensors:
        return tensors | {name: tensors[name][:16] for name in ("audio_llama_proj.weight", "audio_llama_proj.bias")}

    folder = adapter(narrower)
    words = ["merge", "--base", base, "--adapter", folder, "--alpha", "0.5", "--out", tmp_path / "out"]
    message = "audio_llama_proj.weight: gives embeddings of width 16, but the base .* has hidden_size 64"
    assert re.search(message, refused(*words, watch=tmp_path))
    mergekit_bio.merge(base=base, adapter=folder, alphas=[0.5], out=tmp_path / "out", text_only=True, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_adapters_own_embedding_is_taken_at_every_alpha_where_that_is_asked(base, adapter, tmp_path, dtype):
    folder = adapter(lambda tensors: {n: t.to(dtype) if n == ALIAS else t for n, t in changed_rows(tensors).items()})
    own = load_file(folder / "model.safetensors")[ALIAS][:-1].bfloat16()
    merged = mergekit_bio.merge(
        base=base, adapter=folder, alphas=[0, 0.5], out=tmp_path / "out", base_from_adapter=True, device="cpu"
    )
    for checkpoint in merged:
        tensors = read_tensors(checkpoint.path)
        assert tensors["model.embed_tokens.weight"].equal(own)
        assert tensors["lm_head.weight"].equal(read_tensors(base)["lm_head.weight"])
        assert not checkpoint.unchanged
        verify(checkpoint.path, against_sources=True)
        manifest = json.loads((checkpoint.path / "merge.json").read_text())
        assert manifest["adapters"][0]["base_weights"] == {"model.embed_tokens.weight": ALIAS}
        assert "`model.embed_tokens.weight`: the adapter's, at every α" in (checkpoint.path / "README.md").read_text()


def test_a_newer_naturelm_is_refused_by_its_name(base, tmp_path):
    newer = tmp_path / "NatureLM-audio-1.1"
    for folder in ("audio_encoder", "audio_qformer", "llm"):
        (newer / "model" / folder).mkdir(parents=True)
    for file in ("model.json", "manifest.json", "model/llm/config.json"):
        (newer / file).write_text("{}")
    merging = ["merge", "--base", base, "--adapter", newer, "--alpha", "0.5", "--out", tmp_path / "out"]
    for words in (merging, ["inspect", newer]):
        assert "NatureLM-audio of version 1.1 or later" in refused(*words, watch=tmp_path)
    with pytest.raises(mergekit_bio.MergekitBioError, match=r"NatureLM-audio of version 1\.1 or later"):
        AudioPrefix.from_pretrained(newer)
