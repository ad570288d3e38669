"""What differs between two checkpoints of one sweep, and proof that an engine was given exactly that."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from mergekit_bio.errors import EngineError, VerificationError

# Engines fuse these parameters, and a fused parameter is loaded whole.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_MODULE = re.compile(r"\.(\w+_proj)\.")


@dataclass(frozen=True)
class Difference:
    """The tensors to replace to get from one checkpoint to another.

    Attributes:
        target: The directory they come from.
        names: Their names, layer by layer.
        digests: sha256 that the target's manifest records, for those that it does.
    """

    target: Path
    names: tuple[str, ...]
    digests: Mapping[str, str]

    def check(self, loaded: Mapping[str, str], failure: str | None = None) -> str:
        """Compare what a model was given with what it should have been given.

        Args:
            loaded: sha256 of each tensor handed to the model.
            failure: Why not all of them were.

        Returns:
            The fingerprint of what was loaded.

        Raises:
            EngineError: A tensor is missing, or its bytes are not the recorded ones.
        """
        if failure is not None:
            raise EngineError(f"{self.target}: its weights could not be loaded ({failure})")
        if missing := sorted(set(self.names) - loaded.keys()):
            raise EngineError(f"{self.target}: {missing[0]} was not loaded; restart the engine on this checkpoint")
        for name, digest in self.digests.items():
            if loaded[name] != digest:
                raise EngineError(
                    f"{self.target}: {name} is not what merge.json records; check it with: mergekit-bio verify "
                    f"{self.target}"
                )
        lines = "".join(f"{name} {loaded[name]}\n" for name in sorted(self.names))
        return hashlib.sha256(lines.encode()).hexdigest()


def family(directory: Path) -> str:
    """Equal for checkpoints that an engine can move between by replacing tensors: one sweep, or one directory."""
    return str(_made_of(read_manifest(directory)) if (directory / MANIFEST).is_file() else directory)


def _made_of(manifest: Manifest) -> tuple[object, ...]:
    """What is the same for all checkpoints of a sweep."""
    adapters = [adapter.fingerprint for adapter in manifest.adapters]
    return manifest.base.fingerprint, adapters, manifest.dtype, manifest.audio_prefix, manifest.untied


def difference(current: Path, target: Path) -> Difference:
    """Find the tensors in which two checkpoints of one sweep differ, from their manifests.

    Args:
        current: What an engine runs.
        target: What it is to run.

    Raises:
        EngineError: They were not merged from the same base and adapters into the same data type.
    """
    try:
        old, new = read_manifest(current), read_manifest(target)
    except VerificationError as error:
        raise EngineError(f"{error}; a running engine moves between merges of one sweep only") from error
    checkpoint = Checkpoint.open(target)
    shapes = [
        {name: (info.dtype, info.shape) for name, info in c.tensors.items()}
        for c in (Checkpoint.open(current), checkpoint)
    ]
    if _made_of(old) != _made_of(new) or shapes[0] != shapes[1]:
        raise EngineError(
            f"{target}: was not merged from the same base, adapters and data type as {current}; start an engine of its "
            "own"
        )
    changed = {
        name for name in old.tensors.keys() | new.tensors.keys() if old.tensors.get(name) != new.tensors.get(name)
    }
    names = sorted(_with_fused(changed) & checkpoint.tensors.keys(), key=_layer_order)
    return Difference(
        target=target,
        names=tuple(names),
        digests={name: new.tensors[name].sha256 for name in names if name in new.tensors},
    )


def replace_weights(
    change: Difference,
    current: Path,
    replace: Callable[[Path, Sequence[str]], Sequence[tuple[Mapping[str, str], str | None]]],
    close: Callable[[], None],
) -> str:
    """Move an engine to another checkpoint of its sweep: whatever happens, it never runs a mix of the two.

    Args:
        change: Of :func:`difference`.
        current: What the engine runs.
        replace: Replaces tensors by those of a directory; gives the arguments of :meth:`Difference.check`, for every
            worker.
        close: Closes the engine.

    Returns:
        The fingerprint of what was loaded.

    Raises:
        EngineError: A tensor could not be read, or its bytes are not the recorded ones. The engine is on ``current``
            as before, or closed where that could not be read again either.
    """
    try:
        return {change.check(*loaded) for loaded in replace(change.target, change.names)}.pop()
    except BaseException:  # Ctrl-C too
        restored = False
        with suppress(Exception):  # the first failure is the one to tell
            restored = all(failure is None for _, failure in replace(current, change.names))
        if not restored:
            close()
        raise


def _with_fused(names: set[str]) -> set[str]:
    whole = set(names)
    for name in names:
        match = _MODULE.search(name)
        for group in _FUSED:
            if match and match[1] in group:
                whole |= {name.replace(match[1], other) for other in group}
    return whole


def _layer_order(name: str) -> tuple[int, str]:
    match = re.search(r"\.layers\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def verify(change: Difference) -> None:
    """Read the tensors of a difference and compare them with the manifest, before anything is loaded.

    Raises:
        EngineError: The bytes are not the recorded ones.
    """
    from mergekit_bio.checkpoint.digest import tensor_sha256

    checkpoint = Checkpoint.open(change.target)
    change.check({name: tensor_sha256(checkpoint.read(name)) for name in change.names})
