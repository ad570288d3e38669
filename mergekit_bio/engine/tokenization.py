"""What every engine reads of a checkpoint directory to talk to its model: tokens, template, end tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.layout import MODEL_TYPE
from mergekit_bio.audio.prompt import render_prompt
from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.engine.interface import Decoding, Generation, Prompt
from mergekit_bio.errors import CheckpointError, PromptError
from mergekit_bio.outside_data import read_json


@dataclass(frozen=True)
class Tokenization:
    """A checkpoint's way with text.

    Attributes:
        processor: Its :class:`mergekit_bio.model.processing.NatureLMAudioProcessor`.
        eos_token_ids: What ends a generation.
        max_tokens: The longest prompt and answer together that the model was made for.
    """

    processor: Any
    eos_token_ids: tuple[int, ...]
    max_tokens: int

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "Tokenization":
        """Read it from a merged directory.

        Raises:
            CheckpointError: It is no merge with an audio tower.
        """
        config = read_audio_model_config(directory)
        from mergekit_bio.model.processing import NatureLMAudioProcessor

        generation = directory / "generation_config.json"
        eos = read_json(generation).get("eos_token_id") if generation.exists() else None
        eos = config.get("eos_token_id") if eos is None else eos
        return cls(
            processor=NatureLMAudioProcessor.from_pretrained(directory),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            max_tokens=config["text_config"]["max_position_embeddings"],
        )

    @property
    def audio_token_id(self) -> int:
        """The placeholder, which no answer may hold."""
        token_id: int = self.processor.tokenize.audio_token_id
        return token_id

    def render(self, prompt: Prompt) -> str:
        """A prompt inside the checkpoint's own template, with ``<AudioHere>`` for every audio.

        Raises:
            PromptError: The prompt is empty, or has another number of slots than it has audios.
        """
        return render_prompt(prompt.text, template=self.processor.prompt_template, num_audios=len(prompt.audios))

    def prompt_ids(self, prompt: Prompt, *, expanded: bool) -> list[int]:
        """Token ids of a rendered prompt.

        Args:
            prompt: The prompt.
            expanded: One placeholder for every prefix token, instead of one for every audio.

        Raises:
            PromptError: As :meth:`render`, or the prompt writes the placeholder itself.
        """
        lengths = [self.processor.num_placeholders(clip) if expanded else 1 for clip in prompt.audios]
        ids: list[int] = self.processor.tokenize(self.render(prompt), audio_lengths=lengths)
        return ids

    def prompt_length(self, ids: Sequence[int], clips: Sequence[Clip]) -> int:
        """Length of a prompt with its clips, from its unexpanded ids."""
        return len(ids) + sum(self.processor.num_placeholders(clip) - 1 for clip in clips)

    def end_tokens(self, decoding: Decoding) -> tuple[int, ...]:
        """What ends a generation: the user's tokens, else the checkpoint's own."""
        return self.eos_token_ids if decoding.eos_token_ids is None else decoding.eos_token_ids

    def generation(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        decoding: Decoding,
        *,
        prompt_tokens: int,
        seconds: float,
        score: float | None = None,
    ) -> Generation:
        """Generated tokens as an answer."""
        return Generation(
            text=self.decode(token_ids),
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            finish_reason="stop" if token_ids[-1] in self.end_tokens(decoding) else "length",
            prompt_tokens=prompt_tokens,
            seconds=seconds,
            score=score,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of an answer.

        Raises:
            PromptError: It writes the audio placeholder itself, which no answer may hold.
        """
        ids: list[int] = self.processor.tokenize.encode(text)
        if self.audio_token_id in ids:
            raise PromptError(f"the answer {text!r} writes the audio placeholder token itself")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        text: str = self.processor.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def read_audio_model_config(directory: Path) -> dict[str, Any]:
    """A merged directory's ``config.json``.

    Raises:
        CheckpointError: It is no merge with an audio tower.
    """
    config: dict[str, Any] = read_json(inside(directory, "config.json"))
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{directory}: config.json says model_type {config.get('model_type')!r}, which cannot hear; name a "
            "merge of NatureLM-audio made without --text-only"
        )
    return config
