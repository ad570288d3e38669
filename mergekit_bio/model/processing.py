"""Prompts and audios to model inputs, for Transformers."""

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin

from mergekit_bio.audio.chat_template import processor_chat_template
from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.config import SAMPLING_RATE, AudioPrefixConfig
from mergekit_bio.audio.fbank import fbank
from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.audio.prompt import PromptTokenizer, check_audio_count, render_prompt
from mergekit_bio.errors import AudioError, PromptError


class NatureLMAudioProcessor(ProcessorMixin):
    """Tokenizer and filter bank in one.

    Args:
        tokenizer: The base's.
        audio_token: The token that stands for audio in ``input_ids``.
        clip_samples: Samples that an audio is cut or padded to where it does not say otherwise: 10 s.
        prefix_length: How many of those tokens such an audio takes.
        prompt_template: The prompt with ``{}`` for the instruction.
        sampling_rate: What every audio is resampled to.
        audio_config: The tower's configuration, which says how many tokens a clip of another length takes; read from
            the ``config.json`` beside ``processor_config.json``.
        chat_template: Accepted because Transformers hands it in; the audio model has its own.
    """

    def __init__(
        self,
        tokenizer: Any,
        audio_token: str,
        clip_samples: int,
        prefix_length: int,
        prompt_template: str,
        sampling_rate: int = SAMPLING_RATE,
        audio_config: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self.audio_token = audio_token
        self.clip_samples = clip_samples
        self.prefix_length = prefix_length
        self.prompt_template = prompt_template
        self.sampling_rate = sampling_rate
        self.audio_config = audio_config

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As Transformers' own, with the tower's configuration: it stands once in a checkpoint, in ``config.json``."""
        values, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "audio_config" not in values:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            values["audio_config"] = config.get("audio_config")
        return values, rest

    @property
    def tokenize(self) -> PromptTokenizer:
        """How a prompt becomes token ids."""
        return PromptTokenizer(
            encode=lambda text: self.tokenizer.encode(text, add_special_tokens=False),
            bos_token_id=self.tokenizer.bos_token_id,
            audio_token_id=self.tokenizer.convert_tokens_to_ids(self.audio_token),
        )

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return ["input_ids", "attention_mask", "input_features"]

    @property
    def pad_token_id(self) -> int:
        """What fills up a batch: the tokenizer's padding, or its end of sequence where it has none."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def num_placeholders(self, clip: Clip) -> int:
        """How many placeholders a clip takes: as many as its prefix has tokens.

        Raises:
            AudioError: The clip is too short for the tower, or of another length than this processor knows.
        """
        if clip.samples == self.clip_samples:
            return self.prefix_length
        if self.audio_config is None:
            raise AudioError(f"a clip of {clip.seconds:g} s needs the processor's audio_config; load it with its model")
        length = AudioPrefixConfig.from_dict(self.audio_config).prefix_length(clip.samples)
        if not length:
            raise AudioError(f"a clip of {clip.seconds:g} s is too short for this model")
        return length

    def render(self, instruction: str, *, num_audios: int = 1) -> str:
        """The complete prompt for one instruction, which gets a slot in front where it has none for one audio.

        Raises:
            PromptError: The instruction is empty, or its slots are not as many as the audios.
        """
        return render_prompt(instruction, template=self.prompt_template, num_audios=num_audios)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As Transformers' own, with a template that knows audio parts.

        It is not ``self.chat_template``, which would be saved over the tokenizer's.
        """
        return super().apply_chat_template(conversation, chat_template or processor_chat_template(), **kwargs)

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Any = None,
        *,
        sampling_rate: int | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Make model inputs.

        Args:
            text: One complete prompt (of :meth:`render` or :meth:`apply_chat_template`) or several.
            audio: The audios of all slots in order: arrays or tensors, ``[samples]`` or with channels, which are
                heard as clips of 10 s; or :class:`mergekit_bio.audio.clip.Clip` of any length. For several prompts
                also a list of such lists, one a prompt. One audio may come without a list.
            sampling_rate: Of all the arrays; by default the model's, 16 kHz.
            return_tensors: ``"pt"``, the only kind.
            **kwargs: Options of Transformers' generic call that change nothing here: special tokens are never
                added, and a batch is always padded on the left.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[prompts, tokens]``, padded on the left; with audio,
            ``input_features`` float32 ``[audios, frames, 128]``, or a list of ``[frames, 128]`` where clips have
            several lengths.

        Raises:
            PromptError: A prompt has another number of slots than it has audios.
            AudioError: An audio is no use.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", not {return_tensors!r}')
        if unknown := kwargs.keys() - {"add_special_tokens", "padding", "padding_side", "images", "videos"}:
            raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
        prompts = [text] if isinstance(text, str) else list(text)
        ids: list[torch.Tensor] = []
        features: list[torch.Tensor] = []
        for prompt, of_prompt in zip(prompts, _audios_by_prompt(audio, prompts), strict=True):
            # 1. The prompt's audios, as clips, and what the tower reads of each.
            clips = [self._clip(audio, sampling_rate) for audio in of_prompt]
            features += [fbank(clip.waveform[None])[0] for clip in clips]
            # 2. Token ids, with as many placeholders for a clip as its prefix has tokens.
            ids.append(
                torch.tensor(self.tokenize(prompt, audio_lengths=[self.num_placeholders(clip) for clip in clips]))
            )
        # 3. Generation continues a prompt at its right end, so that a shorter one is padded on the left. What the
        #    padding is does not matter: the mask hides it.
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        inputs: dict[str, Any] = {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids]),
        }
        # 4. Clips of several lengths cannot be stacked, and are never padded to one another's.
        if features:
            same = len({len(bank) for bank in features}) == 1
            inputs["input_features"] = torch.stack(features) if same else features
        return BatchFeature(inputs)

    def _clip(self, audio: Any, sampling_rate: int | None) -> Clip:
        if isinstance(audio, Clip):
            return audio
        seconds = self.clip_samples / self.sampling_rate
        return Clip.from_samples(audio, sampling_rate=sampling_rate or self.sampling_rate, seconds=seconds)


def _audios_by_prompt(audio: Any, prompts: list[str]) -> list[list[Any]]:
    """Every prompt's audios, of one, a list for all prompts in order, or a list of lists: as many as the slots."""
    slots = [prompt.count(AUDIO_SLOT) for prompt in prompts]
    if not isinstance(audio, list | tuple):
        audio = [] if audio is None else [audio]
    if audio and all(isinstance(of_prompt, list | tuple) for of_prompt in audio):
        if len(audio) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts came with {len(audio)} lists of audios")
        for count, of_prompt in zip(slots, audio, strict=True):
            check_audio_count(slots=count, audios=len(of_prompt))
        return [list(of_prompt) for of_prompt in audio]
    check_audio_count(slots=sum(slots), audios=len(audio))
    rest = iter(audio)
    return [[next(rest) for _ in range(count)] for count in slots]
