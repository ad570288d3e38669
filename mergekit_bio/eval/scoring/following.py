"""The metrics of an instructions cell: shares of the prompts whose constraint was kept, strictly and loosely."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_matrix

from mergekit_bio.eval.scoring.constraints import kinds_of, parse_constraint

RULES = ("strict", "loose")
#: Groups of prompts that every cell has columns for, whichever it asks.
EVERY, TEXT_ONLY, WITH_AUDIO = "every", "text_only", "with_audio"


def groups_of(constraints: Sequence[str]) -> list[str]:
    """What the metrics are given for: every prompt, those without and with audio, and those of each constraint."""
    return [EVERY, TEXT_ONLY, WITH_AUDIO, *kinds_of(constraints)]


def groups_with(constraint: str, heard: bool) -> set[str]:
    """The groups that a prompt belongs to."""
    return {EVERY, WITH_AUDIO if heard else TEXT_ONLY, parse_constraint(constraint)[0]}


def metric_name(rule: str, group: str) -> str:
    """``strict`` over every prompt, ``strict:words`` over those of a group."""
    return rule if group == EVERY else f"{rule}:{group}"


def indicators(
    *, kept: Sequence[tuple[bool, bool]], constraints: Sequence[str], heard: Sequence[bool], groups: Sequence[str]
) -> csr_matrix:
    """Per-prompt indicators from whose sums ``resampled_metrics`` computes.

    Args:
        kept: Of n prompts, whether the constraint was kept strictly and loosely.
        constraints: The n constraints.
        heard: Whether each prompt has audio.
        groups: Of ``groups_of``; the same groups give the same columns, whatever was answered.

    Returns:
        scipy CSR matrix float64 [n, 3 * groups]: is in the group, is kept strictly in it, loosely.
    """
    of_prompt = [groups_with(*prompt) for prompt in zip(constraints, heard, strict=True)]
    member = np.array([[group in names for group in groups] for names in of_prompt], dtype=np.float64)
    strict, loose = np.array(kept, dtype=np.float64).T
    return csr_matrix(np.hstack([member, member * strict[:, None], member * loose[:, None]]))


def resampled_metrics(sums: np.ndarray, *, groups: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Shares from sums of ``indicators``, float64 [resamples, 3 * groups]; NaN where a group has no prompt."""
    members, *kept = np.split(sums, 3, axis=1)
    return {
        metric_name(rule, group): np.divide(
            values[:, index], members[:, index], out=np.full(len(sums), np.nan), where=members[:, index] > 0
        )
        for rule, values in zip(RULES, kept, strict=True)
        for index, group in enumerate(groups)
    }
