"""A closed list in a prompt and in an answer: which choices there are, and how likely each is beside the others."""

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from mergekit_bio.engine.decoding.labels import log_sum_exp
from mergekit_bio.errors import PromptError

#: The choice for what is not on the list.
NONE = "none of these"

#: Where this stands in a prompt, it is replaced by the choices, as in a recipe's queries.
FLAG = "{species_list}"

#: Choices that together are less likely than this are not told apart: of a long list few need to be asked about.
NEGLIGIBLE = 1e-6


def distinct_choices(written: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Choices as they were written, each once.

    Args:
        written: None of them empty.
        where: Where they stand, for messages.

    Raises:
        PromptError: There are fewer than two, or two differ in case or white space only.
    """
    known: dict[str, str] = {}
    for choice in written:
        first = known.setdefault(" ".join(choice.split()).casefold(), choice)
        if first != choice:
            raise PromptError(
                f"{where}: '{first}' and '{choice}' differ only in case or white space; write one of them"
            )
    if len(known) < 2:
        raise PromptError(f"{where}: {'one choice' if known else 'no choice'} in it; give two or more, one a line")
    return tuple(known.values())


def with_choices(prompt: str, choices: Sequence[str]) -> str:
    """The prompt with the choices, separated by commas, where it says ``{species_list}``.

    Raises:
        PromptError: It says so, and there are no choices; or it says nearly so.
    """
    for name in re.findall(r"\{([A-Za-z_]\w*)\}", prompt):
        if f"{{{name}}}" != FLAG and get_close_matches(name, [FLAG.strip("{}")], cutoff=0.7):
            raise PromptError(f"the prompt says {{{name}}}; did you mean {FLAG}?")
    if FLAG not in prompt:
        return prompt
    if not choices:
        raise PromptError(f"the prompt says {FLAG}; give the list with --choices FILE")
    return prompt.replace(FLAG, ", ".join(choices))


def likeliest(scores: Mapping[str, float], count: int = 3) -> list[tuple[str, float]]:
    """The likeliest choices and their probabilities among all choices, the likeliest first, equals in their order.

    Args:
        scores: Choice -> natural log-probability as a whole answer; minus infinity where it was not asked for.
        count: How many at most.
    """
    total = log_sum_exp([*scores.values()])
    probabilities = [(choice, math.exp(score - total)) for choice, score in scores.items() if score > -math.inf]
    return sorted(probabilities, key=lambda item: -item[1])[:count]
