"""The metrics of a captioning cell: CIDEr-D always; SPICE and SPIDEr where Java and the scorer's models are there."""

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

ORDERS = 4
SIGMA = 6.0

_Ngrams = list[dict[tuple[str, ...], float]]


def plain_words(text: str) -> list[str]:
    """Split a caption at white space, in lower case and without punctuation."""
    return re.sub(r"[^\w\s'-]", " ", text.lower()).split()


def cider(
    *,
    references: Sequence[Sequence[str]],
    captions: Sequence[Sequence[str]],
    documents: Sequence[Sequence[str]] | None = None,
) -> list[float]:
    """CIDEr-D of every caption against its one reference (Vedantam et al. 2015, section 4 and eq. 4).

    On the usual scale, where a caption equal to its reference has 10 at most. Lengths are counted in bigrams, as in
    the authors' program. Inverse document frequencies are taken from ``documents``, by default the references.
    """
    documents = references if documents is None else documents
    occurrences = Counter(ngram for document in documents for ngram in set(_ngrams(document)))
    log_documents = math.log(len(documents)) if documents else 0.0

    def weighted(ngrams: Counter[tuple[str, ...]]) -> _Ngrams:
        vectors: _Ngrams = [{} for _ in range(ORDERS)]
        for ngram, count in ngrams.items():
            vectors[len(ngram) - 1][ngram] = count * (log_documents - math.log(max(1, occurrences[ngram])))
        return vectors

    scores = []
    for reference, caption in zip(references, captions, strict=True):
        expected, given = weighted(_ngrams(reference)), weighted(_ngrams(caption))
        longer = max(len(caption) - 1, 0) - max(len(reference) - 1, 0)
        penalty = math.exp(-(longer**2) / (2 * SIGMA**2))
        cosines = [_clipped_cosine(theirs, ours) for theirs, ours in zip(given, expected, strict=True)]
        scores.append(10 * penalty * sum(cosines) / ORDERS)
    return scores


def _ngrams(caption: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(caption[start : start + order])
        for order in range(1, ORDERS + 1)
        for start in range(len(caption) - order + 1)
    )


def _clipped_cosine(caption: Mapping[tuple[str, ...], float], reference: Mapping[tuple[str, ...], float]) -> float:
    norm = math.hypot(*caption.values()) * math.hypot(*reference.values())
    shared = caption.keys() & reference.keys()
    overlap = sum(min(caption[ngram], reference[ngram]) * reference[ngram] for ngram in shared)
    return overlap / norm if norm else 0.0


def spice_missing() -> str | None:
    """Why SPICE cannot be computed here, or None where it can."""
    if find_spec("pycocoevalcap") is None:
        return "SPICE and SPIDEr need pycocoevalcap (pip install pycocoevalcap) and Java"
    if shutil.which("java") is None:
        return "SPICE and SPIDEr need Java (the command java is not found)"
    if not list(_spice_folder().glob("lib/stanford-corenlp-*-models.jar")):
        return f"SPICE and SPIDEr need the Stanford CoreNLP 3.6.0 models in {_spice_folder() / 'lib'}"
    return None


def _spice_folder() -> Path:
    found = find_spec("pycocoevalcap.spice")
    return Path(next(iter(found.submodule_search_locations or ())) if found else ".")


def spice(*, references: Sequence[str], captions: Sequence[str]) -> list[float]:
    """SPICE of every caption (Anderson et al. 2016), by the authors' Java program; see ``spice_missing`` first."""
    from pycocoevalcap.spice.spice import Spice

    keyed = ({f"{index:09d}": [text] for index, text in enumerate(texts)} for texts in (references, captions))
    _, rows = Spice().compute_score(*keyed)
    return [float(row["All"]["f"]) for row in rows]
