"""The merged audio model for vLLM: audio prefix, processor and Llama; all that touches vLLM's model internals."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_bio.engine.vllm.plugin import require_vllm

require_vllm()  # before the imports below fail in less helpful ways with another release

# ruff: noqa: E402
import torch
from torch import nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict, MultiModalHashes
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import AudioEmbeddingItems, AudioProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import MultiModalProcessingResult, PlaceholderFeaturesInfo
from vllm.renderers import TokenizeParams
from vllm.sequence import IntermediateTensors

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.fbank import fbank
from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.audio.names import MERGED_PREFIX
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.prompt import PromptTokenizer, check_audio_count
from mergekit_bio.audio.tower import POSITION_IDS, PREDICTOR
from mergekit_bio.checkpoint.digest import tensor_sha256
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.engine.vllm.cache_keys import ContentKey, cache_key
from mergekit_bio.engine.vllm.log import left_out
from mergekit_bio.errors import AudioError, MergekitBioError, PromptError
from mergekit_bio.model.configuration import NatureLMAudioConfig

#: Clips that go through the tower at once: bounds its memory, whatever vLLM schedules together.
TOWER_BATCH = 16


class ClipItems(AudioProcessorItems):
    """The clips of a prompt."""


class AudioParser(MultiModalDataParser):
    """Takes audios as clips, arrays, ``(array, sampling rate)`` pairs, or precomputed prefixes ``[n_prefix, hidden]``.

    A clip is as long as it says. Arrays are made clips of the model's own length, 10 s, as everywhere in this package,
    resampler included, in float64; vLLM's own preparation would use another filter, in float32. What is parsed stays
    clips, for vLLM parses it once more where its cache lacks it.
    """

    def __init__(self, *, config: AudioPrefixConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config = config

    def _parse_audio_data(self, data: Any) -> AudioEmbeddingItems | ClipItems | None:
        if data is None:
            return None
        if self.is_embeddings(data):
            longest = self._config.prefix_length(self._config.clip_samples)
            if wrong := [len(prefix) for prefix in data if not 1 <= len(prefix) <= longest]:
                raise VLLMValidationError(
                    f"an audio prefix has {wrong[0]} tokens; this model's have 1 to {longest}", parameter="audio"
                )
            return AudioEmbeddingItems(data, self.expected_hidden_size)
        items = data if isinstance(data, list) and not _is_number(data) else [data]
        return ClipItems([self._clip(item) for item in items])

    def _clip(self, audio: Any) -> Clip:
        if audio is None:  # vLLM would look for one that was sent before under the same id
            raise VLLMValidationError("an audio comes without its data", parameter="audio")
        if isinstance(audio, Clip):
            if not self._config.prefix_length(audio.samples):
                raise VLLMValidationError(
                    f"a clip of {audio.seconds:g} s is too short for this model", parameter="audio"
                )
            return audio
        samples, rate = audio if isinstance(audio, tuple) else (audio, self._config.sampling_rate)
        seconds = self._config.clip_samples / self._config.sampling_rate
        try:
            return Clip.from_samples(samples, sampling_rate=round(rate), seconds=seconds)
        except AudioError as error:
            raise VLLMValidationError(f"the audio cannot be used: {error}", parameter="audio") from error


def _is_number(data: list[Any]) -> bool:
    return bool(data) and isinstance(data[0], float | int)


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model's inputs."""

    def get_hf_config(self) -> NatureLMAudioConfig:
        return self.ctx.get_hf_config(NatureLMAudioConfig)

    def get_data_parser(self) -> AudioParser:
        return AudioParser(
            config=self.get_hf_config().audio_prefix_config,
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        audio = self.get_hf_config().audio_prefix_config
        return {"audio": audio.prefix_length(audio.clip_samples)}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_default_tok_params(self) -> TokenizeParams:
        return super().get_default_tok_params().with_kwargs(add_special_tokens=False)


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The longest possible input, for memory profiling: clips of 10 s."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        # Where prefixes come from elsewhere there is no audio in it, and a prompt is not empty.
        return AUDIO_SLOT * mm_counts.get("audio", 0) or "."

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        length = self.info.get_hf_config().audio_prefix_config.clip_samples
        audios = self._get_dummy_audios(length=length, num_audios=mm_counts.get("audio", 0))
        return {"audio": audios}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """From prompts with slots and audios to token ids with placeholders and filter banks."""

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        # A prompt that came as text was tokenized in one go, with its slots as text. Byte-level BPE decodes to
        # exactly what was encoded, so it can be tokenized again as the model was trained: piece by piece.
        config = self.info.get_hf_config()
        if config.audio_token_id in prompt:
            return prompt
        tokenizer = self.info.get_tokenizer()
        text = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        tokenize = PromptTokenizer(
            encode=lambda piece: tokenizer.encode(piece, add_special_tokens=False),
            bos_token_id=tokenizer.bos_token_id,
            audio_token_id=config.audio_token_id,
        )
        try:
            return tokenize(text)
        except PromptError as error:
            raise VLLMValidationError(str(error), parameter="prompt") from error

    def _maybe_apply_prompt_updates(
        self, mm_items: MultiModalDataItems, mm_res: MultiModalProcessingResult
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        # vLLM would leave a slot too many as the token it is.
        slots = mm_res.prompt_ids.count(self.info.get_hf_config().audio_token_id)
        try:
            check_audio_count(slots=slots, audios=mm_items.get_count("audio", strict=False))
        except PromptError as error:
            raise VLLMValidationError(str(error), parameter="audio") from error
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        # vLLM's caches know an audio by its key. They take a client's "uuid" for one, whatever is heard.
        audios, given = inputs.mm_data_items.get("audio"), (inputs.mm_uuid_items or {}).get("audio")
        if isinstance(audios, ClipItems):
            keys: list[str | None] = [cache_key(clip.digest) for clip in audios]
        else:
            keys = [cache_key(key) if isinstance(key, ContentKey) else None for key in given or ()]
        return super()._get_mm_hashes(replace(inputs, mm_uuid_items={"audio": keys} if keys else None))

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        # Not through vLLM's call of a processor: it would cast the features to Llama's dtype, and the tower is float32.
        return BatchFeature({"input_features": [fbank(clip.waveform[None])[0] for clip in hf_data["audio"]]})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched("audio") for name in ("input_features", "audio_embeds")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        placeholder, audio = config.audio_token_id, config.audio_prefix_config

        def placeholders(item: int) -> list[int]:
            audios = mm_items.get_items("audio", (AudioEmbeddingItems, ClipItems))
            if isinstance(audios, AudioEmbeddingItems):
                return [placeholder] * audios.get_feature_size(item)
            return [placeholder] * audio.prefix_length(len(audios.get(item).waveform))

        return [PromptReplacement(modality="audio", target=[placeholder], replacement=placeholders)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class NatureLMAudioForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """NatureLM-audio with its LoRA folded in: vLLM's Llama behind this package's audio prefix.

    The tower is held whole by every tensor parallel rank (it is a hundredth of the model) and stays in float32.
    """

    packed_modules_mapping = {  # noqa: RUF012 -- vLLM's protocol
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            # What a checkpoint may hold and nothing reads is left out.
            f"{MERGED_PREFIX}{PREDICTOR}.": None,
            f"{MERGED_PREFIX}{POSITION_IDS}": None,
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The slot's text."""
        if modality.startswith("audio"):
            return AUDIO_SLOT
        raise ValueError(f"the model hears audio only, not {modality}")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: NatureLMAudioConfig = vllm_config.model_config.hf_config
        self.config = config
        self._dtype = vllm_config.model_config.dtype
        self.configure_mm_token_handling(config.get_text_config().vocab_size, [config.audio_token_id])
        with self._mark_tower_model(vllm_config, "audio"):
            self.audio_prefix = AudioPrefix(config.audio_prefix_config).float()
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.get_text_config(),
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which parts LoRA may not touch."""
        return MultiModelKeys.from_string_field(
            language_model="language_model.", connector="audio_prefix.audio_llama_proj.", tower_model=MERGED_PREFIX
        )

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Prefixes of the scheduled audios.

        Args:
            **kwargs: ``input_features`` (float32 ``[audios, frames, 128]``, or a list where clips have several
                lengths) or ``audio_embeds`` (prefixes, ``[audios, n_prefix, hidden]`` or a list likewise).

        Returns:
            ``[n_prefix, hidden]`` for each audio, in Llama's dtype.
        """
        if (embeds := kwargs.get("audio_embeds")) is not None:
            return [embed.to(self._dtype) for embed in embeds]
        if (features := kwargs.get("input_features")) is None:
            return []
        return [prefix.to(self._dtype) for prefix in self.audio_prefix.embed(list(features), at_most=TOWER_BATCH)]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Llama's hidden states."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of hidden states."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors under their names on disk, all or some of them."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


#: vLLM expects a reload to bring every tensor, and warns of each layer and weight that it did not.
_PARTIAL_RELOAD = {
    "vllm.model_executor.model_loader.reload.layerwise": ("%s: Failed to load weights",),
    "vllm.model_executor.model_loader.reload.inplace": ("Following weights were not loaded from checkpoint",),
}


class WeightReload:
    """Methods that vLLM adds to its workers (``worker_extension_cls``), called through ``collective_rpc``."""

    def reload_tensors(self, directory: str, names: list[str]) -> tuple[dict[str, str], str | None]:
        """Replace some of the model's weights by those of a checkpoint.

        vLLM's own reload takes care of fused, sharded and prepacked parameters.

        Args:
            directory: A checkpoint of the same architecture.
            names: The tensors to replace, by their names on disk; of a fused parameter, all parts.

        Returns:
            The sha256 of each tensor's bytes, as they were handed to the model in this worker; and, where one could not
            be read, why. Then the model holds tensors of both checkpoints.
        """
        digests: dict[str, str] = {}
        failure: str | None = None

        # An error must not leave the generator: vLLM's reload takes the layers away before it asks for their weights,
        # and gives them back when the weights end.
        def read() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal failure
            try:
                checkpoint = Checkpoint.open(Path(directory))
                for name in names:
                    tensor = checkpoint.read(name)
                    digests[name] = tensor_sha256(tensor)
                    yield name, tensor
            except (OSError, MergekitBioError) as error:
                failure = str(error)

        with left_out(_PARTIAL_RELOAD):
            self.model_runner.reload_weights(weights_iterator=read())  # type: ignore[attr-defined]
        return digests, failure
