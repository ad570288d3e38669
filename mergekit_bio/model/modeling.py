"""The merged model for Transformers: a plain Llama with the audio prefix in front."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mergekit_bio.audio.names import MERGED_PREFIX
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.tower import POSITION_IDS, PREDICTOR
from mergekit_bio.errors import PromptError
from mergekit_bio.model.configuration import NatureLMAudioConfig


class NatureLMAudioForConditionalGeneration(LlamaPreTrainedModel, GenerationMixin):
    """NatureLM-audio with its LoRA folded in.

    The Llama half has a plain Llama's tensor names, the tower is under ``audio_prefix.``. The tower stays in float32
    whatever half precision Llama is loaded in, as it was trained; ``model.audio_prefix.to(...)`` changes that.
    """

    config_class = NatureLMAudioConfig
    input_modalities = ("audio", "text")
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    # A checkpoint may carry both, and nothing reads them.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        rf"^{MERGED_PREFIX}{PREDICTOR}\.",
        rf"^{MERGED_PREFIX}{POSITION_IDS}$",
    ]
    _no_split_modules = ["LlamaDecoderLayer", "AudioPrefix"]  # noqa: RUF012

    def __init__(self, config: NatureLMAudioConfig) -> None:
        super().__init__(config)
        text_config = config.get_text_config()
        self.model = LlamaModel(text_config)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.audio_prefix = AudioPrefix(config.audio_prefix_config).float()
        self.post_init()

    def get_audio_features(self, input_features: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The prefix ``[n_prefix, hidden]`` of each audio, of the filter banks that :meth:`embed` takes."""
        return self.audio_prefix.embed(list(input_features))

    def embed(
        self, input_ids: torch.Tensor, input_features: torch.Tensor | Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Embed a prompt, with each audio's prefix where its placeholders stand.

        Args:
            input_ids: ``[prompts, tokens]``.
            input_features: ``[audios, frames, 128]``, or a list of ``[frames, 128]`` where clips have several lengths;
                in the order of the placeholders.

        Returns:
            ``[prompts, tokens, hidden]``.

        Raises:
            PromptError: The placeholders are not as many as the audios' prefixes are long.
        """
        embeds = self.model.embed_tokens(input_ids)
        placeholders = input_ids == self.config.audio_token_id
        if input_features is None:
            prefixes = embeds.new_empty(0)
        else:
            prefixes = torch.cat(self.get_audio_features(input_features)).to(embeds.device, embeds.dtype)
        if (expected := int(placeholders.sum()) * embeds.shape[-1]) != prefixes.numel():
            raise PromptError(
                f"input_ids have {expected // embeds.shape[-1]} audio placeholders, but the audios' prefixes are "
                f"{prefixes.numel() // embeds.shape[-1]} tokens long; make both with one call of the processor"
            )
        return embeds.masked_scatter(placeholders[..., None], prefixes)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        input_features: torch.Tensor | Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As :meth:`transformers.LlamaForCausalLM.forward`, with the ``input_features`` of :meth:`embed`."""
        if input_ids is not None and input_features is not None:
            inputs_embeds, input_ids = self.embed(input_ids, input_features), None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        input_features: torch.Tensor | Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Transformers' ``generate``; the audios are encoded once, whatever the number of beams or samples."""
        if input_features is not None:
            inputs = kwargs.pop("input_ids") if inputs is None else inputs
            kwargs["inputs_embeds"] = self.embed(inputs, input_features)
        return super().generate(inputs, *args, **kwargs)
