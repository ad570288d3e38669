"""Audio prefixes encoded once, for all alphas, queries and repetitions: in memory and on disk."""

import hashlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.audio.clip import CLIP_SECONDS, Clip
from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.checkpoint.digest import tensor_bytes, tensor_sha256

if TYPE_CHECKING:
    import torch

    from mergekit_bio.audio.prefix import AudioPrefix

_KEY = "prefix"


class PrefixCache:
    """Encodes clips with one tower, each at most once.

    A prefix is known by its clip's digest (length and every sample) and the content of the tower that made it. Any
    number of threads and processes may share a folder: files appear whole or not at all, and of two that are made
    at once, equal up to the rounding of a batch, one stays. A file that cannot be read, or is not what its name
    says, is made again.

    Args:
        tower: Encodes what is not known yet.
        folder: Where prefixes are kept between runs; None keeps them in memory only.
        memory_bytes: How much is kept in memory; the least recently used go first.
        batch_size: Clips encoded at once; by default 16, and 1 on a CPU, where a batch is no faster.

    Attributes:
        tower_digest: sha256 of the tower's configuration and tensors.
        encoded: Clips that this object has sent through the tower.
    """

    def __init__(
        self,
        tower: "AudioPrefix",
        *,
        folder: Path | None = None,
        memory_bytes: int = 1 << 30,
        batch_size: int | None = None,
    ) -> None:
        self.tower_digest = tower_digest(tower)
        self.encoded = 0
        self._tower = tower
        self._batch_size = batch_size or (1 if next(tower.parameters()).device.type == "cpu" else 16)
        self._folder = folder / self.tower_digest[:16] if folder else None
        self._memory_bytes, self._held_bytes = memory_bytes, 0
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of_checkpoint(cls, directory: Path, *, device: str = "auto", folder: Path | None = None) -> "PrefixCache":
        """A cache in front of a checkpoint's own tower.

        Args:
            directory: A merged directory.
            device: Where the tower runs; see :func:`mergekit_bio.audio.device.pick_device`.
            folder: Where prefixes are kept.

        Raises:
            MergekitBioError: There is no such device, or no tower in the directory.
        """
        from mergekit_bio.audio.device import pick_device
        from mergekit_bio.audio.prefix import AudioPrefix

        device = pick_device(device)
        return cls(AudioPrefix.from_pretrained(directory).to(device), folder=folder)

    def reserve_memory(self) -> tuple[int, int] | None:
        """Have the tower's largest batch run once, so that the GPU memory that it needs is taken.

        Returns:
            Bytes of its GPU that are free then, and all that it has; None where the tower is not on a GPU.
        """
        import torch

        device = next(self._tower.parameters()).device
        if device.type != "cuda":
            return None
        samples = round(CLIP_SECONDS * SAMPLING_RATE)
        with torch.inference_mode():
            self._tower(torch.zeros(self._batch_size, samples, dtype=torch.float64, device=device))
        return torch.cuda.mem_get_info(device)

    def __call__(self, clips: Sequence[Clip]) -> "list[torch.Tensor]":
        """Prefixes of clips.

        Returns:
            float32 ``[n_prefix, hidden]`` on the CPU for each clip; not to be written to.
        """
        wanted = {clip.digest: clip for clip in clips}
        found: dict[str, torch.Tensor] = {}
        for digest in wanted:
            if (prefix := self._from_memory(digest)) is None and (prefix := self._from_disk(digest)) is not None:
                self._remember(digest, prefix)
            if prefix is not None:
                found[digest] = prefix
        missing = [digest for digest in wanted if digest not in found]
        if not missing:
            return [found[clip.digest] for clip in clips]
        from mergekit_bio.audio.prefix import equally_long

        for batch in equally_long([wanted[digest].waveform for digest in missing], at_most=self._batch_size):
            digests = [missing[n] for n in batch]
            for digest, prefix in zip(digests, self._encode([wanted[d] for d in digests]), strict=True):
                found[digest] = prefix
                self._remember(digest, prefix)
                self._write(digest, prefix)
        return [found[clip.digest] for clip in clips]

    @property
    def held_bytes(self) -> int:
        """Bytes of the prefixes in memory."""
        return self._held_bytes

    def _encode(self, clips: "Sequence[Clip]") -> "list[torch.Tensor]":
        import torch

        device = next(self._tower.parameters()).device
        with torch.inference_mode():
            prefixes = self._tower(torch.stack([clip.waveform for clip in clips]).to(device)).float().cpu()
        self.encoded += len(clips)
        return [prefix.clone() for prefix in prefixes]

    def _from_memory(self, digest: str) -> "torch.Tensor | None":
        with self._lock:
            if digest in self._held:
                self._held.move_to_end(digest)
            return self._held.get(digest)

    def _remember(self, digest: str, prefix: "torch.Tensor") -> None:
        with self._lock:
            if digest in self._held or prefix.nbytes > self._memory_bytes:
                return
            self._held[digest] = prefix
            self._held_bytes += prefix.nbytes
            while self._held_bytes > self._memory_bytes:
                self._held_bytes -= self._held.popitem(last=False)[1].nbytes

    def _path(self, digest: str) -> Path | None:
        return self._folder / digest[:2] / f"{digest}.safetensors" if self._folder else None

    def _from_disk(self, digest: str) -> "torch.Tensor | None":
        from safetensors import SafetensorError, safe_open

        path = self._path(digest)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                prefix: torch.Tensor = file.get_tensor(_KEY)
        except (OSError, SafetensorError):
            return None
        # safetensors has no checksum of its own, and a flipped bit would poison every answer about this clip.
        sound = metadata.get("clip") == digest and metadata.get("sha256") == tensor_sha256(prefix)
        return prefix if sound else None

    def _write(self, digest: str, prefix: "torch.Tensor") -> None:
        from safetensors.torch import save

        path = self._path(digest)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        data = save({_KEY: prefix}, metadata={"clip": digest, "sha256": tensor_sha256(prefix)})
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def tower_digest(tower: "AudioPrefix") -> str:
    """sha256 over a tower's configuration and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(repr(tower.config).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
