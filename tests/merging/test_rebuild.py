"""A merge's receipt makes the same bytes again, on any number of threads and with any kernels; or says why not."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub.server import File, Hub
from merging.example import write_example
from merging.refusal import refused
from safetensors.torch import load_file, save_file

import mergekit_bio
from mergekit_bio.errors import SourceError, VerificationError
from mergekit_bio.hub.push import push
from mergekit_bio.merging import fold
from mergekit_bio.merging.rebuild import plan_rebuild, rebuild
from mergekit_bio.merging.verify import verify

NUMPY_FOLD = Path(__file__).with_name("numpy_fold.py")
SEED = 7


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and two LoRAs: wide/ in float32, narrow/ in bfloat16."""
    folder = tmp_path_factory.mktemp("sources")
    _, adapter = write_example(folder)
    adapter.rename(folder / "wide")
    (folder / "other").mkdir()
    _, other = write_example(folder / "other", seed=1)
    other.rename(folder / "narrow")
    file = folder / "narrow" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "narrow" / "adapter_config.json").read_text())
    (folder / "narrow" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    return folder


def merge(sources: Path, out: Path, *alphas, **options) -> list[Path]:
    adapters = [sources / "wide", (sources / "narrow", 0.7)]
    settings = {"base": sources / "base", "adapter": adapters, "seed": SEED, "device": "cpu", "fsync": False} | options
    return [merged.path for merged in mergekit_bio.merge(alphas=alphas, out=out, **settings)]


@pytest.fixture(scope="module")
def half(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (checkpoint,) = merge(sources, tmp_path_factory.mktemp("merged") / "half", 0.3)
    return checkpoint


@pytest.fixture
def receipt(half: Path, tmp_path: Path) -> Path:
    """The receipt alone, somewhere else."""
    return Path(shutil.copy(half / "merge.json", tmp_path / "merge.json"))


def hashes(checkpoint: Path) -> dict[str, str]:
    tensors = json.loads((checkpoint / "merge.json").read_text())["tensors"]
    return {name: record["sha256"] for name, record in tensors.items()}


def same_files(first: Path, second: Path) -> bool:
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (first, second)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(first, second, names[0], shallow=False)[1:])


def rebuilt(receipt: Path | str, out: Path, **options) -> Path:
    return rebuild(plan_rebuild(receipt, out=out, device="cpu", fsync=False, **options)).path


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(sys.platform != "linux", reason="chooses cores as Linux does")
@pytest.mark.parametrize(("cores", "elements"), [(1, 1 << 19), (2, 1 << 19), (2, 1 << 9), (1, 3000)])
def test_threads_and_block_sizes_do_not_change_a_byte(sources, half, tmp_path, monkeypatch, cores, elements):
    monkeypatch.setitem(fold.BLOCK_ELEMENTS, "cpu", elements)
    with on_cores(cores):
        (checkpoint,) = merge(sources, tmp_path / "merged", 0.3)
    assert hashes(checkpoint) == hashes(half)


@pytest.mark.parametrize("kernels", ["Nehalem", "Haswell", "SkylakeX"])
def test_numpy_folds_to_the_same_bytes_with_whatever_kernels(sources, half, kernels):
    arguments = [sources / "base", str(SEED), sources / "wide", "0.3", sources / "narrow", "0.7"]
    done = subprocess.run(
        [sys.executable, NUMPY_FOLD, *arguments],
        env=os.environ | {"OPENBLAS_CORETYPE": kernels, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == hashes(half)


def test_a_clean_directory_gets_every_byte_with_the_kernels_of_another_machine(half, receipt, tmp_path):
    """MKL's and PyTorch's own most compatible kernels: other orders of sums, and no instruction for product and sum."""
    command = [sys.executable, "-c", "from mergekit_bio.cli.app import main; main()", "rebuild", receipt, "--json"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out", "--device", "cpu"],
        env=os.environ | {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == 16
    assert same_files(tmp_path / "out", half)
    verify(tmp_path / "out", against_sources=True)


def test_every_checkpoint_of_a_sweep_is_rebuilt_alone(sources, tmp_path):
    alphas = [0, 0.5, "0.1,layers=0.2..0.8,k_proj=0", "q_proj=0.3"]
    for checkpoint in merge(sources, tmp_path / "sweep", *alphas, adapter=sources / "wide"):
        assert same_files(rebuilt(checkpoint / "merge.json", tmp_path / "out" / checkpoint.name), checkpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float16", "rounding": "nearest"},
        {"share": False},
        {"hash": "full"},
        {"adapter": ("wide", 0.5)},
    ],
    ids=str,
)
def test_whatever_a_merge_was_asked_for_is_in_its_receipt(sources, tmp_path, options):
    if "adapter" in options:
        options = {"adapter": [sources / "narrow", (sources / "wide", 0.5)]}
    for checkpoint in merge(sources, tmp_path / "s", "0.4,layers=0.2..0.8", 0.5, **options):
        assert same_files(rebuilt(checkpoint, tmp_path / "out" / checkpoint.name), checkpoint)


def test_a_merge_with_ears_is_rebuilt(merged, tmp_path):
    assert same_files(rebuilt(merged / "merge.json", tmp_path / "out"), merged)


def publish(hub: Hub, name: str, folder: Path) -> str:
    """Put a folder on the hub; returns the commit."""
    contents = {path.name: path for path in folder.iterdir()}
    large = {name: hub.keep(path.read_bytes()) for name, path in contents.items() if path.suffix == ".safetensors"}
    small = {name: File.regular(path.read_bytes()) for name, path in contents.items() if name not in large}
    repo = hub.repos.get(name) or hub.create(name)
    return repo.commit(repo.files() | large | small)


def test_a_receipt_on_the_hub_fetches_what_was_merged_and_no_more(hub, sources, tmp_path):
    """What is published is kilobytes; who rebuilds it needs the receipt's name only, whatever has been pushed since."""
    for name, folder in (("owl/Llama-tiny", "base"), ("owl/wide", "wide")):
        publish(hub, name, sources / folder)
    (checkpoint,) = merge(sources, tmp_path / "half", 0.3, base="owl/Llama-tiny", adapter="owl/wide")
    report = push(checkpoint, "owl/Llama-tiny-receipt", receipt=True)
    assert [file.path for file in report.files] == ["merge.json", "README.md"]
    assert sum(file.bytes for file in report.files) < 20_000 and report.notes == ()
    assert (
        "mergekit-bio rebuild owl/Llama-tiny-receipt"
        in hub.repos["owl/Llama-tiny-receipt"].files()["README.md"].content.decode()
    )
    publish(hub, "owl/wide", sources / "narrow")  # the branch goes on
    assert same_files(rebuilt("owl/Llama-tiny-receipt", tmp_path / "out"), checkpoint)


def test_a_source_that_was_changed_is_named(sources, receipt, tmp_path):
    other = shutil.copytree(sources / "wide", tmp_path / "changed")
    file = other / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(VerificationError, match=r"changed: is not the wide that was merged"):
        rebuilt(receipt, tmp_path / "out", adapters=[str(other), str(sources / "narrow")])
    base = shutil.copytree(sources / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"rope_theta": 1.0}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"config\.json cannot be made again: its source was changed"):
        rebuilt(receipt, tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_a_source_that_has_moved_is_asked_for(sources, tmp_path):
    home = shutil.copytree(sources, tmp_path / "home")
    for name in ("base", "wide", "narrow"):
        (home / name / "LICENSE").write_text(f"the terms of {name}")
    (checkpoint,) = merge(home, tmp_path / "half", 0.3)
    home.rename(tmp_path / "away")
    with pytest.raises(SourceError, match=r"no such directory; say where wide is now with --adapter"):
        rebuilt(checkpoint, tmp_path / "out")
    for name in ("base", "wide", "narrow"):
        (tmp_path / "away" / name).rename(tmp_path / "away" / f"new-{name}")
    adapters = [str(tmp_path / "away" / name) for name in ("new-wide", "new-narrow")]
    moved = {"base": str(tmp_path / "away/new-base"), "adapters": adapters}
    assert same_files(rebuilt(checkpoint, tmp_path / "out", **moved), checkpoint)


def edited(receipt: Path, edit: Callable[[dict], None]) -> Path:
    document = json.loads(receipt.read_text())
    edit(document)
    receipt.write_text(json.dumps(document))
    return receipt


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda receipt: receipt.update(seed=8), "k_proj.weight (and 15 more): is not what the receipt records"),
        (lambda receipt: receipt["files"].popitem(), "00002-of-00002.safetensors: is not what the receipt records"),
        (lambda receipt: receipt.update(arithmetic=3), "whose arithmetic was another (3, this version's is 2)"),
        (lambda receipt: receipt.update(format="mergekit-bio/merge@4"), "is not 'mergekit-bio/merge@3'"),
    ],
)  # fmt: skip
def test_what_does_not_come_out_as_recorded_is_refused_and_leaves_nothing(receipt, tmp_path, edit, complaint):
    line = refused("rebuild", edited(receipt, edit), "--out", tmp_path / "out", "--device=cpu", watch=tmp_path)
    assert complaint in line


@pytest.mark.parametrize("number", [1, 2])
def test_older_formats_are_read_and_not_rebuilt(half, tmp_path, number):
    def older(document: dict) -> None:
        document["format"] = f"mergekit-bio/merge@{number}"
        for key in ["arithmetic", "tokenizer", "sweep", *(["companions"] if number == 1 else [])]:
            del document[key]
        for adapter in document["adapters"]:
            del adapter["own_alpha"]

    old = Path(shutil.copytree(half, tmp_path / "old"))
    edited(old / "merge.json", older)
    assert verify(old, against_sources=True).recomputed == 16
    line = refused("rebuild", old / "merge.json", "--out", tmp_path / "out", watch=tmp_path)
    assert "whose arithmetic was another (1, this version's is 2)" in line


def test_whole_files_are_recorded_and_checked_where_it_is_asked_for(sources, tmp_path):
    import hashlib

    (checkpoint,) = merge(sources, tmp_path / "half", 0.3, hash="full")
    files = json.loads((checkpoint / "merge.json").read_text())["files"]
    for name, record in files.items():
        assert record["sha256"] == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    verify(checkpoint)
    shard = checkpoint / min(files)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # of a tensor that is copied, whose bytes are hashed nowhere else
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match="was changed after the merge"):
        verify(checkpoint)


@pytest.mark.parametrize("hash", ["folded", "full"])
def test_what_is_said_of_copied_tensors_is_what_was_compared(sources, tmp_path, command_line, hash):
    """The middle of a tensor that no delta touches is in no fingerprint; hashes of whole files have it."""
    base = Path(shutil.copytree(sources / "base", tmp_path / "base"))
    (checkpoint,) = merge(sources, tmp_path / "half", 0.3, base=base, hash=hash)
    file = base / "model-00001-of-00002.safetensors"
    row = load_file(file)["model.embed_tokens.weight"][1024].view(torch.uint8).numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(row, bytes(len(row))))
    code, out, err = command_line("rebuild", checkpoint, "--out", tmp_path / "out", "--device", "cpu", "--no-fsync")
    if hash == "full":
        assert code == 1 and "is not what the receipt records" in err
    else:
        assert code == 0, err
        assert "copied tensors are known by their source's fingerprint" in out and "byte for byte" not in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_folds_to_the_same_bytes(sources, half, tmp_path):
    (checkpoint,) = merge(sources, tmp_path / "merged", 0.3, device="cuda")
    assert hashes(checkpoint) == hashes(half)
