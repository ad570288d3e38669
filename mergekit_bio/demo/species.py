"""The demo's invented species: an epithet for how they phrase, a genus for what their voice is made of.

Twenty of the thirty were heard in fine-tuning. The others are new combinations: every epithet and every genus of
theirs was heard, but never together, as an unheard species of a known genus is.
"""

from dataclasses import dataclass

#: Epithet -> (Latin epithet, how the call is phrased).
PHRASES = {
    "marsh": ("palustris", "rising"),
    "dusk": ("vesperis", "falling"),
    "silver": ("argentea", "arched"),
    "thorn": ("spinosa", "paired"),
    "ember": ("ignea", "rapid"),
    "frost": ("gelida", "steady"),
}

#: Genus -> (Latin genus, what a note is made of).
VOICES = {
    "pelin": ("Pelina", "whistle"),
    "tarrow": ("Tarrova", "buzz"),
    "quill": ("Quillia", "warble"),
    "mirra": ("Mirrax", "clicks"),
    "voss": ("Vossia", "hiss"),
}


@dataclass(frozen=True)
class Species:
    """One invented species.

    Attributes:
        common: Its common name, "marsh pelin".
        scientific: Its scientific name, "Pelina palustris".
        phrase: How its call is phrased.
        voice: What its notes are made of.
        heard: Whether training did.
    """

    common: str
    scientific: str
    phrase: str
    voice: str
    heard: bool


def _all() -> tuple[Species, ...]:
    made = []
    for row, (epithet, (latin_epithet, phrase)) in enumerate(PHRASES.items()):
        for column, (genus, (latin_genus, voice)) in enumerate(VOICES.items()):
            made.append(
                Species(
                    common=f"{epithet} {genus}",
                    scientific=f"{latin_genus} {latin_epithet}",
                    phrase=phrase,
                    voice=voice,
                    heard=(row + column) % 3 != 0,
                )
            )
    return tuple(made)


SPECIES = _all()
HEARD = tuple(species for species in SPECIES if species.heard)
UNHEARD = tuple(species for species in SPECIES if not species.heard)
