"""Writes down what a merge has done, as the manifests of its outputs."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import mergekit_bio
from mergekit_bio.checkpoint.header import StoredTensor
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
from mergekit_bio.checkpoint.source import licence_files, stated_licence
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


class Recorder:
    """Writes the manifests of one merge. What they say of its sources is read once, for the first of them.

    Args:
        plan: What is done.
        command: What the user typed.
    """

    def __init__(self, plan: MergePlan, command: str) -> None:
        self._plan = plan
        self._command = command

    def describe(self, output: Output, made: Made) -> Manifest:
        """The manifest of ``output``.

        Args:
            output: The checkpoint described.
            made: What came of it.
        """
        plan, request, files = self._plan, self._plan.request, output.files
        base, *adapters = self._origins
        shared = sorted(name for name, shard in files.items() if shard.links)
        others = [other.folder for other in plan.outputs if other is not output]
        sweep = [str(other.alpha) for other in plan.outputs] if request.share and others else []
        return Manifest(
            format=FORMAT,
            arithmetic=ARITHMETIC,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            version=mergekit_bio.__version__,
            command=self._command.encode(errors="replace").decode(),  # it may name files that are not UTF-8
            base=BaseOrigin(**base, model_type=plan.base.checkpoint.config.get("model_type")),
            adapters=[
                _adapter(planned, origin, output) for planned, origin in zip(plan.adapters, adapters, strict=True)
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

    @cached_property
    def _origins(self) -> list[dict[str, Any]]:
        """What an origin says of where a source was found and what is there: of the base, then of each adapter."""
        base, adapters = self._plan.base, [planned.adapter for planned in self._plan.adapters]
        sources = [base.source, *(adapter.source for adapter in adapters)]
        weights: list[Mapping[str, StoredTensor]] = [base.checkpoint.tensors, *(adapter.stored for adapter in adapters)]
        licences = [licence_files(base.source), *map(list, adapter_licences(self._plan))]
        return [
            {
                "source": source.given,
                "name": source.name,
                "id": source.id,
                "revision": source.revision,
                "fingerprint": fingerprint(tensors),
                "license": stated_licence(source),
                "license_files": names,
            }
            for source, tensors, names in zip(sources, weights, licences, strict=True)
        ]


def _adapter(planned: PlannedAdapter, origin: Mapping[str, Any], output: Output) -> AdapterOrigin:
    adapter, alpha = planned.adapter, planned.alpha or output.alpha
    modules = {
        pattern: str(strength) if isinstance(strength, Ramp) else strength
        for pattern, strength in alpha.modules
        if any(alpha.names(pattern, strength, name) for name in planned.changed)
    }
    return AdapterOrigin(
        **origin,
        kind=adapter.kind,
        peft_type=adapter.config.get("peft_type"),
        alpha=Strength(default=alpha.default, modules=modules),
        scaling=adapter.scalings,
        deltas=sum(len(deltas) for deltas in adapter.deltas.values()),
        base_weights={name: override.stored.name for name, override in adapter.overrides.items()},
        own_alpha=planned.alpha is not None,
    )
