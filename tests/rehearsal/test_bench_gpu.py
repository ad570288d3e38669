"""The GPU's benchmark checks what it times, and says what it could not do. Here it runs on the CPU, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_bio

bench_gpu = pytest.importorskip("bench_gpu", reason="eval/ is not on the path")
tiny_naturelm = pytest.importorskip("tiny_naturelm", reason="eval/ is not on the path")


def table(tmp_path: Path, *words: object, env: dict[str, str] | None = None) -> list[list[str]]:
    """The rows that the real program prints: part, what, figure, check."""
    command = [sys.executable, bench_gpu.__file__, "--scale", "tiny", "--scratch", tmp_path / "scratch", *words]
    done = subprocess.run([*map(str, command)], env=os.environ | (env or {}), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "scratch").exists()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"][
        2:
    ]


@pytest.mark.soak
def test_all_of_it_runs_without_a_gpu_and_finds_its_results_right(tmp_path: Path) -> None:
    rows = table(tmp_path, "--out", tmp_path / "gpu.md")
    right = {(part, what) for part, what, _, check in rows if check == "right"}
    assert right >= {
        ("merge", "against a CPU's merge"),
        ("sweep", "against a CPU's merge"),
        ("tower", "against a CPU's tower"),
        ("Transformers", "against a CPU's answers, float32"),
    }
    for part in ("Transformers", "vLLM"):
        (skipped,) = [row for row in rows if row[0] == part and "skipped" in row[2]] or [None]
        assert skipped or any("two beams" in what for name, what, *_ in rows if name == part)
    assert "| Transformers | 8 prompts, 8 tokens, greedy |" in (tmp_path / "gpu.md").read_text()


def test_a_package_that_is_missing_is_named_with_all_that_needs_it(tmp_path: Path) -> None:
    hiding = tmp_path / "hiding" / "ruamel"  # a package of this name without a module yaml
    hiding.mkdir(parents=True)
    (hiding / "__init__.py").touch()
    rows = table(tmp_path, "--parts", "files", "merge", "Transformers", env={"PYTHONPATH": str(hiding.parent)})
    figures = {part: figure for part, _, figure, _ in rows}
    assert figures["merge"] == "skipped: needs ruamel.yaml: pip install ruamel.yaml"
    assert figures["Transformers"] == "skipped: needs the files of merge, sweep"


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path: Path) -> None:
    rows = table(tmp_path, "--parts", "files", "merge", "--minutes", 0.01)
    assert [(part, figure.split(";")[0]) for part, _, figure, _ in rows] == [
        ("files", "stopped after 1 s"),
        ("merge", "skipped: needs the files of files"),
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    tiny_naturelm.make_base(folder / "base", dtype=torch.bfloat16)
    tiny_naturelm.make_naturelm(folder / "naturelm")
    return folder


def merged(sources: Path, out: Path, **options: object) -> Path:
    options = {"alphas": 0.5, "device": "cpu"} | options
    (checkpoint,) = mergekit_bio.merge(base=sources / "base", adapter=sources / "naturelm", out=out, **options)
    return checkpoint.path


def test_two_merges_of_the_same_are_right(sources: Path, tmp_path: Path) -> None:
    row = bench_gpu.same_merges(merged(sources, tmp_path / "one"), merged(sources, tmp_path / "other"))
    assert row.right
    assert row.figure.startswith("8 of 8 tensors equal by sha256; 0 of ")


@pytest.mark.parametrize("options", [{"alphas": 0.6}, {"seed": 1}])
def test_merges_that_differ_in_many_values_are_wrong(sources: Path, tmp_path: Path, options: dict[str, object]) -> None:
    one, other = merged(sources, tmp_path / "one"), merged(sources, tmp_path / "other", **options)
    assert bench_gpu.same_merges(one, other).right is False


def test_bytes_that_are_not_those_of_the_record_are_wrong(sources: Path, tmp_path: Path) -> None:
    one, other = merged(sources, tmp_path / "one"), merged(sources, tmp_path / "other")
    for folder in (one, other):  # alike, but not what merge.json says
        file = next(file for file in folder.glob("*.safetensors") if any("q_proj" in name for name in load_file(file)))
        tensors = load_file(file)
        name = next(name for name in tensors if "q_proj" in name)
        tensors[name][0, 0] += 1
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})
    row = bench_gpu.same_merges(one, other)
    assert row.figure.startswith("8 of 8 tensors equal")
    assert row.right is False


def test_neighbours_across_zero_are_one_step_apart() -> None:
    """By PyTorch's own nextafter, from the smallest number to zero, and on to the smallest below it."""
    smallest = torch.nextafter(torch.zeros((), dtype=torch.bfloat16), torch.ones((), dtype=torch.bfloat16))
    values = torch.stack([-smallest, torch.zeros_like(smallest), smallest, torch.nextafter(smallest, 2 * smallest)])
    assert (bench_gpu.places(values[1:]) - bench_gpu.places(values[:-1])).tolist() == [1, 1, 1]
