"""Audio prefixes encoded once, for all alphas, queries and repetitions: in memory and on disk."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.audio.clip import CLIP_SECONDS, Clip
from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.checkpoint.digest import tensor_bytes
from mergekit_bio.engine.prefix_folder import PrefixFolder

if TYPE_CHECKING:
    import torch

    from mergekit_bio.audio.prefix import AudioPrefix


class PrefixCache:
    """Encodes clips with one tower, each once.

    A prefix is known by its clip's digest (length and every sample), by the content of the tower that made it and by
    the dtype that it is kept in. A clip whose prefix is at hand is not decoded. Any number of threads and processes
    may share a folder; a clip that one of them is encoding is left to it by the others.

    Args:
        tower: Encodes what is not known yet.
        folder: Where prefixes are kept between runs; None keeps them in memory only.
        memory_bytes: How much is kept in memory; the least recently used go first.
        batch_size: Clips encoded at once; by default 16, and 1 on a CPU, where a batch is no faster.

    Attributes:
        tower_digest: sha256 of the tower's configuration and tensors.
        dtype: What prefixes are kept in: float32, until an engine says what its Llama computes in.
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
        import torch

        self.tower_digest = tower_digest(tower)
        self.encoded = 0
        self._tower = tower
        self._batch_size = batch_size or (1 if next(tower.parameters()).device.type == "cpu" else 16)
        self._memory_bytes = memory_bytes
        self._lock, self._encoding = threading.Lock(), threading.Lock()
        self._parent = folder
        self.keep_in(torch.float32)

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

    def keep_in(self, dtype: "torch.dtype") -> None:
        """Round prefixes to what Llama computes in, once: each time it reads one, it would do the same."""
        import torch

        self.dtype = dtype if dtype.itemsize < torch.float32.itemsize else torch.float32  # the tower's own
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._held_bytes = 0
        name = f"{self.tower_digest[:16]}-{str(self.dtype).removeprefix('torch.')}"
        self._folder = PrefixFolder(self._parent / name) if self._parent else None

    def __call__(self, clips: Sequence[Clip]) -> "list[torch.Tensor]":
        """Prefixes of clips.

        Returns:
            ``[n_prefix, hidden]`` in ``dtype``, on the CPU, for each clip; not to be written to.
        """
        wanted = {clip.digest: clip for clip in clips}
        found = self._at_hand(wanted)
        if len(found) < len(wanted):
            with self._encoding:
                found |= self._make({digest: clip for digest, clip in wanted.items() if digest not in found})
        return [found[clip.digest] for clip in clips]

    def known(self, digests: Iterable[str]) -> set[str]:
        """The digests of those clips whose prefixes are at hand, in memory or on disk."""
        wanted = set(digests)
        with self._lock:
            held = wanted & self._held.keys()
        return held | self._folder.known(wanted - held) if self._folder else held

    def forget(self, digests: Iterable[str]) -> None:
        """Free the memory of prefixes that nobody will ask for again."""
        with self._lock:
            for digest in digests:
                if (prefix := self._held.pop(digest, None)) is not None:
                    self._held_bytes -= prefix.nbytes

    def flush(self) -> None:
        """Wait until all prefixes are on disk."""
        if self._folder:
            self._folder.flush()

    @property
    def problem(self) -> str | None:
        """Why prefixes could not be kept on disk, if they could not."""
        return self._folder.problem if self._folder else None

    @property
    def held_bytes(self) -> int:
        """Bytes of the prefixes in memory."""
        return self._held_bytes

    def _at_hand(self, digests: Iterable[str]) -> "dict[str, torch.Tensor]":
        found = {digest: prefix for digest in digests if (prefix := self._from_memory(digest)) is not None}
        if self._folder and (missing := [digest for digest in digests if digest not in found]):
            read = self._folder.read(missing)
            self._remember(read)
            found |= read
        return found

    def _make(self, missing: dict[str, Clip]) -> "dict[str, torch.Tensor]":
        """Encode clips; those that another process is encoding are waited for."""
        if self._folder is None:
            found = self._at_hand(missing)
            return found | self._encode({digest: clip for digest, clip in missing.items() if digest not in found})
        made: dict[str, torch.Tensor] = {}
        while True:
            # 1. What was encoded before is on disk, and its claims are given up.
            self._folder.flush()
            claimed = self._folder.claim(missing)
            # 2. The clips that are ours now; another process may have encoded one a moment ago.
            new: dict[str, torch.Tensor] = {}
            try:
                found = self._at_hand(claimed)
                new = self._encode({digest: missing[digest] for digest in claimed if digest not in found})
            finally:
                self._folder.write(new, claimed=claimed)
            made |= found | new
            missing = {digest: clip for digest, clip in missing.items() if digest not in made}
            if not missing:
                return made
            # 3. The others are being encoded elsewhere. A process that is killed leaves its clips to us.
            self._folder.wait_for(next(iter(missing)))

    def _encode(self, missing: Mapping[str, Clip]) -> "dict[str, torch.Tensor]":
        import torch

        from mergekit_bio.audio.prefix import equally_long

        device = next(self._tower.parameters()).device
        digests = list(missing)
        encoded: dict[str, torch.Tensor] = {}
        for batch in equally_long([missing[digest].waveform for digest in digests], at_most=self._batch_size):
            waveforms = torch.stack([missing[digests[n]].waveform for n in batch]).to(device)
            with torch.inference_mode():
                prefixes = self._tower(waveforms).to(self.dtype).cpu()
            encoded |= {digests[n]: prefix.clone() for n, prefix in zip(batch, prefixes, strict=True)}
        self.encoded += len(encoded)
        self._remember(encoded)
        return encoded

    def _from_memory(self, digest: str) -> "torch.Tensor | None":
        with self._lock:
            if digest in self._held:
                self._held.move_to_end(digest)
            return self._held.get(digest)

    def _remember(self, prefixes: "Mapping[str, torch.Tensor]") -> None:
        with self._lock:
            for digest, prefix in prefixes.items():
                if digest in self._held or prefix.nbytes > self._memory_bytes:
                    continue
                self._held[digest] = prefix
                self._held_bytes += prefix.nbytes
                while self._held_bytes > self._memory_bytes:
                    self._held_bytes -= self._held.popitem(last=False)[1].nbytes


def tower_digest(tower: "AudioPrefix") -> str:
    """sha256 over a tower's configuration and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(repr(tower.config).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
