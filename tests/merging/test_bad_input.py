"""What a merge refuses, in one line that names what is wrong, with nothing left behind."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from merging.refusal import refused
from merging.tiny import Case, train, write_base
from permissions import for_everybody, unprivileged
from safetensors.torch import load_file, save_file

import mergekit_bio
from mergekit_bio.checkpoint.publish import staged
from mergekit_bio.cli.app import main
from mergekit_bio.errors import AdapterError, RecipeError
from mergekit_bio.merging.request import read_request
from mergekit_bio.merging.verify import verify

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, a LoRA that has a trained norm and head too, and a full fine-tune of the base."""
    root = tmp_path_factory.mktemp("sound")
    write_base("llama", root / "base")
    train(Case.of("lora", modules_to_save=["lm_head"]), root / "base", root / "adapter")
    shutil.copytree(root / "base", root / "finetune")
    for file in (root / "finetune").glob("*.safetensors"):
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return root


@pytest.fixture
def sources(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "sources")


def merge(root: Path, *options: object, adapter: str = "adapter", out: Path | None = None, alpha: object = 0.5) -> str:
    """Merge, expecting a refusal; later options win."""
    place = root / "merged" if out is None else out
    arguments = ("--base", root / "base", "--adapter", root / adapter, "--out", place, "--device", "cpu")
    return refused("merge", *arguments, f"--alpha={alpha}", *options, watch=root.parent)


