"""A merge of the real models: planned from headers of sparse files, against a full-size model on the meta device."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_bio.audio.layout import merged_config
from mergekit_bio.checkpoint.header import DTYPES
from mergekit_bio.merging.merge import plan_merge
from mergekit_bio.merging.request import MergeRequest
from mergekit_bio.model.configuration import NatureLMAudioConfig
from mergekit_bio.model.modeling import NatureLMAudioForConditionalGeneration

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
Described = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


def describe(model: torch.nn.Module) -> Described:
    types = {name: dtype for dtype, (_, name) in DTYPES.items()}
    return {
        name: (types[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def write_sparse(folder: Path, tensors: Described, config: dict[str, Any]) -> None:
    """A checkpoint whose tensors are a hole in the file: full size, and no room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype][0]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def manifest(golden: Path) -> Described:
    """The tensors of the real NatureLM-audio checkpoint."""
    keys = json.loads((golden / "manifest" / "naturelm_audio_keys.json").read_text())["keys"]
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in keys.items() if entry["in_file"]}


def test_every_tensor_of_the_real_checkpoint_has_its_place(golden: Path, manifest: Described, tmp_path: Path) -> None:
    real = json.loads((golden / "manifest" / "config_json_example.json").read_text())
    tokenizer = {"added_tokens": [{"id": 128_002, "content": "<|reserved_special_token_0|>", "special": True}]}
    with torch.device("meta"):
        llama = describe(LlamaForCausalLM(LlamaConfig(**LLAMA_8B)).bfloat16())
        config = merged_config(text_config=LLAMA_8B, naturelm_config=real, tokenizer=tokenizer)
        model = NatureLMAudioForConditionalGeneration(NatureLMAudioConfig(**config))
    model.model.bfloat16()
    model.lm_head.bfloat16()

    # Its own copy of the base is the base, but for the row of [PAD]; what is left is LoRA and tower.
    own = {name: entry for name, entry in manifest.items() if name.startswith("llama_") and ".lora_" not in name}
    renamed = {
        name.removeprefix("llama_model.base_model.model.")
        .replace("llama_embed_tokens.", "model.embed_tokens.")
        .replace(".base_layer.", "."): (dtype, (128_256, *shape[1:]) if shape[0] == 128_257 else shape)
        for name, (dtype, shape) in own.items()
    }
    assert renamed == llama

    write_sparse(tmp_path / "llama", llama, LLAMA_8B)
    write_sparse(tmp_path / "naturelm", {n: e for n, e in manifest.items() if n not in own}, real)
    plan = plan_merge(MergeRequest(base=tmp_path / "llama", adapter=tmp_path / "naturelm", alphas=[0.5]))

    written: Described = {}
    for shard in plan.shards:
        header = json.loads(shard.header[8:])
        header.pop("__metadata__", None)
        written |= {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    carried = {f"audio_prefix.{name}": manifest[name] for name in ("beats.predictor.weight", "beats.predictor.bias")}
    carried["audio_prefix.audio_Qformer.bert.embeddings.position_ids"] = ("I64", (1, 512))
    assert written == describe(model) | carried
    assert {fold.name.rsplit(".", 2)[1] for fold in plan.folds} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(plan.folds) == 4 * 32
