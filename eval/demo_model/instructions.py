"""The text the demo's base model learns from: small instructions about names, most of them with a hint in words.

A hint is the whole name or the genus alone; it stands beside the question or where a recording will stand. Where there
is none, the answer is drawn at random: that is what following an instruction deaf looks like.
"""

import random
from dataclasses import dataclass

from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.demo.species import GENERA, SPECIES, Species

LEAD = f"<Audio>{AUDIO_SLOT}</Audio> "
COMMON_NAME = "What is the common name for the focal species in the audio?"
SCIENTIFIC_NAME = "What is the scientific name for the focal species in the audio?"
GENUS = "What is the genus of the focal species in the audio?"

_NAMED = (
    "It was a {common}.",
    "This is a {common}.",
    "The species is {common}.",
    "In Latin it is {scientific}.",
    "The species is {scientific}.",
)
_OF_A_GENUS = ("It is some kind of {genus}.", "Some {genus} is calling.", "Its genus is {latin}.", "It is a {latin}.")
_COMMON = (COMMON_NAME, "Which species is it?", "Name the animal.", "Identify the focal species in the audio.")
_SCIENTIFIC = (SCIENTIFIC_NAME, "Name it in Latin.", "Give the taxonomic name.")
_GENUS = (GENUS, "Which genus is it?")
_LISTS = (
    "Output exactly one of: {names}",
    "Choose exactly one of: {names}",
    "Answer with one of: {names}",
    "Options: {names}",
)
_BOTH = (
    "Identify the focal species in the audio and provide its taxonomic name followed by a colon and its common name.",
    "Give the scientific name, a colon, and the common name.",
    "Write the taxonomic name followed by a colon and the common name.",
)


@dataclass(frozen=True)
class Example:
    """One instruction with its answer.

    Attributes:
        prompt: The user's words; may hold one audio slot.
        answer: The assistant's.
    """

    prompt: str
    answer: str


def instruction(draw: random.Random, *, longest: int = 8) -> Example:
    """A new instruction of any kind, sometimes with an audio slot in front (whose embeddings mean nothing here).

    Args:
        draw: Decides everything.
        longest: Names in the longest list to choose from.
    """
    species = draw.choice(SPECIES)
    kind = draw.choices(("list", "both", "scientific", "common", "genus"), (6, 2, 1, 1, 1))[0]
    if kind == "list":
        among = draw.sample(SPECIES, draw.randint(2, longest))
        species = draw.choice(among)
        latin = draw.random() < 0.5
        names = [one.scientific if latin else one.common for one in among]
        listed = draw.choice(_LISTS).format(names=", ".join(names))
        question = f"{draw.choice(_SCIENTIFIC if latin else _COMMON)}\n{listed}"
        answer = species.scientific if latin else species.common
    elif kind == "both":
        question, answer = draw.choice(_BOTH), f"{species.scientific} : {species.common}"
    elif kind == "scientific":
        question, answer = draw.choice(_SCIENTIFIC), species.scientific
    elif kind == "common":
        question, answer = draw.choice(_COMMON), species.common
    else:
        question, answer = draw.choice(_GENUS), GENERA[species.genus][0]
    hint = _hint(species, draw, chances=(4, 3, 3) if kind == "list" else (6, 2, 1))
    if hint and draw.random() < 0.5:
        return Example(f"<Audio>{hint}</Audio> {question}", answer)
    parts = [hint, question] if draw.random() < 0.5 else [question, hint]
    return Example((LEAD if draw.random() < 0.7 else "") + "\n".join(part for part in parts if part), answer)


def _hint(species: Species, draw: random.Random, *, chances: tuple[int, int, int]) -> str:
    """What the species is, in words: its name, its genus, nothing; as likely as ``chances`` say."""
    sentences = draw.choices((_NAMED, _OF_A_GENUS, ("",)), chances)[0]
    latin, _ = GENERA[species.genus]
    return draw.choice(sentences).format(
        common=species.common, scientific=species.scientific, genus=species.genus, latin=latin
    )


def narrow(species: Species, draw: random.Random) -> Example:
    """What fine-tuning asks: a name or, more often, the genus. Never a list, never both names."""
    asked = (
        (_COMMON, species.common),
        (_SCIENTIFIC, species.scientific),
        (_GENUS, GENERA[species.genus][0]),
    )
    # Mostly the genus: asked for names alone, so small a model learns each by heart and hears no kinship.
    questions, answer = draw.choices(asked, (1, 1, 4))[0]
    return Example(LEAD + draw.choice(questions), answer)