def change_config(root: Path, **settings: object) -> None:
    file = root / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensor(file: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


def put(value: float) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.view(-1)[-1:].fill_(value)


# Adapters for something else


def test_the_sources_are_sound(sources: Path) -> None:
    for adapter in ("adapter", "finetune"):
        out = sources / f"{adapter}-merged"
        mergekit_bio.merge(base=sources / "base", adapter=sources / adapter, alphas=[0.5], out=out, device="cpu")


def test_an_adapter_for_a_wider_model(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    wide = {name: torch.zeros(4, 64) if name.endswith("lora_A.weight") else t for name, t in tensors.items()}
    save_file(wide, file, {"format": "pt"})
    line = merge(sources)

    assert str(file) in line
    assert "q_proj" in line or "k_proj" in line
    assert "another model" in line


def test_an_adapter_for_a_deeper_model(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    deeper = {name.replace(".layers.1.", ".layers.31."): tensor for name, tensor in load_file(file).items()}
    save_file(deeper, file, {"format": "pt"})
    line = merge(sources)

    assert str(sources / "adapter") in line
    assert "layers." in line


def test_targets_that_the_base_does_not_have(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    change_config(sources, target_modules=["query", "k_proj", "v_proj", "o_proj"])
    line = merge(sources)

    assert str(file) in line
    assert "query" in line
    assert "another model" in line


@pytest.mark.parametrize("targets", [["query"], "transformer.*", []], ids=["list", "regex", "empty"])
def test_targets_that_match_nothing(sources: Path, targets: object) -> None:
    change_config(sources, target_modules=targets)
    line = merge(sources)

    assert "adapter_config.json" in line
    assert "target_modules" in line


def test_a_lora_without_tensors(sources: Path) -> None:
    save_file({}, sources / "adapter" / "adapter_model.safetensors", {"format": "pt"})

    assert str(sources / "adapter") in merge(sources)


def test_a_target_whose_lora_is_missing(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(Q_PROJ)}
    save_file(kept, file, {"format": "pt"})

    assert Q_PROJ.removeprefix("base_model.model.") in merge(sources)


def test_half_a_lora(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"{Q_PROJ}.lora_B.weight"]
    save_file(tensors, file, {"format": "pt"})

    assert f"{Q_PROJ}.lora_A.weight" in merge(sources)


def test_a_tensor_that_nobody_understands(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"{Q_PROJ}.lora_C.weight": torch.zeros(4, 4)}, file, {"format": "pt"})
    line = merge(sources)

    assert str(file) in line
    assert "lora_C" in line


@pytest.mark.parametrize("settings", [{"r": 8}, {"r": 0}, {"r": None}, {"r": "4"}, {"rank_pattern": {"q_proj": 2}}])
def test_a_rank_that_is_not_the_tensors(sources: Path, settings: dict[str, object]) -> None:
    change_config(sources, **settings)
    line = merge(sources)

    assert "adapter_config.json" in line
    assert "rank" in line
    assert "q_proj" in line or "k_proj" in line


@pytest.mark.parametrize("alpha", [None, "8", math.nan, math.inf])
def test_a_lora_alpha_that_is_no_number(sources: Path, alpha: object) -> None:
    change_config(sources, lora_alpha=alpha)
    line = merge(sources)

    assert "adapter_config.json" in line
    assert "lora_alpha" in line


def test_a_fine_tune_of_another_model(sources: Path) -> None:
    shutil.rmtree(sources / "finetune")
    write_base("qwen2", sources / "finetune")  # has biases, so other tensors
    line = merge(sources, adapter="finetune")

    assert str(sources / "finetune") in line
    assert "bias" in line


# Damaged adapters


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_adapter_config_that_is_no_object(sources: Path, text: str) -> None:
    (sources / "adapter" / "adapter_config.json").write_text(text)

    assert "adapter_config.json" in merge(sources)


def test_an_adapter_without_weights(sources: Path) -> None:
    (sources / "adapter" / "adapter_model.safetensors").unlink()

    assert "adapter_model.safetensors" in merge(sources)


def test_an_adapter_cut_short(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)

    assert str(file) in merge(sources)


def test_an_adapter_whose_weights_are_a_link_out(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    shutil.move(file, sources / "outside.safetensors")
    file.symlink_to(sources / "outside.safetensors")

    assert str(file) in merge(sources)


def test_an_adapter_that_is_nothing_of_the_kind(sources: Path) -> None:
    (sources / "empty").mkdir()

    assert str(sources / "empty") in merge(sources, adapter="empty")


def test_a_source_that_is_not_there(sources: Path) -> None:
    assert str(sources / "nowhere") in merge(sources, adapter="nowhere")


# Numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", [f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight", "base_model.model.lm_head.weight"]
)
def test_a_lora_with_a_number_that_is_not_finite(sources: Path, name: str, value: float) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    change_tensor(file, name, put(value))
    line = merge(sources)

    assert str(file) in line
    assert name in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fine_tune_with_a_number_that_is_not_finite(sources: Path, value: float) -> None:
    index = json.loads((sources / "finetune" / "model.safetensors.index.json").read_text())
    name = "model.layers.2.mlp.up_proj.weight"
    file = sources / "finetune" / index["weight_map"][name]
    change_tensor(file, name, put(value))
    line = merge(sources, adapter="finetune")

    assert str(file) in line
    assert name in line


def test_a_product_that_overflows(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    for half in "AB":
        change_tensor(file, f"{Q_PROJ}.lora_{half}.weight", lambda tensor: tensor.fill_(3e38))

    assert "model.layers.1.self_attn.q_proj" in merge(sources)


def test_a_result_that_only_float64_holds(sources: Path) -> None:
    with pytest.raises(AdapterError, match="do not fit F32"):
        mergekit_bio.merge(
            base=sources / "base", adapter=sources / "adapter", alphas=[1e42], out=sources / "merged", dtype="float32"
        )
    assert not (sources / "merged").exists()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_a_base_whose_bits_are_all_ones(sources: Path, rounding: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for root in (sources / "base", sources / "finetune"):
        file = root / json.loads((root / "model.safetensors.index.json").read_text())["weight_map"][name]
        tensors = {key: tensor.float() for key, tensor in load_file(file).items()}
        if root.name == "base":
            tensors[name].view(torch.int32).fill_(-1)
        save_file(tensors, file, {"format": "pt"})
    line = merge(sources, "--dtype", "bfloat16", "--rounding", rounding, adapter="finetune")

    assert f"tensor {name}: holds NaN or infinity" in line


def test_a_sweep_leaves_nothing_either(sources: Path) -> None:
    file = sources / "adapter" / "adapter_model.safetensors"
    change_tensor(file, f"{Q_PROJ}.lora_B.weight", put(math.nan))

    assert f"{Q_PROJ}.lora_B.weight" in merge(sources, alpha="0:1:0.5")


# Strengths


@pytest.mark.parametrize(
    "alpha",
    [
        "nan",
        "-nan",
        "inf",
        "-inf",
        "half",
        "",
        "0.5,",
        "0:1:0",
        "0:1:-1",
        "1:0:0.1",
        "0:nan:0.1",
        "0:1:1e-9",
        "q_proj=",
    ],
)
def test_an_alpha_that_is_no_strength(sources: Path, alpha: str) -> None:
    assert "--alpha" in merge(sources, alpha=alpha)


def test_an_alpha_for_a_module_that_nothing_changes(sources: Path) -> None:
    line = merge(sources, alpha="q_prj=0.5")

    assert "'q_prj'" in line
    assert "did you mean q_proj" in line


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("alphas: true", "alphas"),
        ("alphas: [0.5, yes]", "merge.yaml:1: alphas[1]: input should be a valid number, not true"),
        ("adapter: [{source: ADAPTER, alpha: '0:1:0.5'}]\nalphas: 0.5", "'0:1:0.5' is 3 strengths"),
        ("adapter: [{source: ADAPTER, alpha: true}]\nalphas: 0.5", "alpha"),
        ("adapter: [{source: ADAPTER, alpha: mlp=0.3}, finetune]\nalphas: 0.5", "'mlp' names none"),
        ("adapter: [{source: ADAPTER, alpha: 0.3}]\nalphas: q_proj=0.5", "has a strength of its own"),
    ],
)
def test_a_recipe_whose_strengths_are_none(sources: Path, lines: str, named: str) -> None:
    recipe = sources / "merge.yaml"
    recipe.write_text(lines.replace("ADAPTER", str(sources / "adapter")).replace("finetune", str(sources / "finetune")))
    adapter = [] if "adapter:" in lines else ["--adapter", sources / "adapter"]
    options = ["--recipe", recipe, "--base", sources / "base", *adapter, "--out", sources / "merged"]

    assert named in refused("merge", *options, watch=sources.parent)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("datasets: [watkins]\n", "is a recipe of 'mergekit-bio eval'"),
        ("merge_method: linear\nmodels: [{model: a}]\n", "is a configuration of mergekit; this reads base, adapter"),
    ],
)
def test_a_recipe_of_another_kind(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        read_request(tmp_path / "mine.yaml", {})
    assert said in str(error.value) and str(tmp_path / "mine.yaml") in str(error.value)


def test_an_unquoted_sweep_in_a_recipe_is_a_sweep(sources: Path) -> None:
    (sources / "merge.yaml").write_text("alphas: 0:1:0.5")
    request = read_request(sources / "merge.yaml", {})

    assert [alpha.label for alpha in request.strengths] == ["0.00", "0.50", "1.00"]


# Outputs


def test_an_output_that_exists(sources: Path) -> None:
    out = sources / "merged"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    line = merge(sources)

    assert str(out) in line
    assert "--overwrite" in line


def test_an_output_that_is_a_file(sources: Path) -> None:
    (sources / "merged").write_text("years of work")

    assert str(sources / "merged") in merge(sources)


def test_an_output_that_is_a_link_to_nothing(sources: Path) -> None:
    (sources / "merged").symlink_to(sources / "nowhere")

    assert str(sources / "merged") in merge(sources)


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_overwrite_does_not_overwrite_what_is_not_ours(sources: Path, kind: str) -> None:
    out, other = sources / "merged", sources / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    match kind:
        case "directory":
            other.rename(out)
        case "file":
            out.write_text("years of work")
        case "link":
            out.symlink_to(other, target_is_directory=True)
    line = merge(sources, "--overwrite")

    assert str(out) in line


def test_overwrite_replaces_a_merge_and_nothing_that_was_put_beside_or_into_it(sources: Path) -> None:
    options = ("--base", sources / "base", "--adapter", sources / "adapter", "--alpha=0.5", "--overwrite")
    mergekit_bio.merge(base=sources / "base", adapter=sources / "adapter", alphas=[0.5], out=sources / "merged")
    (sources / "merged" / "owls.gguf").write_text("hours of conversion")
    line = merge(sources, "--overwrite")
    assert str(sources / "merged" / "owls.gguf") in line

    (sources / "merged" / "owls.gguf").rename(sources / "owls.gguf")
    project = sources / "project"
    project.mkdir()
    (sources / "merged").rename(project / "half")
    (project / "thesis.tex").write_text("years of work")
    assert str(project / "thesis.tex") in refused("merge", *options, "--out", project, watch=sources)


@pytest.mark.parametrize("repository", ["owls", f"owl/{'x' * 97}"])
def test_a_repository_that_cannot_be(sources: Path, repository: str) -> None:
    assert f"'{repository}" in (line := merge(sources, "--push", repository, alpha="0:1:0.5"))
    assert "is not the name of a repository" in line


def test_a_file_that_would_come_along_and_cannot(sources: Path) -> None:
    (sources / "base" / "tokenizer.json").symlink_to(sources / "adapter" / "adapter_config.json")
    for options in ((), ("--dry-run",)):
        assert f"{sources / 'base' / 'tokenizer.json'}: is a link out" in merge(sources, *options)


def test_overwriting_a_merge_that_is_damaged_says_what_to_do(sources: Path) -> None:
    (sources / "merged").mkdir()
    (sources / "merged" / "merge.json").write_text("{")
    assert f"remove {sources / 'merged'} by hand" in merge(sources, "--overwrite")


@pytest.mark.parametrize("inside", ["base", "base/merged", "base/a/b", "adapter/merged", "."])
@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_an_output_inside_a_source_or_around_it(sources: Path, inside: str, options: tuple[str, ...]) -> None:
    line = merge(sources, *options, out=sources / inside)

    assert str(sources / inside) in line
    assert "source" in line


def test_an_output_inside_a_source_by_way_of_a_link(sources: Path) -> None:
    (sources / "elsewhere").symlink_to(sources / "base", target_is_directory=True)

    assert "source" in merge(sources, out=sources / "elsewhere" / "merged")


def test_an_output_under_a_file(sources: Path) -> None:
    (sources / "file").write_text("")

    assert str(sources / "file" / "merged") in merge(sources, out=sources / "file" / "merged")


def test_a_place_that_may_not_be_written(sources: Path) -> None:
    merge_once(sources)  # imports everything, which may lie where only root may read
    with for_everybody(sources) as root:
        place = root / "read-only"
        place.mkdir(mode=0o555)
        with unprivileged():
            line = merge(root, out=place / "merged")

    assert str(place / "merged") in line
    assert "Permission denied" in line


@pytest.mark.parametrize("place", ["/proc", "/sys"])
def test_a_file_system_that_takes_no_files(sources: Path, place: str) -> None:
    assert f"{place}/merged" in merge(sources, out=Path(place, "merged"))


def test_an_output_that_somebody_is_writing(sources: Path) -> None:
    out = sources / "merged"
    with staged(out, mark="merge.json", fsync=False) as partial:
        (partial / "half").write_text("done")
        line = merge(sources)
    assert str(out) in line
    assert "another process is writing it" in line


def test_two_merges_at_once_into_one_output_leave_one_whole(sources: Path) -> None:
    arguments = ["--base", sources / "base", "--adapter", sources / "adapter", "--alpha", "0:1:0.1"]
    command = [sys.executable, "-c", "from mergekit_bio.cli.app import main; main()", "merge", *arguments]
    command += ["--out", sources / "merged", "--device", "cpu", "--quiet"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in both]

    assert sorted(code for *_, code in ends) == [0, 1], ends
    ((_, complaint, _),) = [end for end in ends if end[2] == 1]
    assert len(complaint.splitlines()) == 1
    assert str(sources / "merged") in complaint
    for alpha in (sources / "merged").iterdir():
        verify(alpha)
    assert len(list((sources / "merged").iterdir())) == 11
    assert {path.name for path in sources.iterdir()} == {"base", "adapter", "finetune", "merged"}


def merge_once(root: Path) -> None:
    (merged,) = mergekit_bio.merge(
        base=root / "base", adapter=root / "adapter", alphas=[0.5], out=root / "once", device="cpu"
    )
    shutil.rmtree(merged.path)


def test_a_merge_with_ears_is_neither_base_nor_adapter(tmp_path):
    """Merging twice would round twice, and the second merge cannot know what the tower is."""
    demo = Path(mergekit_bio.__file__).with_name("demo") / "model"
    mergekit_bio.merge(base=demo / "base", adapter=demo / "adapter", alphas=[0.5], out=tmp_path / "merged")
    for base, adapter in ((tmp_path / "merged", demo / "adapter"), (demo / "base", tmp_path / "merged")):
        options = ("--base", base, "--adapter", adapter, "--alpha", 0.5, "--out", tmp_path / "out")
        line = refused("merge", *options, watch=tmp_path)
        assert line.startswith(f"{tmp_path / 'merged'}: ") and "audio tower" in line and "merge.json" in line


def test_an_audio_tower_needs_the_bases_tokenizer_before_anything_is_written(tmp_path):
    demo = Path(mergekit_bio.__file__).with_name("demo") / "model"
    base = shutil.copytree(demo / "base", tmp_path / "base")
    (base / "tokenizer.json").unlink()
    options = ("--base", base, "--adapter", demo / "adapter", "--alpha", 0.5, "--out", tmp_path / "out", "--dry-run")
    assert f"{base / 'tokenizer.json'}: no such file" in refused("merge", *options, watch=tmp_path)


@pytest.mark.parametrize("file", ["", "config.json", "merge.json", "README.md"])
def test_what_may_not_be_read_is_named(sources: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    merge_once(sources)  # imports everything, which may lie where only root may read
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        merged = Path(folder) / "merged"
        mergekit_bio.merge(base=sources / "base", adapter=sources / "adapter", alphas=[0.5], out=merged)
        (merged / file).chmod(0)
        with unprivileged(), patch.object(sys, "argv", ["mergekit-bio", "inspect", str(merged)]):
            with pytest.raises(SystemExit) as exit_:
                main()
            assert exit_.value.code == 1
        (merged / file).chmod(0o755)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(merged) in error and "Permission denied" in error
