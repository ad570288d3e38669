"""A damaged base is refused in one line that names the file (and tensor), before anything is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from merging.refusal import refused
from merging.tiny import Case, train, write_base

import mergekit_bio

INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], str]  # damages the base in a directory, and returns what the complaint must name


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base and an adapter that merge without complaint."""
    root = tmp_path_factory.mktemp("sound")
    write_base("llama", root / "base")
    train(Case.of("lora"), root / "base", root / "adapter")
    return root


@pytest.fixture
def sources(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "sources")


def merge(root: Path) -> str:
    out = root / "merged"
    options = ("--alpha", 0.5, "--device", "cpu")
    return refused("merge", "--base", root / "base", "--adapter", root / "adapter", "--out", out, *options, watch=root)


def shard(base: Path, number: int = 2) -> Path:
    return sorted(base.glob("model-*.safetensors"))[number - 1]


def change_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Rewrite the header of ``file`` in place of the old one; returns the name of its second tensor."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    second = [name for name in header if name != "__metadata__"][1]
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return second


def change_index(base: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((base / INDEX).read_text())
    change(index["weight_map"])
    (base / INDEX).write_text(json.dumps(index))


def missing_shard(base: Path) -> str:
    shard(base).unlink()
    return shard(base).name.replace("00003", "00002")


def truncated_by(count: int) -> Damage:
    def damage(base: Path) -> str:
        os.truncate(shard(base), shard(base).stat().st_size - count)
        return shard(base).name

    return damage


def truncated_to(size: int) -> Damage:
    def damage(base: Path) -> str:
        os.truncate(shard(base), size)
        return shard(base).name

    return damage


def trailing_bytes(base: Path) -> str:
    with shard(base).open("ab") as file:
        file.write(b"\0" * 16)
    return shard(base).name


def header_length(length: int) -> Damage:
    def damage(base: Path) -> str:
        with shard(base).open("r+b") as file:
            file.write(length.to_bytes(8, "little"))
        return shard(base).name

    return damage


def header_over_the_limit(base: Path) -> str:
    header_length(100_000_001)(base)
    os.truncate(shard(base), 100_000_100)  # long enough for it, and sparse
    return shard(base).name


def header_text(text: bytes) -> Damage:
    def damage(base: Path) -> str:
        file = shard(base)
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        return file.name

    return damage


def not_safetensors(base: Path) -> str:
    shard(base).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    return shard(base).name


def tensor_entry(**entry: Any) -> Damage:
    """Put ``entry`` into the header's second tensor; None takes the key away."""

    def damage(base: Path) -> str:
        def change(header: dict[str, Any]) -> None:
            second = [name for name in header if name != "__metadata__"][1]
            header[second] = {k: v for k, v in (header[second] | entry).items() if v is not None}

        return change_header(shard(base), change)

    return damage


def overlapping(base: Path) -> str:
    def change(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        same_size = [name for name in names if header[name]["shape"] == header[names[0]]["shape"]]
        assert len(same_size) > 1
        header[same_size[1]]["data_offsets"] = header[same_size[0]]["data_offsets"]

    change_header(shard(base), change)
    return "overlaps"


def gap(base: Path) -> str:
    def change(header: dict[str, Any]) -> None:
        last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        header[last]["data_offsets"] = [offset + 2 for offset in header[last]["data_offsets"]]

    change_header(shard(base), change)
    return "gap"


def renamed_in_the_shard(base: Path) -> str:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        second = [name for name in header if name != "__metadata__"][1]
        return {("owl.weight" if name == second else name): entry for name, entry in header.items()}

    change_header(shard(base), change)
    return "owl.weight"


def only_in_the_index(base: Path) -> str:
    change_index(base, lambda weight_map: weight_map.update({"owl.weight": shard(base).name}))
    return "owl.weight"


def only_in_the_shard(base: Path) -> str:
    name = next(iter(json.loads((base / INDEX).read_text())["weight_map"]))
    change_index(base, lambda weight_map: weight_map.__delitem__(name))
    return name


def in_another_shard_than_the_index_says(base: Path) -> str:
    name, file = next(iter(json.loads((base / INDEX).read_text())["weight_map"].items()))
    other = next(path.name for path in base.glob("model-*.safetensors") if path.name != file)
    change_index(base, lambda weight_map: weight_map.update({name: other}))
    return name


def in_two_shards(base: Path) -> str:
    file = shard(base)
    double = file.with_name("model-00009-of-00009.safetensors")
    shutil.copy(file, double)
    change_index(base, lambda weight_map: weight_map.update({"owl.weight": double.name}))
    return file.name


def index_naming(path: str) -> Damage:
    """Send the index to an existing, sound shard under a name that leaves the directory."""

    def damage(base: Path) -> str:
        moved = shard(base)
        shutil.copy(moved, base.parent / "outside.safetensors")
        name = path.format(outside=base.parent / "outside.safetensors", base=base)

        def change(weight_map: dict[str, str]) -> None:
            weight_map.update({key: name for key, file in weight_map.items() if file == moved.name})

        change_index(base, change)
        return "outside.safetensors"

    return damage


def link_out(base: Path) -> str:
    file = shard(base)
    outside = base.parent / "outside.safetensors"
    shutil.move(file, outside)
    file.symlink_to(outside)
    return file.name


def linked_folder_out(base: Path) -> str:
    outside = base.parent / "outside"
    outside.mkdir()
    moved = shard(base)
    shutil.copy(moved, outside / moved.name)
    (base / "shards").symlink_to(outside, target_is_directory=True)

    def change(weight_map: dict[str, str]) -> None:
        weight_map.update({key: f"shards/{moved.name}" for key, file in weight_map.items() if file == moved.name})

    change_index(base, change)
    return moved.name


def link_to_nothing(base: Path) -> str:
    file = shard(base)
    file.unlink()
    file.symlink_to("nowhere")
    return file.name


def folder_for_a_shard(base: Path) -> str:
    file = shard(base)
    file.unlink()
    file.mkdir()
    return file.name


def index_text(text: str) -> Damage:
    def damage(base: Path) -> str:
        (base / INDEX).write_text(text)
        return INDEX

    return damage


def missing_index(base: Path) -> str:
    (base / INDEX).unlink()
    return INDEX


def pickled_weights(base: Path) -> str:
    missing_index(base)
    for file in base.glob("*.safetensors"):
        file.rename(base / f"pytorch_{file.stem}.bin")
    return "convert it to safetensors"


def config_text(text: str | None) -> Damage:
    def damage(base: Path) -> str:
        (base / "config.json").unlink()
        if text is not None:
            (base / "config.json").write_text(text)
        return "config.json"

    return damage


DAMAGES: dict[str, Damage] = {
    "missing shard": missing_shard,
    "truncated by one byte": truncated_by(1),
    "truncated by a tensor": truncated_by(3000),
    "truncated within the header": truncated_to(100),
    "truncated within the length": truncated_to(7),
    "empty": truncated_to(0),
    "trailing bytes": trailing_bytes,
    "header longer than the file": header_length(1 << 20),
    "header longer than memory": header_length((1 << 64) - 1),
    "header over the limit of the format": header_over_the_limit,
    "header cut short": header_length(64),
    "header of length zero": header_length(0),
    "header not JSON": header_text(b"{'a': 1}"),
    "header not UTF-8": header_text(b'{"\xff\xfe": 1}'),
    "header a list": header_text(b"[]"),
    "header deeply nested": header_text(b"[" * 100_000),
    "header with a key twice": header_text(b'{"a":{},"a":{}}'),
    "Git LFS pointer": not_safetensors,
    "overlapping tensors": overlapping,
    "gap between tensors": gap,
    "offsets backwards": tensor_entry(data_offsets=[64, 0]),
    "offsets negative": tensor_entry(data_offsets=[-64, 0]),
    "offsets beyond the file": tensor_entry(data_offsets=[1 << 40, (1 << 40) + 64]),
    "offsets not numbers": tensor_entry(data_offsets=["0", "64"]),
    "offsets missing": tensor_entry(data_offsets=None),
    "shape not of its bytes": tensor_entry(shape=[1, 1]),
    "shape negative": tensor_entry(shape=[-1, -32]),
    "shape overflowing": tensor_entry(shape=[1 << 40, 1 << 40]),
    "dtype unknown": tensor_entry(dtype="F3"),
    "dtype not a string": tensor_entry(dtype=["BF16"]),
    "tensor renamed in the shard": renamed_in_the_shard,
    "tensor in the index only": only_in_the_index,
    "tensor in the shard only": only_in_the_shard,
    "tensor in another shard": in_another_shard_than_the_index_says,
    "tensor in two shards": in_two_shards,
    "index to the parent": index_naming("../outside.safetensors"),
    "index to the parent by a detour": index_naming("../{base.name}/../outside.safetensors"),
    "index absolute": index_naming("{outside}"),
    "index with backslashes": index_naming("..\\outside.safetensors"),
    "shard a link out": link_out,
    "shard in a folder that is a link out": linked_folder_out,
    "shard a link to nothing": link_to_nothing,
    "shard a folder": folder_for_a_shard,
    "index missing": missing_index,
    "index empty": index_text(""),
    "index not JSON": index_text("{"),
    "index a list": index_text("[]"),
    "index without weight_map": index_text("{}"),
    "index with an empty weight_map": index_text('{"weight_map": {}}'),
    "index of numbers": index_text('{"weight_map": {"model.norm.weight": 1}}'),
    "weights pickled": pickled_weights,
    "config missing": config_text(None),
    "config empty": config_text(""),
    "config a list": config_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_base_is_refused(damage: Damage, sources: Path) -> None:
    named = damage(sources / "base")
    line = merge(sources)

    assert named in line
    assert str(sources / "base") in line


def test_a_sound_base_is_merged(sources: Path) -> None:
    mergekit_bio.merge(
        base=sources / "base", adapter=sources / "adapter", alphas=[0.5], out=sources / "merged", device="cpu"
    )
