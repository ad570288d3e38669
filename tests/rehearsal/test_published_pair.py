"""What stands in for the published files has their layout, to the byte.

Sizes and counts are those that the hub shows for meta-llama/Llama-3.1-8B-Instruct and
EarthSpeciesProject/NatureLM-audio.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

published_pair = pytest.importorskip("published_pair", reason="eval/ is not on the path")
tensor_file = pytest.importorskip("tensor_file", reason="eval/ is not on the path")

PROGRAM = Path(sys.executable).with_name("mergekit-bio")
SHARDS = {
    "model-00001-of-00004.safetensors": 4_976_698_672,
    "model-00002-of-00004.safetensors": 4_999_802_720,
    "model-00003-of-00004.safetensors": 4_915_916_176,
    "model-00004-of-00004.safetensors": 1_168_138_808,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF_HOME with both at full size; they take no room on the disk."""
    home = tmp_path_factory.mktemp("huggingface")
    published_pair.write_pair(home / "hub", sparse=True)
    return home


@pytest.fixture(scope="module")
def llama(home: Path) -> Path:
    return published_pair.BASE.snapshot(home / "hub")


@pytest.fixture(scope="module")
def naturelm(home: Path) -> Path:
    return published_pair.ADAPTER.snapshot(home / "hub")


def header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype, shape; of all files."""

    def entries() -> Iterator[tuple[str, tuple[str, list[int]]]]:
        for file in folder.glob("*.safetensors"):
            for name, entry in header(file).items():
                if name != "__metadata__":
                    yield name, (entry["dtype"], entry["shape"])

    return dict(entries())


def test_the_files_are_as_large_as_the_published_ones(llama: Path, naturelm: Path) -> None:
    assert {file.name: file.stat().st_size for file in llama.glob("*.safetensors")} == SHARDS
    assert (llama / "model.safetensors.index.json").stat().st_size == 23_950
    assert (naturelm / "model.safetensors").stat().st_size == 1_556_386_132


def test_as_many_tensors_and_parameters_as_published(llama: Path, naturelm: Path) -> None:
    shapes = [shape for _, shape in tensors(naturelm).values()]
    assert (len(shapes), sum(map(math.prod, shapes))) == (558, 665_378_431)
    shapes = [shape for _, shape in tensors(llama).values()]
    assert (len(shapes), sum(map(math.prod, shapes))) == (291, 8_030_261_248)


def test_the_files_take_no_room(home: Path) -> None:
    assert sum(file.lstat().st_blocks * 512 for file in home.rglob("*")) < 10e6


def test_naturelm_holds_what_the_reference_saves_of_what_takes_a_gradient(golden: Path, naturelm: Path) -> None:
    manifest = json.loads((golden / "manifest" / "naturelm_audio_keys.json").read_text())
    expected = {
        name: ("BF16" if entry["group"] == "lora" else entry["dtype"], entry["shape"])
        for name, entry in manifest["keys"].items()
        if entry["in_file"] and (entry["group"] != "llama_base" or name == "llama_embed_tokens.weight")
    }
    assert tensors(naturelm) == expected

    (aliases,) = (names for kind, names in manifest["safetensors_metadata"].items() if "model.safetensors" in kind)
    shared = {name: original for name, original in aliases.items() if name.startswith("beats.")}
    assert header(naturelm / "model.safetensors")["__metadata__"] == shared

    config = json.loads((golden / "manifest" / "config_json_example.json").read_text())
    for absent in ("beats_path", "flash_attn", "device", "audio_encoding_cache_size"):
        del config[absent]
    assert json.loads((naturelm / "config.json").read_text()) == config
    assert len((naturelm / "config.json").read_text().split("\n")) == 48


def test_llama_is_what_transformers_makes_of_its_config(llama: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama), dtype=torch.bfloat16)
    assert tensors(llama) == {name: ("BF16", list(tensor.shape)) for name, tensor in model.state_dict().items()}
    assert tuple(model.generation_config.eos_token_id) == (128001, 128008, 128009)


def test_the_tokenizer_has_llamas_ids(llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert len(tokenizer) == 128_256
    ids = {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|reserved_special_token_0|>": 128_002,
        "<|start_header_id|>": 128_006,
        "<|eot_id|>": 128_009,
        "<|reserved_special_token_247|>": 128_255,
    }
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in ids} == ids
    text = "Which bird is it?"
    assert tokenizer.decode(tokenizer.encode(f"<|start_header_id|>{text}"), skip_special_tokens=True) == text
    assert tokenizer.decode([100_000]) == " token100000"
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False).startswith("<|begin_of")


def test_headers_equal_those_of_an_independent_writer(
    golden: Path, naturelm: Path, llama: Path, tmp_path: Path
) -> None:
    tool = golden.parent / "tools" / "published_layout.py"
    subprocess.run([sys.executable, tool, "real", tmp_path], check=True)
    assert header(naturelm / "model.safetensors") == header(tmp_path / "naturelm" / "model.safetensors")
    assert tensors(llama) == tensors(tmp_path / "llama")
    assert (naturelm / "config.json").read_text() == (tmp_path / "naturelm" / "config.json").read_text()


def test_a_file_is_laid_out_as_the_safetensors_library_does_it(tmp_path: Path) -> None:
    tensors = [
        tensor_file.Tensor("b", (3, 5)),
        tensor_file.Tensor("a", (7,), mean=1.0, std=0.0),
        tensor_file.Tensor("d", (1, 6), "I64"),
        tensor_file.Tensor("c", (2, 2), "F32"),
    ]
    tensor_file.write_tensors(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    values = load_file(tmp_path / "ours.safetensors")
    save_file(values, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert values["a"].eq(1).all()
    assert values["d"].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_values_are_random_and_a_copy_has_its_originals(tmp_path: Path) -> None:
    rows = 30_000  # beyond one lap of the pool that the values are cut from
    tensors = [
        tensor_file.Tensor("embedding", (rows, 1024)),
        tensor_file.Tensor("other", (rows, 1024), std=0.002),
        tensor_file.Tensor("copy", (rows + 1, 1024), alike="embedding"),
    ]
    tensor_file.write_tensors(tmp_path / "file.safetensors", tensors, {})
    values = load_file(tmp_path / "file.safetensors")
    assert values["copy"][:-1].equal(values["embedding"])
    assert values["embedding"][:, :16].unique(dim=0).shape[0] == rows
    assert values["embedding"].float().std().item() == pytest.approx(0.02, rel=0.01)
    assert values["other"].float().std().item() == pytest.approx(0.002, rel=0.01)
    both = torch.stack([values[name].flatten().float() for name in ("embedding", "other")])
    assert both.corrcoef()[0, 1].abs() < 0.01


def test_fewer_layers_make_a_smaller_pair_of_the_same_layout(llama: Path, naturelm: Path, tmp_path: Path) -> None:
    small_llama, small_naturelm = published_pair.write_pair(tmp_path, layers=2, sparse=True)
    for small, real in ((small_llama, llama), (small_naturelm, naturelm)):
        beyond = {f"model.layers.{layer}." for layer in range(2, 32)}
        kept = {name: entry for name, entry in tensors(real).items() if not any(part in name for part in beyond)}
        assert tensors(small) == kept
    assert json.loads((small_llama / "config.json").read_text())["num_hidden_layers"] == 2


def offline(home: Path) -> dict[str, str]:
    return os.environ | {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}


def command_line(home: Path, *words: str) -> dict[str, Any]:
    """What the real program prints, offline, with this cache."""
    done = subprocess.run([PROGRAM, *words, "--json"], env=offline(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("source", "tensors", "nbytes"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 291, sum(SHARDS.values())),
        ("EarthSpeciesProject/NatureLM-audio", 558, 1_556_386_132),
    ],
)
def test_inspect_finds_the_default_sources_in_the_cache(home: Path, source: str, tensors: int, nbytes: int) -> None:
    found = command_line(home, "inspect", source)
    assert sum(each["count"] for each in found["tensors"].values()) == tensors
    assert found["bytes"] == nbytes


def test_a_merge_of_the_defaults_is_planned_offline(home: Path) -> None:
    plan = command_line(home, "merge", "--alpha", "0.5", "--dry-run")
    modules = {each.pop("modules"): each for each in plan["modules"]}
    assert {name: each for name, each in modules.items() if "folded" in each} == {
        f"self_attn.{projection}_proj": {"folded": 32} for projection in "kqvo"
    }
    assert modules["audio tower"] == {"copied": 301}
    assert sum(each.get("copied", 0) for each in modules.values()) == 291 - 128 + 301
    naturelm = tensors(published_pair.ADAPTER.snapshot(home / "hub"))
    tower = sum(math.prod(shape) for name, (_, shape) in naturelm.items() if not name.startswith("llama_"))
    weights = 2 * 8_030_261_248 + 4 * tower + 4 * 512  # bfloat16 and float32, but for 512 int64 positions
    assert 0 < plan["bytes"]["written"] - weights < 1e6  # headers


PEAK = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""


def test_comparing_the_embeddings_takes_no_memory_to_speak_of(home: Path) -> None:
    """By the kernel's own count: 1.05 GB on either side are looked at, and not held, nor mapped."""
    command = [sys.executable, "-c", PEAK, PROGRAM, "merge", "--alpha", "0.5", "--dry-run", "--quiet"]
    done = subprocess.run(command, env=offline(home), capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.split())
    assert code == 0
    assert peak < 300e6


