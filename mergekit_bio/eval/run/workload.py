"""How much a run asks: prompts and tokens, counted without a model, an engine or a decoded recording."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bio.audio.clip import samples_of
from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.layout import MODEL_TYPE, merged_config, processor_config
from mergekit_bio.audio.prompt import PromptTokenizer, render_prompt
from mergekit_bio.checkpoint.source import on_this_machine
from mergekit_bio.errors import CheckpointError
from mergekit_bio.eval.data.dataset import Dataset
from mergekit_bio.eval.recipe.schema import Recipe
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.questions import options, questions
from mergekit_bio.outside_data import read_json

#: Of a cell with more questions this many are counted, evenly spaced over all of them, and the total is "about".
QUESTIONS_COUNTED = 1000
TOKENIZER, CONFIG, PROCESSOR = "tokenizer.json", "config.json", "processor_config.json"


@dataclass(frozen=True)
class CellTokens:
    """Tokens of one query about one dataset, for one checkpoint.

    Attributes:
        prompt: Of all prompts together, audio prefixes included.
        answer: Of all answers together, at most; where labels are scored, of all labels for every clip.
        exact: Whether every prompt was counted.
    """

    prompt: int
    answer: int
    exact: bool


def count_tokens(plan: RunPlan) -> dict[tuple[str, int], CellTokens] | None:
    """Count the tokens of every dataset and query, with the tokenizer and the template of the run's own checkpoints.

    They are taken from the first checkpoint that is on this machine, or from the sources that it will be merged from;
    all checkpoints of a sweep have the same.

    Returns:
        (Dataset's name, query) -> its tokens; None where no tokenizer is at hand.

    Raises:
        CheckpointError: What is at hand is damaged.
    """
    reader = _prompt_reader(plan)
    if reader is None:
        return None
    return {
        (cell.dataset, cell.query): reader.tokens(plan.recipe, plan.dataset(cell), cell.query, plan.limit)
        for cell in {(cell.dataset, cell.query): cell for cell in plan.cells}.values()
    }


@dataclass(frozen=True)
class _PromptReader:
    """What turns questions into token ids."""

    tokenize: PromptTokenizer
    template: str
    audio: AudioPrefixConfig

    def tokens(self, recipe: Recipe, dataset: Dataset, query: int, limit: int | None) -> CellTokens:
        """Count one cell."""
        prefix = self.audio.prefix_length(samples_of(dataset.seconds))
        asked = list(questions(recipe, dataset, query, limit))
        counted = evenly_spaced(asked, QUESTIONS_COUNTED)
        tokens = 0
        for question in counted:
            clips = len(question.instruction.clips)
            text = render_prompt(question.instruction.text, template=self.template, num_audios=clips)
            tokens += len(self.tokenize(text, audio_lengths=[prefix] * clips))
        return CellTokens(
            prompt=round(tokens * len(asked) / len(counted)),
            answer=self._answer(recipe, dataset, query) * len(asked),
            exact=len(counted) == len(asked),
        )

    def _answer(self, recipe: Recipe, dataset: Dataset, query: int) -> int:
        """The most tokens of one answer."""
        if recipe.decoding == "generate":
            return recipe.generate.max_new_tokens
        lengths = [len(self.tokenize.encode(label)) for label in options(recipe, dataset, query)]
        return max(lengths) + 1 if recipe.decoding == "choice" else sum(lengths)


def evenly_spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, at equal distances, the first among them."""
    if len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


def _prompt_reader(plan: RunPlan) -> _PromptReader | None:
    """Of the first checkpoint that is here, else of what one is merged from."""
    for checkpoint in plan.checkpoints:
        if folder := on_this_machine(checkpoint.source, TOKENIZER, CONFIG, PROCESSOR):
            config, processor = read_json(folder / CONFIG), read_json(folder / PROCESSOR)
            if config.get("model_type") != MODEL_TYPE:
                raise CheckpointError(f"{folder}: is no merge with an audio tower")
            return _reader(folder / TOKENIZER, config, processor)
    if plan.recipe.merge is None:
        return None
    base = on_this_machine(plan.recipe.merge.base, TOKENIZER, CONFIG)
    adapters = [on_this_machine(entry.source, CONFIG) for entry in plan.recipe.merge.adapters]
    with_tower = [
        config for folder in adapters if folder for config in [read_json(folder / CONFIG)] if "beats_cfg" in config
    ]
    if base is None or not with_tower:
        return None
    text, tokenizer = read_json(base / CONFIG), read_json(base / TOKENIZER)
    of_sources = {"text_config": text, "naturelm_config": with_tower[0], "tokenizer": tokenizer}
    return _reader(base / TOKENIZER, merged_config(**of_sources, dtype=None), processor_config(**of_sources))


def _reader(tokenizer_file: Path, config: dict[str, Any], processor: dict[str, Any]) -> _PromptReader:
    # The library that Transformers' own tokenizers stand on, and which is there in a tenth of the time.
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return _PromptReader(
        tokenize=PromptTokenizer(
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            bos_token_id=config.get("bos_token_id", -1),
            audio_token_id=config["audio_token_id"],
        ),
        template=processor["prompt_template"],
        audio=AudioPrefixConfig.from_dict(config["audio_config"]),
    )
