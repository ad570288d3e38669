"""What a merge writes: which files, which bytes, and what several strengths share."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from merging.example import write_example
from merging.oracle import read_tensors, same_bits
from safetensors.torch import load_file, save_file

import mergekit_bio
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.errors import AdapterError
from mergekit_bio.merging import fold
from mergekit_bio.merging.merge import plan_merge
from mergekit_bio.merging.request import AdapterEntry, MergeRequest
from mergekit_bio.merging.verify import verify

COMPANIONS = {"README.md", "config.json", "merge.json"}
FOLDED = [f"model.layers.{n}.self_attn.{m}_proj.weight" for n in range(4) for m in "qkvo"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    return write_example(tmp_path_factory.mktemp("example"))


def merge(sources, out, *alphas, **options):
    return mergekit_bio.merge(base=sources[0], adapter=sources[1], alphas=alphas, out=out, **options)


def printed(program: str, *arguments: Path) -> str:
    """What a program prints that runs to its end, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def exact(sources, alpha: float) -> dict[str, torch.Tensor]:
    """Every weight in float64, by the definition."""
    factors = load_file(sources[1] / "adapter_model.safetensors")
    weights = {name: value.double() for name, value in read_tensors(sources[0]).items()}
    for name in FOLDED:
        a, b = (factors[f"base_model.model.{name[: -len('.weight')]}.lora_{x}.weight"].double() for x in "AB")
        weights[name] += alpha * (b @ a)
    return weights


def test_the_keywords_of_merge_are_the_fields_of_a_request_with_their_defaults():
    keywords = dict(inspect.signature(mergekit_bio.merge).parameters)
    assert keywords.keys() == {field.name for field in fields(MergeRequest)}
    assert keywords.pop("alphas").default is inspect.Parameter.empty  # of strengths alone there is no good default
    assert {name: keyword.default for name, keyword in keywords.items()} == {
        field.name: field.default for field in fields(MergeRequest) if field.name in keywords
    }


def test_every_keyword_of_merge_reaches_the_request(sources, monkeypatch):
    monkeypatch.setattr("mergekit_bio.merging.merge.carry_out", lambda plan: plan.request)
    options = {
        "base": sources[0], "alphas": ["0:1:0.5"], "out": "elsewhere", "dtype": "float32", "rounding": "nearest",
        "seed": 7, "device": "cpu", "text_only": True, "base_from_adapter": True, "tokenizer": "base",
        "share": False, "hash": "full", "fsync": False, "overwrite": True,
    }  # fmt: skip
    request = MergeRequest(**options, adapter=[AdapterEntry(sources[1], 0.3)])
    assert mergekit_bio.merge(**options, adapter=(sources[1], 0.3)) == request
    assert not [field.name for field in fields(MergeRequest) if getattr(request, field.name) == field.default]


