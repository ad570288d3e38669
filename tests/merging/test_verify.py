"""A checkpoint that was touched after the merge is found out; one that was not is accepted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from merging.example import write_example
from safetensors.torch import load_file, save_file

import mergekit_bio
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.errors import MergekitBioError, VerificationError
from mergekit_bio.merging.verify import verify


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Base, adapter and their merge."""
    folder = tmp_path_factory.mktemp("pristine")
    base, adapter = write_example(folder)
    mergekit_bio.merge(base=base, adapter=adapter, alphas=[0.5], out=folder / "merged")
    return base, adapter, folder / "merged"


@pytest.fixture
def merged(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine[2], tmp_path / "merged"))


def flip(checkpoint: Path, tensor: str) -> None:
    """Change the last bit of a tensor's last byte."""
    info = Checkpoint.open(checkpoint).tensors[tensor]
    with info.file.open("r+b") as stream:
        stream.seek(info.begin + info.nbytes - 1)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", ["keep", "float16", "float32"])
def test_what_a_merge_wrote_is_accepted(pristine, tmp_path, rounding, dtype):
    base, adapter, _ = pristine
    for merged in mergekit_bio.merge(
        base=base, adapter=adapter, alphas=[0, 0.3, "q_proj=0.7"], out=tmp_path / "s", rounding=rounding, dtype=dtype
    ):
        found = verify(merged.path, against_sources=True)
        assert (found.recomputed or 0) + (found.copied or 0) == len(Checkpoint.open(merged.path).tensors)
        limit = 1.0 if rounding == "stochastic" and dtype != "float32" else 0.51
        assert (found.worst_ulp or 0) <= limit


def test_a_changed_folded_tensor_is_named(merged):
    flip(merged, "model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(VerificationError, match=r"layers\.1\.self_attn\.k_proj\.weight: was changed"):
        verify(merged)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_file_beside_the_weights_is_checked_too(merged, damage):
    file = merged / "config.json"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text().replace("}", " }"))
    with pytest.raises(VerificationError, match=r"config\.json: (no such file|was changed after the merge)"):
        verify(merged)


def test_the_model_card_is_there_to_be_changed(merged):
    (merged / "README.md").write_text("Owls.")
    verify(merged)


def test_a_changed_copied_tensor_is_named_against_the_sources(merged):
    flip(merged, "model.layers.2.mlp.up_proj.weight")
    verify(merged)  # its bytes are nowhere but in the source
    with pytest.raises(VerificationError, match=r"layers\.2\.mlp\.up_proj\.weight: is not what"):
        verify(merged, against_sources=True)


def test_a_wrong_fold_with_the_right_hash_is_found_by_computing_it(merged):
    import hashlib

    name = "model.layers.0.self_attn.o_proj.weight"
    info = Checkpoint.open(merged).tensors[name]
    weights = info.read()
    weights[3, 5] = weights[3, 5].float() * 1.02
    with info.file.open("r+b") as stream:
        stream.seek(info.begin)
        stream.write(bytes(weights.view(torch.uint8).flatten().tolist()))
    manifest = json.loads((merged / "merge.json").read_text())
    digest = hashlib.sha256(bytes(weights.view(torch.uint8).flatten().tolist())).hexdigest()
    manifest["tensors"][name]["sha256"] = digest
    (merged / "merge.json").write_text(json.dumps(manifest))
    verify(merged)
    with pytest.raises(VerificationError, match="units of the last place"):
        verify(merged, against_sources=True)


def truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def rewrite(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(shard), shard, metadata={"format": "pt", "by": "somebody"})


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, "early"),
        (rewrite, "size or header"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(), "no such file"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "holds neither"),
        (lambda folder: (folder / "config.json").unlink(), "no such file"),
        (lambda folder: (folder / "merge.json").unlink(), "has no merge.json"),
        (lambda folder: (folder / "merge.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "merge.json").write_text("{}"), "format None is not"),
        (lambda folder: (folder / "merge.json").write_text('{"format": "mergekit-bio/merge@2"}'), ": is missing"),
        (lambda folder: save_file({"x": torch.ones(1)}, folder / "extra.safetensors"), "not part of the merge"),
        (lambda folder: shutil.copy(next(folder.glob("*1-of*")), folder / "model.safetensors"), "is in merge.json"),
    ],
)  # fmt: skip
def test_an_incomplete_or_altered_directory_is_refused(merged, damage, complaint):
    damage(merged)
    with pytest.raises(VerificationError, match=complaint) as error:
        verify(merged)
    assert "\n" not in str(error.value) and str(merged) in str(error.value)


def test_a_manifest_of_the_first_format_is_accepted_and_not_overwritten(pristine, merged):
    """``merge1.json`` was written by a version that wrote that format. Its keys are kept, with this merge's values."""
    first = json.loads((Path(__file__).parent / "merge1.json").read_text())
    now = json.loads((merged / "merge.json").read_text())
    document = {key: now.get(key) for key in first} | {"format": first["format"]}
    for key in ("base", "adapters"):
        theirs, ours = (manifest[key] if key == "adapters" else [manifest[key]] for manifest in (first, now))
        kept = [{name: origin[name] for name in old} for old, origin in zip(theirs, ours, strict=True)]
        document[key] = kept if key == "adapters" else kept[0]
    (merged / "merge.json").write_text(json.dumps(document))
    found = verify(merged, against_sources=True)
    assert (found.companions, found.hashed, found.recomputed) == (0, 16, 16)
    with pytest.raises(MergekitBioError, match=r"merge@1.* remove .* by hand"):
        mergekit_bio.merge(base=pristine[0], adapter=pristine[1], alphas=[0.5], out=merged, overwrite=True)


def test_other_sources_are_recognised(pristine, merged, tmp_path):
    (tmp_path / "other").mkdir()
    base, adapter = write_example(tmp_path / "other", seed=9)
    with pytest.raises(VerificationError, match="is not the base that was merged"):
        verify(merged, against_sources=True, base=str(base))
    with pytest.raises(VerificationError, match="is not the adapter that was merged"):
        verify(merged, against_sources=True, adapters=[str(adapter)])


def test_sources_that_have_moved_are_given_anew(pristine, tmp_path):
    base, adapter, _ = pristine
    old = [shutil.copytree(path, tmp_path / path.name) for path in (base, adapter)]
    mergekit_bio.merge(base=old[0], adapter=old[1], alphas=[0.5], out=tmp_path / "out")
    for path in old:
        shutil.rmtree(path)
    with pytest.raises(MergekitBioError, match="no such directory"):
        verify(tmp_path / "out", against_sources=True)
    assert verify(tmp_path / "out", against_sources=True, base=str(base), adapters=[str(adapter)]).recomputed == 16


def test_checkpoints_in_a_folder_below_are_named_where_they_are_left_out(merged, tmp_path, command_line):
    (folder := tmp_path / "checkpoints").mkdir()
    (folder / "sweep").mkdir()
    for place in ("one", "sweep/two", "sweep/three"):
        (folder / place).symlink_to(merged)
    code, out, err = command_line("verify", folder, "--quiet")
    assert (code, out) == (0, f"{folder / 'one'}\n")
    assert err == f"note: left out: {folder / 'sweep'}, 2 checkpoints; verify it by its name\n"
