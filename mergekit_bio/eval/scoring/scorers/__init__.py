"""The scorers, by the names that users choose them by. A new one is a file beside these and a line here."""

from mergekit_bio.eval.scoring.scorer import Scorer
from mergekit_bio.eval.scoring.scorers import beans_zero, choice, constraint, exact, paper

SCORERS: dict[str, Scorer] = {
    "paper": paper.SCORER,
    "beans-zero": beans_zero.SCORER,
    "exact": exact.SCORER,
    "choice": choice.SCORER,
    "choice-normalised": choice.NORMALISED,
    "constraint": constraint.SCORER,
}
