"""Reading and writing safetensors headers, against the reference library."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mergekit_bio.checkpoint.header import DTYPES, Shard, build_header
from mergekit_bio.errors import CheckpointError

TORCH_DTYPES = [getattr(torch, name) for _, name in DTYPES.values()]


def test_every_dtype_reads_as_the_reference_library_reads_it(tmp_path):
    tensors = {str(dtype): torch.arange(24).reshape(4, 6).to(dtype) for dtype in TORCH_DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 5), "vector": torch.arange(7.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made": "here"})
    shard = Shard.open(tmp_path / "x.safetensors")
    assert shard.metadata == {"made": "here"}
    assert {info.name for info in shard.tensors} == set(tensors)
    for info in shard.tensors:
        expected = tensors[info.name]
        read = info.read()
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
        assert torch.equal(read.view(torch.uint8), expected.view(torch.uint8)) if read.ndim else read == expected


def test_rows_are_read_alone(tmp_path):
    values = torch.randn(10, 3, 2)
    save_file({"x": values}, tmp_path / "x.safetensors")
    (info,) = Shard.open(tmp_path / "x.safetensors").tensors
    assert torch.equal(info.read(4, 7), values[4:7])


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")


@given(st.dictionaries(names, st.tuples(st.sampled_from(["BF16", "F32", "I64", "U8"]), shapes), max_size=5))
def test_what_we_write_the_reference_library_reads(tmp_path_factory, table):
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    ordered = sorted(table.items(), key=lambda item: -DTYPES[item[1][0]][0])
    header = build_header(((name, dtype, shape) for name, (dtype, shape) in ordered), {"format": "pt"})
    size = sum(DTYPES[dtype][0] * torch.Size(shape).numel() for dtype, shape in table.values())
    file.write_bytes(header + bytes(size))
    with safe_open(file, "pt") as opened:
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == {  # noqa: SIM118
            name: shape for name, (_, shape) in table.items()
        }
    shard = Shard.open(file)
    assert [(info.name, info.dtype, info.shape) for info in shard.tensors if info.nbytes] == [
        (name, dtype, shape) for name, (dtype, shape) in ordered if 0 not in shape
    ]
    assert shard.header == header


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("whole") / "x.safetensors"
    save_file({"a": torch.randn(3, 4), "b": torch.arange(5)}, file)
    return file.read_bytes()


@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_the_reference_reads_it(whole, tmp_path_factory, data):
    """Never a crash, never a tensor that the reference library would not give."""
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]
    file = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    file.write_bytes(bytes(damaged))
    try:
        shard = Shard.open(file)
    except CheckpointError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return
    expected = load_file(file)
    assert {info.name for info in shard.tensors} == set(expected)
    for info in shard.tensors:
        assert torch.equal(info.read().nan_to_num(), expected[info.name].nan_to_num())


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
          "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "overlaps"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "gap"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "do not hold"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "whole numbers"),
        ({"a": {"dtype": "Q4_K", "shape": [2], "data_offsets": [0, 8]}}, "Q4_K"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "has no dtype"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "ends early"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "goes on too long"),
        (["a"], "not a JSON object"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused_by_name(tmp_path, table, complaint):
    text = json.dumps(table).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12 if complaint != "goes on too long" else 8))
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(CheckpointError, match=complaint):
        Shard.open(file)


def test_an_absurd_header_length_is_not_allocated(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="claims"):
        Shard.open(file)
