"""What a dial needs on the disk: the merge at alpha 0, made of links, and the adapter that strengths are made of."""

import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_bio.adapter.delta import Delta
from mergekit_bio.adapter.dense import Dense
from mergekit_bio.adapter.dora import Dora
from mergekit_bio.adapter.interface import Adapter
from mergekit_bio.adapter.lora import BiasVector, LowRank
from mergekit_bio.adapter.token_rows import TokenRows
from mergekit_bio.checkpoint.header import StoredTensor
from mergekit_bio.checkpoint.manifest import Origin, fingerprint, read_manifest
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.vllm.dial import (
    LARGEST,
    LISTED,
    WEIGHTS,
    SlotAdapter,
    parse_strength,
    strength_folder,
    write_strength,
)
from mergekit_bio.errors import AdapterError, AlphaError, EngineError
from mergekit_bio.merging.directory import companions, write_companions
from mergekit_bio.merging.journal import JOURNAL, Journal
from mergekit_bio.merging.merge import plan_merge
from mergekit_bio.merging.plan import MergePlan
from mergekit_bio.merging.replan import located
from mergekit_bio.merging.request import DEFAULT_ADAPTER, DEFAULT_BASE, MergeRequest
from mergekit_bio.merging.write import execute

#: The linear layers of a Llama. vLLM has slots for these and, in ways of their own, for the embeddings.
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What else an adapter may hold, in its users' words.
_IN_WORDS: Mapping[type, str] = {
    Dora: "DoRA", Dense: "a whole tensor", BiasVector: "a bias", TokenRows: "rows of an embedding",
}  # fmt: skip


@dataclass(frozen=True)
class DialRequest:
    """What a dial is made of.

    Attributes:
        base: A directory or hub id, as ``merge`` takes it.
        adapter: Likewise.
        alpha: The strength that the name alone stands for, as a user wrote it.
        aliases: More names -> the strength that each stands for, in thousandths.
        fingerprints: What base and adapter must have, where that is known.
    """

    base: str | Path = DEFAULT_BASE
    adapter: str | Path = DEFAULT_ADAPTER
    alpha: str = "0.5"
    aliases: Mapping[str, int] = field(default_factory=dict)
    fingerprints: tuple[str, ...] = ()

    @property
    def default(self) -> int:
        """``alpha`` in thousandths.

        Raises:
            AlphaError: It is no strength that a dial has.
        """
        thousandths = parse_strength(self.alpha)
        if thousandths is None:
            raise AlphaError(
                f"--alpha {self.alpha}: a dial has strengths from 0 to {LARGEST // 1000} with up to three digits "
                "behind the point, such as 0.35"
            )
        return thousandths


@dataclass(frozen=True)
class PreparedDial:
    """A dial on the disk.

    Attributes:
        name: The model's.
        model: The directory that vLLM loads: the merge at alpha 0.
        slots: What the adapter holds.
        adapters: The folder with the adapter, in which every strength gets a folder.
        revision: The same for the same weights of base and adapter.
        weights: What is served, in words.
    """

    name: str
    model: Path
    slots: SlotAdapter
    adapters: Path
    revision: str
    weights: str


@contextmanager
def prepared_dial(request: DialRequest) -> Iterator[PreparedDial]:
    """Make a dial's files in a temporary directory, which is gone when the block ends.

    The base's own files are links, so nothing of its size is copied.

    Raises:
        MergekitBioError: The sources cannot be found or do not fit, or slots cannot hold the adapter exactly.
    """
    # 1. Plan the merge at alpha 0. A base of the adapter's own is let in, so that the refusal can say what to do.
    _ = request.default
    merge = MergeRequest(base=request.base, adapter=request.adapter, alphas=(0.0,), base_from_adapter=True, fsync=False)
    plan = plan_merge(merge)
    (planned,) = plan.adapters
    adapter = planned.adapter
    if planned.alpha is not None:
        raise AdapterError(f"--adapter {request.adapter}: a dial gives the strength; leave out what follows the '='")
    if not plan.tower:
        raise AdapterError(f"{adapter.source.given}: brings no audio tower, so the model could not hear")
    slots = slot_adapter(adapter)
    found = fingerprint(dict(plan.base.checkpoint.tensors)), fingerprint(adapter.stored)
    for source, known, now in zip((request.base, request.adapter), request.fingerprints, found, strict=False):
        if known != now:
            raise EngineError(f"{source}: has changed since the checkpoints were merged from it; merge them again")
    beside = companions(plan)
    with tempfile.TemporaryDirectory(prefix="mergekit-bio-dial-") as scratch, _held(scratch):
        # 2. The model: links to the base's shards, the tower, and what stands beside them.
        model, adapters = Path(scratch) / "model", Path(scratch) / "strengths"
        for folder in (model, adapters):
            folder.mkdir()
        _write_model(plan, model)
        write_companions(beside, plan.outputs[0], model)
        # 3. The adapter, once; the folders of other strengths than these are made when somebody asks for them.
        _write_weights(adapter, adapters / WEIGHTS)
        slots.save(adapters)
        for thousandths in {request.default, *LISTED}:
            strength_folder(adapters, slots, thousandths)
        revision = "".join(digest[:8] for digest in found)
        yield PreparedDial(adapter.source.name, model, slots, adapters, revision, _in_words(adapter))


