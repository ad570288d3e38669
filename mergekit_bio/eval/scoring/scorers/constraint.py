"""The scorer of instructions: whether an answer keeps to the format that was asked for."""

from mergekit_bio.eval.scoring.constraints import RULES_VERSION, followed
from mergekit_bio.eval.scoring.scorer import Scorer

SCORER = Scorer(
    description=f"whether the answer keeps its constraint (rules {RULES_VERSION}): strictly as written, loosely by "
    "IFEval's rule (arXiv 2311.07911)",
    follows=followed,
)
