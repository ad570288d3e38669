"""The text the demo's base model learns from: small instructions about names, most of them with a hint in words.

Where there is no hint the answer is drawn at random: that is what following an instruction deaf looks like.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_bio.demo.species import SPECIES, Species
from mergekit_bio.model.layout import AUDIO_SLOT

LEAD = f"<Audio>{AUDIO_SLOT}</Audio> "
COMMON_NAME = "What is the common name for the focal species in the audio?"
SCIENTIFIC_NAME = "What is the scientific name for the focal species in the audio?"

_HINTS = (
    "It was a {common}.",
    "I heard the {common}.",
    "This is a {common}.",
    "{common} is what it is.",
    "The species is {common}.",
    "In Latin it is {scientific}.",
)
_QUESTIONS = (
    "What is the common name for the focal species in the audio?",
    "Which species is it?",
    "Who is calling?",
    "Name the animal.",
    "Which of these do you hear?",
    "Identify the focal species in the audio.",
)
_LISTS = (
    "Output exactly one of: {names}",
    "Choose exactly one of: {names}",
    "Answer with one of: {names}",
    "Options: {names}. Output exactly one.",
    "It is one of these: {names}",
    "Pick one from this list: {names}",
)
_BOTH = (
    "Identify the focal species in the audio and provide its taxonomic name followed by a colon and its common name.",
    "Give the scientific name, a colon, and the common name.",
    "Write the taxonomic name followed by a colon and the common name.",
    "Scientific name and common name, with a colon between them.",
)
_UPPER = ("Answer in upper case.", "Write it in capital letters.", "In upper case, please.")
_SCIENTIFIC = ("What is its scientific name?", SCIENTIFIC_NAME, "Give the taxonomic name.", "Name it in Latin.")


@dataclass(frozen=True)
class Example:
    """One instruction with its answer.

    Attributes:
        prompt: The user's words; may hold one audio slot.
        answer: The assistant's.
    """

    prompt: str
    answer: str


def instruction(draw: random.Random, *, longest: int = 12) -> Example:
    """A new instruction of any kind, sometimes with an audio slot in front (whose embeddings mean nothing here).

    Args:
        draw: Decides everything.
        longest: Names in the longest list to choose from.
    """
    species = draw.choice(SPECIES)
    kind = draw.choices(("list", "both", "scientific", "common", "upper"), (6, 3, 1, 1, 1))[0]
    hinted = draw.random() < 0.7
    if kind == "list":
        among = names_with(species, draw, draw.randint(2, longest))
        listed = draw.choice(_LISTS).format(names=", ".join(among))
        question, answer = f"{draw.choice(_QUESTIONS)}\n{listed}", species.common
    elif kind == "both":
        question, answer = draw.choice(_BOTH), f"{species.scientific} : {species.common}"
    elif kind == "scientific":
        question, answer = draw.choice(_SCIENTIFIC), species.scientific
    elif kind == "common":
        question, answer = draw.choice(_QUESTIONS), species.common
    else:
        question, answer = f"{draw.choice(_QUESTIONS)} {draw.choice(_UPPER)}", species.common.upper()
    hint = draw.choice(_HINTS).format(common=species.common, scientific=species.scientific) if hinted else ""
    parts = [hint, question] if draw.random() < 0.5 else [question, hint]
    prompt = "\n".join(part for part in parts if part)
    return Example((LEAD if draw.random() < 0.6 else "") + prompt, answer)


def names_with(species: Species, draw: random.Random, count: int) -> Sequence[str]:
    """``count`` common names in random order, the species' own among them."""
    others = draw.sample([other.common for other in SPECIES if other != species], count - 1)
    names = [species.common, *others]
    draw.shuffle(names)
    return names


def narrow(species: Species, draw: random.Random) -> Example:
    """What fine-tuning asks: the same two questions, always."""
    question, answer = (COMMON_NAME, species.common) if draw.random() < 0.7 else (SCIENTIFIC_NAME, species.scientific)
    return Example(LEAD + question, answer)