def test_the_example_of_the_package_does_what_it_says(sources, tmp_path, monkeypatch, capsys):
    for name, source in zip(("llama", "lora"), sources, strict=True):
        (tmp_path / name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    example = next(part for part in mergekit_bio.__doc__.split("\n\n") if "MergeRequest(" in part)
    variables = {}
    exec("from mergekit_bio import MergeRequest, carry_out, plan_merge\n" + textwrap.dedent(example), variables)
    plan, checkpoints = variables["plan"], [variables[name] for name in ("base", "half", "whole")]
    shown = f"['alpha-0.00', 'alpha-0.50', 'alpha-1.00']\n{len(plan.folds)} {plan.bytes_on_disk}\n"
    assert capsys.readouterr().out == shown
    assert [checkpoint.path for checkpoint in checkpoints] == [
        Path(f"sweep/alpha-{n}") for n in ("0.00", "0.50", "1.00")
    ]
    assert all(verify(checkpoint.path, against_sources=True) for checkpoint in checkpoints)


def test_one_strength_keeps_the_bases_sharding(sources, tmp_path):
    (merged,) = merge(sources, tmp_path / "out", 0.5)
    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert {path.name for path in merged.path.iterdir()} == COMPANIONS | shards | {"model.safetensors.index.json"}
    ours, bases = (Checkpoint.open(folder).shards for folder in (merged.path, sources[0]))
    assert [shard.header for shard in ours] == [shard.header for shard in bases]
    weights, base = read_tensors(merged.path), read_tensors(sources[0])
    for name in weights:
        assert same_bits(weights[name], base[name]) == (name not in FOLDED), name
    assert json.loads((merged.path / "config.json").read_text()) == json.loads((sources[0] / "config.json").read_text())


def test_nearest_is_the_correctly_rounded_value(sources, tmp_path):
    (merged,) = merge(sources, tmp_path / "out", 0.7, rounding="nearest")
    weights, truth = read_tensors(merged.path), exact(sources, 0.7)
    wrong = sum(int((weights[name] != truth[name].to(torch.bfloat16)).sum()) for name in FOLDED)
    assert wrong <= 2  # where float32 falls on the other side of a tie


def test_stochastic_keeps_what_nearest_swallows(sources, tmp_path):
    (merged,) = merge(sources, tmp_path / "out", 0.25)
    (nearest,) = merge(sources, tmp_path / "nearest", 0.25, rounding="nearest")
    base, truth = read_tensors(sources[0]), exact(sources, 0.25)
    kept = {}
    for checkpoint in (merged, nearest):
        weights = read_tensors(checkpoint.path)
        moved = torch.cat([(weights[name].double() - base[name].double()).flatten() for name in FOLDED])
        delta = torch.cat([(truth[name] - base[name].double()).flatten() for name in FOLDED])
        kept[checkpoint.path.name] = float(moved @ delta / (delta @ delta))
    assert abs(kept["out"] - 1) < 0.02
    assert kept["nearest"] < 0.6
    total = merged.rounding_loss[-1]
    assert total.bias < 0.02 and abs(total.bias_nearest - (1 - kept["nearest"])) < 0.02


def test_strength_zero_is_the_base_byte_for_byte(sources, tmp_path):
    for options in ({}, {"rounding": "nearest"}):
        (merged,) = merge(sources, tmp_path / f"out{len(options)}", 0, **options)
        assert merged.unchanged
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            assert (merged.path / name).read_bytes() == (sources[0] / name).read_bytes()


def test_a_sweep_equals_its_strengths_one_by_one_and_stores_the_rest_once(sources, tmp_path):
    sweep = merge(sources, tmp_path / "sweep", "0:1:0.25")
    assert [merged.path.name for merged in sweep] == [f"alpha-{n}" for n in ("0.00", "0.25", "0.50", "0.75", "1.00")]
    for merged in sweep:
        (alone,) = merge(sources, tmp_path / merged.path.name, merged.alpha)
        weights, expected = read_tensors(merged.path), read_tensors(alone.path)
        assert weights.keys() == expected.keys()
        assert all(same_bits(weights[name], expected[name]) for name in weights)
        shared = [path for path in merged.path.glob("*.safetensors") if path.stat().st_nlink == len(sweep)]
        assert len(shared) == 2 and not any(path.stat().st_mode & 0o222 for path in shared)
        manifest = json.loads((merged.path / "merge.json").read_text())
        assert manifest["shared"]["files"] == sorted(path.name for path in shared)
        assert "hard links" in (merged.path / "README.md").read_text()
    used = {path.stat().st_ino: path.stat().st_size for path in (tmp_path / "sweep").rglob("*.safetensors")}
    attention = sum(info.nbytes for name, info in Checkpoint.open(sources[0]).tensors.items() if name in FOLDED)
    whole = Checkpoint.open(sources[0]).nbytes
    assert sum(used.values()) < whole + 4 * attention + 20_000


def test_without_sharing_every_strength_stands_alone(sources, tmp_path):
    for merged in merge(sources, tmp_path / "sweep", 0.5, 1.0, share=False):
        assert all(path.stat().st_nlink == 1 for path in merged.path.iterdir())
        assert json.loads((merged.path / "merge.json").read_text())["shared"] is None
        assert Checkpoint.open(merged.path).shards[0].header == Checkpoint.open(sources[0]).shards[0].header


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype_for_all_weights(sources, tmp_path, dtype):
    (merged,) = merge(sources, tmp_path / "out", 0.5, dtype=dtype, rounding="nearest")
    weights, truth = read_tensors(merged.path), exact(sources, 0.5)
    wanted = getattr(torch, dtype)
    for name, value in weights.items():
        assert value.dtype == wanted
        assert (value != truth[name].to(wanted)).sum() <= 1, name
    assert json.loads((merged.path / "config.json").read_text())["torch_dtype"] == dtype


def test_another_dtype_for_tensors_that_hold_nothing(sources, tmp_path):
    base = shutil.copytree(sources[0], tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    shard = base / min(index["weight_map"].values())
    empty = {"model.none": torch.empty(0, dtype=torch.bfloat16), "model.no_columns": torch.empty(3, 0)}
    save_file(load_file(shard) | empty, shard, {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(empty, shard.name)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (merged,) = merge((base, sources[1]), tmp_path / "out", 0.5, dtype="float16")
    weights = read_tensors(merged.path)
    assert {name: (weights[name].dtype, weights[name].shape) for name in empty} == {
        name: (torch.float16, tensor.shape) for name, tensor in empty.items()
    }
    verify(merged.path, against_sources=True)


def test_strengths_by_module_and_layer(sources, tmp_path):
    (merged,) = merge(sources, tmp_path / "out", "q_proj=0.3,layers.2-3.self_attn.o_proj=0.6", dtype="float32")
    weights, base = read_tensors(merged.path), read_tensors(sources[0])
    strengths = {
        name: 0.3 if "q_proj" in name else 0.6 if name.split(".")[2] in "23" and "o_proj" in name else 0.0
        for name in FOLDED
    }
    for name, strength in strengths.items():
        assert torch.equal(weights[name], exact(sources, strength)[name].float()), name
        assert (strength == 0) == torch.equal(weights[name], base[name].float())


def test_a_strength_that_goes_from_the_first_layer_to_the_last(sources, tmp_path):
    (merged,) = merge(sources, tmp_path / "out", "0.9,layers=0.1..0.7,k_proj=1", dtype="float32")
    weights = read_tensors(merged.path)
    for name in FOLDED:
        strength = 1.0 if "k_proj" in name else (0.1, 0.3, 0.5, 0.7)[int(name.split(".")[2])]
        assert torch.allclose(weights[name].double(), exact(sources, strength)[name], rtol=2**-24, atol=1e-17), name
    (adapter,) = json.loads((merged.path / "merge.json").read_text())["adapters"]
    assert adapter["alpha"] == {"default": 0.9, "modules": {"layers": "0.1..0.7", "k_proj": 1.0}}
    assert "0.1 in the first layer to 0.7 in the last on `layers`" in (merged.path / "README.md").read_text()


def test_several_adapters_add_up_each_with_its_own_strength(sources, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_example(tmp_path / "other", seed=7)
    pair = [str(sources[1]), (str(other[1]), 0.2)]
    (merged,) = mergekit_bio.merge(base=sources[0], adapter=pair, alphas=[0.6], out=tmp_path / "out", dtype="float32")
    weights, base = read_tensors(merged.path), read_tensors(sources[0])
    one, two = exact(sources, 0.6), exact((sources[0], other[1]), 0.2)
    for name in FOLDED:
        expected = one[name] + two[name] - base[name].double()
        assert torch.allclose(weights[name].double(), expected, rtol=1e-7, atol=1e-12), name


def test_a_full_fine_tune_is_a_dense_delta(sources, tmp_path):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    base = read_tensors(sources[0])
    generator = torch.Generator().manual_seed(3)
    weights = {n: (v.float() + 0.01 * torch.randn(v.shape, generator=generator)).bfloat16() for n, v in base.items()}
    save_file(weights, tuned / "model.safetensors")
    (tuned / "config.json").write_text((sources[0] / "config.json").read_text())
    (merged,) = mergekit_bio.merge(base=sources[0], adapter=tuned, alphas=[0.3], out=tmp_path / "out", dtype="float32")
    for name, value in read_tensors(merged.path).items():
        expected = base[name].double() + 0.3 * (weights[name].double() - base[name].double())
        assert torch.allclose(value.double(), expected, rtol=2**-24, atol=1e-17), name  # half a unit of the last place
    (whole,) = mergekit_bio.merge(base=sources[0], adapter=tuned, alphas=[1], out=tmp_path / "whole")
    assert all(same_bits(value, weights[name]) for name, value in read_tensors(whole.path).items())


def test_the_bits_do_not_depend_on_the_buffer_size(sources, tmp_path, monkeypatch):
    (one,) = merge(sources, tmp_path / "one", 0.5)
    for elements in (1 << 9, 3000, 1 << 22):
        monkeypatch.setitem(fold.BLOCK_ELEMENTS, "cpu", elements)
        (other,) = merge(sources, tmp_path / str(elements), 0.5)
        weights, expected = read_tensors(other.path), read_tensors(one.path)
        assert all(same_bits(weights[name], expected[name]) for name in weights)


def test_the_seed_decides(sources, tmp_path):
    runs = {seed: read_tensors(merge(sources, tmp_path / str(seed), 0.5, seed=seed)[0].path) for seed in (0, 1)}
    assert not any(same_bits(runs[0][name], runs[1][name]) for name in FOLDED)


def test_transformers_loads_it_as_it_is(sources, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the eval extra is not installed")
    (merged,) = merge(sources, tmp_path / "out", 0.5)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(merged.path, output_loading_info=True)
    assert not any(found.values())
    weights = read_tensors(merged.path)
    for name, value in model.state_dict().items():
        assert same_bits(value, weights[name])


def test_a_plan_reads_no_weight_and_imports_no_torch(sources):
    program = (
        "import sys; from mergekit_bio import MergeRequest; from mergekit_bio.merging.merge import plan_merge\n"
        "plan = plan_merge(MergeRequest(base=sys.argv[1], adapter=sys.argv[2], alphas=[0.5]))\n"
        "print(len(plan.folds), 'torch' in sys.modules)"
    )
    assert printed(program, *sources) == "16 False\n"


def test_a_plan_of_directories_imports_no_client_of_the_hub(tmp_path):
    base, adapter = write_example(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owl/base"}))
    program = (
        "import sys; from mergekit_bio import MergeRequest; from mergekit_bio.merging.merge import plan_merge\n"
        "plan_merge(MergeRequest(base=sys.argv[1], adapter=sys.argv[2], alphas=[0.5]))\n"
        "print('huggingface_hub' in sys.modules)"
    )
    assert printed(program, base, adapter) == "False\n"


def test_a_merge_that_only_copies_imports_no_torch(sources, tmp_path):
    program = (
        "import sys, mergekit_bio\n"
        "mergekit_bio.merge(base=sys.argv[1], adapter=sys.argv[2], alphas=[0], out=sys.argv[3])\n"
        "print('torch' in sys.modules)"
    )
    assert printed(program, *sources, tmp_path / "out") == "False\n"
    assert json.loads((tmp_path / "out/merge.json").read_text())["versions"]["torch"] == torch.__version__


def test_the_plan_accounts_for_every_byte(sources):
    for alphas in ([0.5], ["0:1:0.1"]):
        plan = plan_merge(MergeRequest(base=sources[0], adapter=sources[1], alphas=alphas))
        held = sum(len(shard.header) + sum(copy.count for copy in shard.copies) for shard in plan.shards)
        assert held + plan.bytes_folded == plan.bytes_on_disk
        assert {fold.name for fold in plan.folds} == set(FOLDED)


MEMORY = """
import sys, threading, time, torch
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
import mergekit_bio
from mergekit_bio.merging import card, fold, merge, record, write
import huggingface_hub.repocard
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
mergekit_bio.merge(base=sys.argv[1], adapter=sys.argv[2], alphas=["0:1:0.25"], out=sys.argv[3], fsync=False)
done.set(); thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("gigabytes", [0.25, 0.75])
def test_memory_is_bounded_whatever_the_models_size(tmp_path, gigabytes):
    """The promise: at most 200 MB of anonymous memory above a bare torch. Measured at two sizes, three times apart."""
    synthetic = pytest.importorskip("synthetic", reason="eval/ is not on the path")
    shape = synthetic.scaled(synthetic.SHAPES["1b"], gigabytes * 1e9)
    synthetic.write_llama(tmp_path / "base", shape)
    synthetic.write_adapter(tmp_path / "adapter", shape, base=tmp_path / "base")
    paths = [tmp_path / name for name in ("base", "adapter", "out")]
    assert int(printed(MEMORY, *paths)) < 200e6


def test_more_strengths_than_files_that_may_be_open(sources, tmp_path):
    program = (
        "import resource, sys, mergekit_bio\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))\n"
        "sources = dict(base=sys.argv[1], adapter=sys.argv[2])\n"
        "print(len(mergekit_bio.merge(**sources, alphas=['0:0.099:0.001'], out=sys.argv[3], fsync=False)))"
    )
    assert printed(program, *sources, tmp_path / "out") == "100\n"


def test_torch_computes_afterwards_on_as_many_threads_as_before(sources, tmp_path):
    program = (
        "import sys, threading, mergekit_bio, torch\n"
        "torch.set_num_threads(3)\n"
        "mergekit_bio.merge(base=sys.argv[1], adapter=sys.argv[2], alphas=[0.5], out=sys.argv[3])\n"
        "counts = [torch.get_num_threads()]\n"
        "thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))\n"
        "thread.start(); thread.join(); print(*counts)"
    )
    assert printed(program, *sources, tmp_path / "out") == "3 3\n"


def test_tokenizer_and_processor_files_come_along_whatever_they_are_called(sources, tmp_path):
    base = shutil.copytree(sources[0], tmp_path / "base")
    wanted = ("preprocessor_config.json", "vocab.txt", "spiece.model", "tekken.json", "qwen.tiktoken")
    for name in (*wanted, "adapter_config.json", "trainer_state.json", "token.txt", "pytorch_model.bin", "LICENSE~"):
        (base / name).write_text(name)
    (merged,) = merge((base, sources[1]), tmp_path / "out", 0.5)
    shards = {path.name for path in merged.path.glob("model*")}
    assert {path.name for path in merged.path.iterdir()} == COMPANIONS | shards | set(wanted)


def test_adapters_of_one_name_keep_their_licences(sources, tmp_path):
    adapters = [shutil.copytree(sources[1], tmp_path / place) for place in ("a/lora", "b/lora-2", "c/lora", "d/.lora")]
    for adapter in adapters:
        (adapter / "LICENSE").write_text(str(adapter))
    (merged,) = mergekit_bio.merge(base=sources[0], adapter=adapters, alphas=[0.5], out=tmp_path / "out")
    texts = {path.name: path.read_text() for path in merged.path.glob("*LICENSE")}
    names = ["lora-LICENSE", "lora-2-LICENSE", "lora-3-LICENSE", "lora-4-LICENSE"]
    assert texts == dict(zip(names, map(str, adapters), strict=True))
    manifest = json.loads((merged.path / "merge.json").read_text())
    assert [adapter["license_files"] for adapter in manifest["adapters"]] == [[name] for name in names]


def test_a_locale_without_utf8_and_names_with_brackets(sources, tmp_path):
    base = shutil.copytree(sources[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"made_for": "vögel日本"}
    (base / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    out = tmp_path / "out[/final]"
    command = [sys.executable, "-c", "from mergekit_bio.cli.app import main; main()"]
    done = subprocess.run(
        [*command, "merge", "--base", base, "--adapter", sources[1], "--alpha=0.5", "--out", out],
        env=os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(out).encode() in done.stdout
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == config


def as_bin(adapter: Path, folder: Path, document: object) -> Path:
    """The adapter directory with an old-style adapter_model.bin instead of safetensors."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    torch.save(document, folder / "adapter_model.bin")
    return folder


def test_an_old_adapter_in_a_bin_file_gives_the_same_bytes(sources, tmp_path):
    old = as_bin(sources[1], tmp_path / "old", load_file(sources[1] / "adapter_model.safetensors"))
    (merged,) = merge((sources[0], old), tmp_path / "out", 0.5)
    (expected,) = merge(sources, tmp_path / "expected", 0.5)
    ours, theirs = read_tensors(merged.path), read_tensors(expected.path)
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_no_pickle_is_executed(sources, tmp_path):
    old = as_bin(sources[1], tmp_path / "old", {"x": Evil(tmp_path / "was-here")})
    with pytest.raises(AdapterError, match="is not loaded"):
        merge((sources[0], old), tmp_path / "out", 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
