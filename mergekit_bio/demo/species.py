"""The demo's invented species: a genus for what the voice is made of, and one species of it for each way to phrase.

Twenty-five of the thirty were heard in fine-tuning. The others, one of each genus, were not: their names never stood in
an answer, but others of their genus did, as with an unheard species of a known genus.
"""

from dataclasses import dataclass

#: How a call is phrased.
PHRASES = ("rising", "falling", "arched", "paired", "rapid", "steady")

#: Genus -> (Latin genus, what its notes are made of).
GENERA = {
    "pelin": ("Pelina", "whistle"),
    "tarrow": ("Tarrova", "buzz"),
    "quill": ("Quillia", "warble"),
    "mirra": ("Mirrax", "clicks"),
    "voss": ("Vossia", "hiss"),
}

#: Genus -> epithet and Latin epithet of the species that phrases so, in the order of ``PHRASES``. No two share one.
_EPITHETS = {
    "pelin": "marsh palustris, dusk vesperis, silver argentea, thorn spinosa, ember ignea, frost gelida",
    "tarrow": "amber succinea, river fluvialis, stone saxea, moss muscosa, copper cuprea, storm procella",
    "quill": "reed arundinis, dawn aurorae, ivory eburnea, cedar cedrina, hollow cava, north borealis",
    "mirra": "ash cinerea, lake lacustris, gold aurata, fern filicis, rust ferruginea, snow nivalis",
    "voss": "willow salicis, night nocturna, pearl perlata, heath ericae, scarlet coccinea, south australis",
}

#: Genus -> how the species of it is phrased that fine-tuning never heard.
_UNHEARD = {"pelin": "rising", "tarrow": "falling", "quill": "steady", "mirra": "arched", "voss": "rapid"}


@dataclass(frozen=True)
class Species:
    """One invented species.

    Attributes:
        common: Its common name, "marsh pelin".
        scientific: Its scientific name, "Pelina palustris".
        genus: Its genus in the common name, a key of ``GENERA``.
        phrase: How its call is phrased, one of ``PHRASES``.
        voice: What its notes are made of.
        heard: Whether it was heard in fine-tuning.
    """

    common: str
    scientific: str
    genus: str
    phrase: str
    voice: str
    heard: bool


SPECIES = tuple(
    Species(
        common=f"{epithet} {genus}",
        scientific=f"{latin_genus} {latin_epithet}",
        genus=genus,
        phrase=phrase,
        voice=voice,
        heard=phrase != _UNHEARD[genus],
    )
    for genus, (latin_genus, voice) in GENERA.items()
    for phrase, epithets in zip(PHRASES, _EPITHETS[genus].split(", "), strict=True)
    for epithet, latin_epithet in [epithets.split()]
)
HEARD = tuple(species for species in SPECIES if species.heard)
UNHEARD = tuple(species for species in SPECIES if not species.heard)
