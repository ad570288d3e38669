"""Writes down what a merge has done, as the manifest of one of its outputs."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import mergekit_bio
from mergekit_bio.checkpoint.manifest import (
    FORMAT,
    AdapterOrigin,
    BaseOrigin,
    FileRecord,
    Manifest,
    RoundingLoss,
    Strength,
    TensorRecord,
    fingerprint,
)
from mergekit_bio.checkpoint.source import Source, licence_files, stated_licence
from mergekit_bio.merging.alpha import Ramp
from mergekit_bio.merging.devices import device_name
from mergekit_bio.merging.directory import adapter_licences
from mergekit_bio.merging.plan import ARITHMETIC, MergePlan, Output, PlannedAdapter


@dataclass(frozen=True)
class Made:
    """What came of one output of a merge.

    Attributes:
        tensors: sha256 of every tensor that was computed.
        companions: sha256 of every file beside the weights.
        files: sha256 of every file of weights, where the merge was asked for it.
        losses: What rounding cost.
    """

    tensors: Mapping[str, str]
    companions: Mapping[str, str]
    files: Mapping[str, str]
    losses: Sequence[RoundingLoss]


def describe(
    plan: MergePlan,
    output: Output,
    command: str,
    made: Made,
) -> Manifest:
    """The manifest of ``output``.

    Args:
        plan: What was done.
        output: The checkpoint described.
        command: What the user typed.
        made: What came of it.
    """
    request, base, files = plan.request, plan.base, output.files
    shared = sorted(name for name, shard in files.items() if shard.links)
    others = [other.folder for other in plan.outputs if other is not output]
    sweep = [str(other.alpha) for other in plan.outputs] if request.share and others else []
    return Manifest(
        format=FORMAT,
        arithmetic=ARITHMETIC,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=mergekit_bio.__version__,
        command=command.encode(errors="replace").decode(),  # it may name files that are not UTF-8
        base=BaseOrigin(
            **_where(base.source),
            fingerprint=fingerprint(base.checkpoint.tensors),
            license_files=licence_files(base.source),
            model_type=base.checkpoint.config.get("model_type"),
        ),
        adapters=[
            _adapter(planned, licences, output)
            for planned, licences in zip(plan.adapters, adapter_licences(plan), strict=True)
        ],
        alpha=output.alpha.label,
        dtype=request.dtype,
        rounding=request.rounding,
        seed=request.seed,
        device=device_name(request.device) if plan.folds else "cpu",
        audio_prefix=bool(plan.tower),
        text_only=request.text_only,
        tokenizer=request.tokenizer,
        untied=plan.untied,
        sweep=sweep,
        shared={"files": shared, "with": others} if shared else None,
        versions={"torch": version("torch"), "python": platform.python_version()},
        rounding_loss=list(made.losses),
        files={
            name: FileRecord(shard.size, sha256(shard.header).hexdigest(), made.files.get(name))
            for name, shard in sorted(files.items())
        },
        companions=dict(made.companions),
        tensors={name: TensorRecord(digest) for name, digest in sorted(made.tensors.items())},
    )


def _adapter(planned: PlannedAdapter, licences: Iterable[str], output: Output) -> AdapterOrigin:
    adapter, alpha = planned.adapter, planned.alpha or output.alpha
    modules = {
        pattern: str(strength) if isinstance(strength, Ramp) else strength
        for pattern, strength in alpha.modules
        if any(alpha.names(pattern, strength, name) for name in planned.changed)
    }
    return AdapterOrigin(
        **_where(adapter.source),
        fingerprint=fingerprint(adapter.stored),
        license_files=list(licences),
        kind=adapter.kind,
        peft_type=adapter.config.get("peft_type"),
        alpha=Strength(default=alpha.default, modules=modules),
        scaling=adapter.scalings,
        deltas=sum(len(deltas) for deltas in adapter.deltas.values()),
        base_weights={name: override.stored.name for name, override in adapter.overrides.items()},
        own_alpha=planned.alpha is not None,
    )


def _where(source: Source) -> dict[str, Any]:
    """Where a source was found, as the first fields of an origin."""
    return {
        "source": source.given,
        "name": source.name,
        "id": source.id,
        "revision": source.revision,
        "license": stated_licence(source),
    }
