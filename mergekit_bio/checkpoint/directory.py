"""A checkpoint directory: config, index and shards, as Transformers lays them out."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mergekit_bio.checkpoint.header import Shard, TensorInfo
from mergekit_bio.errors import CheckpointError
from mergekit_bio.outside_data import read_json

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Weights as torch.save writes them; reading such a file runs what is in it.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint on disk, known by its headers; no weight is read until asked for.

    Attributes:
        root: The directory.
        shards: Its safetensors files, in name order.
    """

    root: Path
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read index and headers of the checkpoint in directory ``path``.

        Raises:
            CheckpointError: A shard is missing or damaged, lies outside the directory, or does not hold what the
                index says.
        """
        root = Path(path)
        if not root.is_dir():
            raise CheckpointError(f"{root}: no such directory")
        if (root / SINGLE).exists():
            return cls(root, (Shard.open(inside(root, SINGLE)),))
        if not (root / INDEX).exists():
            raise CheckpointError(f"{root}: holds neither {SINGLE} nor {INDEX}{what_else(root)}")
        weight_map = read_json(inside(root, INDEX)).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(value, str) for value in weight_map.values())
        ):
            raise CheckpointError(f"{root / INDEX}: has no weight_map from tensors to files")
        shards = tuple(Shard.open(inside(root, name)) for name in sorted(set(weight_map.values())))
        _check_index(weight_map, shards, root)
        return cls(root, shards)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, shard by shard in file order."""
        return {info.name: info for shard in self.shards for info in shard.tensors}

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``.

        Raises:
            CheckpointError: It is missing or not a JSON object.
        """
        return read_json(inside(self.root, "config.json"))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor.

        Raises:
            CheckpointError: There is no such tensor, or its file ends early.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.root}: has no tensor {name}")
        return self.tensors[name].read()


def inside(root: Path, name: str) -> Path:
    """The file ``name`` of directory ``root``, if it really lies there.

    A Hugging Face cache keeps a snapshot's files as links into the ``blobs`` folder of the same repository; those
    are inside too.

    Raises:
        CheckpointError: The name leads elsewhere, or there is no such file.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{root}: the file name {name!r} leads outside the directory; it is not followed")
    file = root / name
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; the checkpoint is incomplete, fetch it again")
    home = root.resolve()
    for folder in (home, *home.parents):  # the snapshot itself, or a folder in it
        if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
            home = folder.parent.parent
            break
    if not file.resolve().is_relative_to(home):
        raise CheckpointError(f"{file}: is a link out of its directory; it is not followed, copy the file there")
    return file


def what_else(root: Path) -> str:
    """The end of a message about a directory without weights: what there is in it that may have been meant."""
    inner = sorted(
        path.parent.name for name in ("adapter_config.json", SINGLE, INDEX) for path in root.glob(f"*/{name}")
    )
    if inner:
        return f"; name one of the folders in it: {', '.join(dict.fromkeys(inner))}"
    pickled = sorted(path.name for pattern in _PICKLED for path in root.glob(pattern) if path.is_file())
    if pickled:
        return f"; its {pickled[0]} would run pickled code: convert it to safetensors first"
    if (root / "merge.json").is_file():
        return f"; it has a receipt: mergekit-bio rebuild {root / 'merge.json'} --out DIR makes the checkpoint"
    return ""


def _check_index(weight_map: dict[str, str], shards: tuple[Shard, ...], root: Path) -> None:
    file_of: dict[str, str] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in file_of:
                raise CheckpointError(f"{shard.file}: tensor {info.name} is also in {file_of[info.name]}")
            file_of[info.name] = shard.file.name
            if weight_map.get(info.name) != shard.file.name:
                raise CheckpointError(f"{shard.file}: tensor {info.name} is not listed there by {root / INDEX}")
    for name, file in weight_map.items():
        if name not in file_of:
            raise CheckpointError(f"{root / INDEX}: lists tensor {name}, which {file} does not hold")
