"""What is asked about a clip: query flags expanded, orders and examples drawn by keyed hashes, audio slots counted."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.audio.prompt import AUDIO_LEAD, check_audio_count
from mergekit_bio.errors import DatasetError, RecipeError
from mergekit_bio.eval.components import Task
from mergekit_bio.outside_data import nearest

T = TypeVar("T")

FLAGS = ("species_list", "examples", "audio_examples", "randomize")
_FLAG = re.compile(r"\{([A-Za-z_]\w*)\}")

#: With more labels than this (``None`` counted) a detection component is asked the general question.
MOST_LABELS_IN_INSTRUCTION = 8
GENERAL_DETECTION_QUESTION = "What are the common names for the species in the audio, if any?"


@dataclass(frozen=True)
class Instruction:
    """What a model is asked about one clip, before the engine puts it into its checkpoint's template.

    Attributes:
        text: The user's words, with one ``<AudioHere>`` for each audio.
        clips: The ids of the clips that belong to the slots, in order.
        query_slot: Which of them is the clip that is asked about; None where nothing is heard.
    """

    text: str
    clips: tuple[str, ...]
    query_slot: int | None

    @property
    def examples(self) -> tuple[str, ...]:
        """The ids of the example clips, in order."""
        return () if self.query_slot is None else self.clips[: self.query_slot] + self.clips[self.query_slot + 1 :]


def flags(query: str, where: str) -> set[str]:
    """The flags that a query uses. Braces around anything but a word are text.

    Raises:
        RecipeError: A flag is unknown or can be used once only, or the query has more than one audio slot.
    """
    used = _FLAG.findall(query)
    for name in used:
        if name not in FLAGS:
            raise RecipeError(f"{where}: unknown flag '{{{name}}}'{nearest(name, FLAGS)}")
    if used.count("audio_examples") > 1:
        raise RecipeError(f"{where}: {{audio_examples}} can stand in a query once")
    if query.count(AUDIO_SLOT) > 1:
        raise RecipeError(f"{where}: a query has one {AUDIO_SLOT}, for the clip that is asked about")
    return set(used)


def question(query: str) -> str:
    """What a query asks in its own words: without flags and the audio slot. Empty where it asks nothing."""
    return _FLAG.sub("", query.replace(AUDIO_LEAD.strip(), "").replace(AUDIO_SLOT, "")).strip()


def shuffled(items: Sequence[T], *key: object) -> list[T]:
    """The items in an order that the key decides alone: on every machine, in every version of Python.

    Each item is sorted by SHA-256 of the key and its ``str``; equal items stay in their order.
    """
    prefix = "\x1f".join(map(str, key))
    return sorted(items, key=lambda item: hashlib.sha256(f"{prefix}\x1f{item}".encode()).digest())


def instruction_prompt(*, clip: str, instruction: str, task: Task, labels: int | None) -> Instruction:
    """What a recipe without queries asks: the dataset's own instruction, unless it would list too many labels."""
    if task == "detection" and (labels or 0) > MOST_LABELS_IN_INSTRUCTION:
        instruction = GENERAL_DETECTION_QUESTION
    if AUDIO_SLOT not in instruction:
        instruction = AUDIO_LEAD + instruction
    return _checked(instruction, (clip,), 0)


def text_prompt(text: str) -> Instruction:
    """What is asked without audio."""
    return _checked(text, (), None)


def query_prompt(
    *,
    query: str,
    clip: str,
    key: Sequence[object],
    species: Sequence[str] = (),
    descriptions: Mapping[str, str] | None = None,
    pool: Mapping[str, Sequence[str]] | None = None,
    n_examples: int = 0,
) -> Instruction:
    """Expand a query for one clip.

    Orders and examples depend on ``key``, the clip and the flag only: not on the checkpoint, not on other clips.

    Args:
        clip: The id of the clip that is asked about.
        key: Seed, dataset and query number.
        species: Their names, in the recipe's order or by frequency.
        descriptions: Name -> how it sounds, for ``{examples}``.
        pool: Name -> ids of the clips that may serve as examples, for ``{audio_examples}``.
        n_examples: Examples for each species, drawn without replacement, never the clip itself.

    Raises:
        DatasetError: A species has too few clips.
        PromptError: A name brings an audio slot of its own.
    """
    order = list(species)
    if "{randomize}" in query:
        order = shuffled(order, *key, clip, "species")
    if AUDIO_SLOT not in query:
        # As the reference does, before the flags: examples do not count as the clip's own slot.
        query = AUDIO_LEAD + query
    examples = _drawn(order, pool or {}, n_examples, clip, key) if "{audio_examples}" in query else []
    example_ids = [example for _, example in examples]
    texts = {
        "species_list": ", ".join(order),
        "examples": "\n\n".join(f"Audio: {(descriptions or {}).get(name)}\nLabel: {name}" for name in order),
        "audio_examples": "\n\n".join(f"Audio: {AUDIO_LEAD.strip()}\nLabel: {name}" for name, _ in examples),
        "randomize": "",
    }
    # In one pass: what a flag brings in is text, flags and all.
    before, slot, after = query.partition(AUDIO_SLOT)
    query_slot = len(example_ids) if "{audio_examples}" in before else 0
    ids = (*example_ids[:query_slot], clip, *example_ids[query_slot:])
    expanded = slot.join(_FLAG.sub(lambda flag: texts[flag[1]], part) for part in (before, after))
    return _checked(expanded, ids, query_slot)


def _drawn(
    order: Sequence[str], pool: Mapping[str, Sequence[str]], number: int, clip: str, key: Sequence[object]
) -> list[tuple[str, str]]:
    """(name, clip id) of the examples, shuffled among themselves."""
    examples = []
    for name in order:
        others = [candidate for candidate in pool.get(name, ()) if candidate != clip]
        if len(others) < number:
            raise DatasetError(
                f"{key[1]}: {number} example(s) of '{name}' are asked for, beside {clip} there are {len(others)}"
            )
        examples += [(name, chosen) for chosen in shuffled(others, *key, clip, "example", name)[:number]]
    return shuffled(examples, *key, clip, "examples")


def _checked(text: str, clips: tuple[str, ...], query_slot: int | None) -> Instruction:
    text = text.strip()
    check_audio_count(slots=text.count(AUDIO_SLOT), audios=len(clips))
    return Instruction(text=text, clips=clips, query_slot=query_slot)
