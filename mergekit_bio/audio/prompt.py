"""From a prompt with audio slots to token ids, exactly as NatureLM-audio tokenizes: piece by piece."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.errors import PromptError

#: What NatureLM-audio puts in front of an instruction that has no slot. ``<Audio>`` and ``</Audio>`` are plain text.
AUDIO_LEAD = f"<Audio>{AUDIO_SLOT}</Audio> "


@dataclass(frozen=True)
class PromptTokenizer:
    """The tokenization that Transformers' processor and vLLM's share.

    Attributes:
        encode: Text to token ids, without adding special tokens (written ones are recognised).
        bos_token_id: The one token put in front.
        audio_token_id: The placeholder that stands for audio in ``input_ids``.
    """

    encode: Callable[[str], list[int]]
    bos_token_id: int
    audio_token_id: int

    def __call__(self, prompt: str, *, audio_lengths: Sequence[int] | None = None) -> list[int]:
        """Token ids of a complete prompt.

        The text is split at every ``<AudioHere>`` and the pieces are tokenized each on its own, so that no token
        spans a slot. A BOS that the prompt writes itself (as chat templates do) is not doubled.

        Args:
            prompt: The complete text, chat headers included.
            audio_lengths: How many placeholders every slot becomes, in order; one each by default.

        Raises:
            PromptError: The prompt is empty, writes the placeholder itself, or has another number of slots than
                there are audios.
        """
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        pieces = [self.encode(piece) for piece in prompt.split(AUDIO_SLOT)]
        if any(self.audio_token_id in piece for piece in pieces):
            raise PromptError(f"the prompt writes the audio placeholder token itself; write {AUDIO_SLOT} instead")
        slots = len(pieces) - 1
        if audio_lengths is None:
            audio_lengths = [1] * slots
        check_audio_count(slots=slots, audios=len(audio_lengths))
        ids = pieces[0]
        if ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        for length, piece in zip(audio_lengths, pieces[1:], strict=True):
            ids = [*ids, *[self.audio_token_id] * length, *piece]
        return ids


def render_prompt(instruction: str, *, template: str, num_audios: int) -> str:
    """Put an instruction into the chat template, with a slot for its audio.

    An instruction without any slot gets one in front, as in NatureLM-audio, where it is for one audio. (The
    reference also adds one where it finds ``<AudioHere>`` in another setting than its own; here the slots are what
    the instruction says.)

    Args:
        instruction: The user's words; ``<AudioHere>`` marks where an audio goes.
        template: The prompt with ``{}`` for the instruction.
        num_audios: How many audios come with it.

    Raises:
        PromptError: The instruction is empty, or its slots are not as many as the audios.
    """
    instruction = instruction.strip()
    if not instruction:
        raise PromptError("the prompt is empty; say what is to be answered about the audio")
    slots = instruction.count(AUDIO_SLOT)
    if not slots and num_audios == 1:
        instruction, slots = AUDIO_LEAD + instruction, 1
    check_audio_count(slots=slots, audios=num_audios)
    return template.replace("{}", instruction)


def check_audio_count(*, slots: int, audios: int) -> None:
    """Raise PromptError unless every slot has its audio and every audio its slot."""
    if slots != audios:
        raise PromptError(
            f"the prompt has {slots} audio slot{'s' * (slots != 1)} ({AUDIO_SLOT}), but {audios} "
            f"audio{'s were' if audios != 1 else ' was'} given"
        )