def slot_adapter(adapter: Adapter) -> SlotAdapter:
    """What LoRA slots need to know of an adapter.

    Raises:
        AdapterError: It holds something that slots cannot hold exactly.
    """
    way_out = (
        f"merge it at one strength and serve that: mergekit-bio merge --adapter {adapter.source.given} --alpha 0.5"
    )
    if not adapter.deltas:
        raise AdapterError(f"{adapter.file}: holds no LoRA; there is nothing to dial")
    if adapter.overrides:
        override = next(iter(adapter.overrides.values()))
        raise AdapterError(
            f"{override.stored.where}: differs from the base's at every strength, which no LoRA slot can hold; "
            f"{way_out} --base-from-adapter"
        )
    for name, deltas in adapter.deltas.items():
        if problem := _problem(name, deltas):
            raise AdapterError(f"{deltas[0].stored[0].where}: {problem}, which no LoRA slot holds exactly; {way_out}")
    pairs = {module: (delta.rank, delta.scaling) for module, delta in _low_rank(adapter).items()}
    slots = SlotAdapter(pairs)
    if slots.slot_rank is None:
        raise AdapterError(f"{adapter.file}: its rank is larger than any of vLLM's LoRA slots; {way_out}")
    return slots


def request_of_merges(checkpoints: Sequence[str | Path]) -> DialRequest:
    """The dial that merges of one sweep stand for, from what their ``merge.json`` say of their sources.

    The first one's strength is the default; each one's name stands for its strength.

    Raises:
        MergekitBioError: They have no or no common sources, the sources have changed, or a strength is none of a dial.
    """
    manifests = {}
    for checkpoint in checkpoints:
        source = resolve(checkpoint)
        if source.name in manifests:
            raise EngineError(f"two checkpoints are called {source.name}; rename one of the directories")
        manifests[source.name] = read_manifest(source.path)
    first = next(iter(manifests.values()))
    origins: list[Origin] = [first.base, *first.adapters]
    aliases: dict[str, int] = {}
    for name, manifest in manifests.items():
        others = [manifest.base, *manifest.adapters]
        if [origin.fingerprint for origin in origins] != [origin.fingerprint for origin in others]:
            raise EngineError(f"{name}: was not merged from the same base and adapter as {next(iter(manifests))}")
        if len(manifest.adapters) != 1:
            raise EngineError(f"{name}: was merged from {len(manifest.adapters)} adapters; a dial turns one")
        strength = manifest.adapters[0].alpha
        thousandths = None if strength.modules else parse_strength(f"{strength.default:g}")
        if thousandths is None:
            raise EngineError(
                f"{name}: its alpha {manifest.alpha} is none of a dial's: 0 to {LARGEST // 1000}, up to three digits"
            )
        aliases[name] = thousandths
    base, adapter = (located(origin) or origin.source for origin in origins)
    default = write_strength(next(iter(aliases.values())))
    return DialRequest(base, adapter, default, aliases, tuple(origin.fingerprint for origin in origins))


def _problem(name: str, deltas: Sequence[Delta]) -> str | None:
    """Why LoRA slots cannot hold what is added to a tensor; None where they can."""
    module, _, part = name.rpartition(".")
    if len(deltas) > 1:
        return f"{name} is changed twice"
    if not isinstance(deltas[0], LowRank):
        return f"{name} is changed by {_IN_WORDS.get(type(deltas[0]), type(deltas[0]).__name__)}"
    if part != "weight" or module.rpartition(".")[2] not in _LAYERS or deltas[0].transposed:
        return f"{name} is changed, which is no linear layer of a Llama's blocks"
    return None


def _low_rank(adapter: Adapter) -> dict[str, LowRank]:
    """Module -> its LoRA, of an adapter that holds nothing else."""
    return {
        name.removesuffix(".weight"): delta
        for name, deltas in adapter.deltas.items()
        for delta in deltas
        if isinstance(delta, LowRank)
    }


def _write_model(plan: MergePlan, folder: Path) -> None:
    """Link the shards that are the base's own files, byte for byte, and write the others."""
    written = tuple(shard for shard in plan.shards if shard.mirrors is None)
    with closing(Journal(folder, [shard.file for shard in written])) as journal:
        execute(replace(plan, shards=written), folder, journal, lambda _: None)
    (folder / JOURNAL).unlink()
    for shard in plan.shards:
        if shard.mirrors is not None:
            (folder / shard.file).symlink_to(shard.mirrors.resolve())


def _write_weights(adapter: Adapter, file: Path) -> None:
    from safetensors.torch import save_file

    from mergekit_bio.adapter.delta import not_finite

    tensors = {}
    for module, delta in _low_rank(adapter).items():
        for part, stored in (("lora_A", delta.a), ("lora_B", delta.b)):
            values = stored.read()
            if not values.isfinite().all():
                raise not_finite(stored)
            tensors[f"base_model.model.{module}.{part}.weight"] = values.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _in_words(adapter: Adapter) -> str:
    stored: list[StoredTensor] = [delta.b for delta in _low_rank(adapter).values()]
    dtypes = " and ".join(sorted({tensor.dtype for tensor in stored}))
    return (
        f"unmerged: the base's weights as they are, and beside them the adapter's A and B ({dtypes} in its file) in "
        "the engine's dtype, B times the strength and rounded to that dtype"
    )


@contextmanager
def _held(folder: str) -> Iterator[None]:
    """Hold a lock on a folder, by which systemd's cleaner of temporary files knows that it is in use."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