def test_a_tower_tensor_of_another_size_is_refused_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    naturelm = published_pair.ADAPTER.snapshot(home / "hub")
    (tmp_path / "config.json").write_text((naturelm / "config.json").read_text())
    changed = [
        tensor_file.Tensor("audio_query_tokens", (1, 2, 768), "F32") if tensor.name == "audio_query_tokens" else tensor
        for tensor in published_pair.adapter_tensors()
    ]
    tensor_file.write_tensors(tmp_path / "model.safetensors", changed, {}, sparse=True)
    options = ["--alpha", "0.5", "--adapter", tmp_path, "--out", tmp_path / "merged"]
    done = subprocess.run([PROGRAM, "merge", *options], env=offline(home), capture_output=True, text=True)
    assert done.returncode == 1
    assert "audio_query_tokens" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "merged").exists()


def test_transformers_has_nothing_to_say_about_a_merges_tokenizer(home: Path, tmp_path: Path) -> None:
    """With a vocabulary as large as Llama's it looks closer than with those of tiny models."""
    from mergekit_bio.audio.layout import merged_config

    llama, naturelm = published_pair.BASE.snapshot(home / "hub"), published_pair.ADAPTER.snapshot(home / "hub")
    for file in llama.glob("*token*.json"):
        shutil.copy(file, tmp_path)
    sources = [json.loads((tmp_path / "tokenizer.json").read_text())]
    sources += [json.loads((folder / "config.json").read_text()) for folder in (llama, naturelm)]
    config = merged_config(tokenizer=sources[0], text_config=sources[1], naturelm_config=sources[2])
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = "import sys, mergekit_bio.model, transformers; transformers.AutoTokenizer.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=offline(home), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
