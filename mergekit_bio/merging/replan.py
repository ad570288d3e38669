"""Plans a merge again from its manifest, as verify and rebuild need it."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_bio.checkpoint.manifest import AdapterOrigin, Manifest, Origin, Strength, fingerprint
from mergekit_bio.errors import SourceError, VerificationError
from mergekit_bio.merging.alpha import Alpha, parse_strength
from mergekit_bio.merging.merge import plan_merge
from mergekit_bio.merging.plan import MergePlan
from mergekit_bio.merging.request import AdapterEntry, MergeRequest


def plan_again(
    manifest: Manifest, base: str | None = None, adapters: Sequence[str] | None = None
) -> tuple[MergePlan, int]:
    """What the merge planned, from the same weights.

    Args:
        manifest: Of the merge.
        base: Where the base is now, if not where it was.
        adapters: Likewise for the adapters, in their order.

    Returns:
        The plan, and which of its outputs the manifest is of.

    Raises:
        VerificationError: A source is not what was merged.
        MergekitBioError: A source cannot be found.
    """
    # 1. The request: a sweep that shares files is planned as a whole, for all its strengths decide what is in which
    # file. Any other checkpoint is planned alone, each adapter at its own strength.
    sources = adapters or [_located(origin, "--adapter") for origin in manifest.adapters]
    if len(sources) != len(manifest.adapters):
        raise VerificationError(f"the merge had {len(manifest.adapters)} adapters, but {len(sources)} are given")
    strengths = [_strength(origin, manifest) for origin in manifest.adapters]
    plan = plan_merge(
        MergeRequest(
            base=base or _located(manifest.base, "--base"),
            adapter=[AdapterEntry(source, strength) for source, strength in zip(sources, strengths, strict=True)],
            alphas=manifest.sweep or 1.0,  # alone, it is of no adapter: each has its own
            dtype=manifest.dtype,  # type: ignore[arg-type]  # a request refuses what is none
            rounding=manifest.rounding,  # type: ignore[arg-type]
            seed=manifest.seed,
            text_only=manifest.text_only,
            tokenizer=manifest.tokenizer,  # type: ignore[arg-type]
            base_from_adapter=any(origin.base_weights for origin in manifest.adapters),
        )
    )
    # 2. The sources: their weights must be those that were merged.
    identities = [(plan.base.source.given, fingerprint(plan.base.checkpoint.tensors))]
    identities += [(planned.adapter.source.given, fingerprint(planned.adapter.stored)) for planned in plan.adapters]
    for (given, identity), origin in zip(identities, [manifest.base, *manifest.adapters], strict=True):
        if identity != origin.fingerprint:
            raise VerificationError(f"{given}: is not the {origin.name} that was merged (its weights differ)")
    labels = [output.alpha.label for output in plan.outputs]
    if manifest.sweep and manifest.alpha not in labels:
        raise VerificationError(f"alpha {manifest.alpha} is none of the sweep's: {', '.join(labels)}")
    return plan, labels.index(manifest.alpha) if manifest.sweep else 0


def located(origin: Origin) -> str | None:
    """Where a source is: the directory that was named, or on the hub; None for a directory that is gone.

    There it is at the revision that was merged, wherever the branch it was on has gone, and in its folder.
    """
    if Path(origin.source).is_dir():
        return origin.source
    if origin.id and origin.revision:
        in_repository = origin.source.partition("@")[0]
        return f"{in_repository if in_repository.startswith(f'{origin.id}/') else origin.id}@{origin.revision}"
    return None


def _located(origin: Origin, option: str) -> str:
    source = located(origin)
    if source is None:
        raise SourceError(f"{origin.source}: no such directory; say where {origin.name} is now with {option}")
    return source


def _strength(origin: AdapterOrigin, manifest: Manifest) -> Alpha | None:
    """The strength of an adapter; None for the merge's, which is one of a sweep's."""
    if manifest.sweep and not origin.own_alpha:
        return None
    alpha: Strength = origin.alpha
    modules = tuple((name, parse_strength(str(value))) for name, value in alpha.modules.items())
    return Alpha(alpha.default, modules, with_gaps=manifest.is_old)
