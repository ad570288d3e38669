"""The reference engine: Transformers' own generate, one prompt after the other."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.checkpoint.checkpoint import Checkpoint
from mergekit_bio.checkpoint.digest import tensor_sha256
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import EngineError, PromptError
from mergekit_bio.eval.engines.interface import Decoding, Generation, LabelScore, Loaded, Prompt, Timings
from mergekit_bio.eval.engines.labels import Query, build_trie, choose, score_labels
from mergekit_bio.eval.engines.prefix_cache import PrefixCache
from mergekit_bio.eval.engines.sweep import difference
from mergekit_bio.eval.engines.tokenization import Tokenization

if TYPE_CHECKING:
    import torch


class TransformersEngine:
    """Runs wherever PyTorch does. Nothing is batched, so nothing is padded.

    Args:
        checkpoint: A merged directory, or a hub id.
        dtype: Of Llama; ``"auto"`` takes the checkpoint's.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        prefixes: Where audio prefixes come from; by default every clip goes through the model's own tower.
    """

    name = "transformers"

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.checkpoint = resolve(checkpoint).path
        self.tokenization = Tokenization.from_checkpoint(self.checkpoint)
        import torch
        from transformers import AutoModelForMultimodalLM

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = AutoModelForMultimodalLM.from_pretrained(self.checkpoint, dtype=dtype).to(device).eval()
        self._device, self._prefixes = device, prefixes

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """See :meth:`mergekit_bio.eval.engines.interface.Engine.generate`."""
        return [self._generate(prompt, decoding, decoding.seed + n) for n, prompt in enumerate(prompts)]

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """See :meth:`mergekit_bio.eval.engines.interface.Engine.choose`."""
        root = build_trie(labels, self.tokenization.encode)
        generations = []
        for prompt in prompts:
            start = time.perf_counter()
            reader = _Reader(self, [prompt])
            (choice,) = choose(
                root, prompts=1, eos_token_ids=self.tokenization.eos_token_ids, next_logprobs=reader.next_logprobs
            )
            timings = Timings(total=time.perf_counter() - start)
            length = len(self.tokenization.prompt_ids(prompt, expanded=True))
            generations.append(Generation(choice.label, choice.token_ids, choice.logprobs, "stop", length, timings))
        return generations

    def loglikelihood(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[list[LabelScore]]:
        """See :meth:`mergekit_bio.eval.engines.interface.Engine.loglikelihood`."""
        root = build_trie(labels, self.tokenization.encode)
        reader = _Reader(self, prompts)
        return score_labels(root, labels, prompts=len(prompts), next_logprobs=reader.next_logprobs)

    def load(self, checkpoint: str | Path) -> Loaded:
        """See :meth:`mergekit_bio.eval.engines.interface.Engine.load`."""
        start = time.perf_counter()
        target = resolve(checkpoint).path
        change = difference(self.checkpoint, target)
        try:
            fingerprint = change.check(self._replace(target, change.names))
        except EngineError:
            self._replace(self.checkpoint, change.names)  # back to what was sound
            raise
        self.checkpoint = target
        return Loaded(target, len(change.names), change.nbytes, time.perf_counter() - start, fingerprint)

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    def embed(self, prompt: Prompt) -> "torch.Tensor":
        """The prompt as Llama sees it: ``[1, tokens, hidden]``.

        Raises:
            PromptError: The prompt is empty or longer than the model takes.
        """
        import torch

        from mergekit_bio.audio.fbank import fbank

        ids = self.tokenization.prompt_ids(prompt, expanded=True)
        if len(ids) >= self.tokenization.max_tokens:
            raise PromptError(
                f"the prompt is {len(ids)} tokens long, but the model takes {self.tokenization.max_tokens}; give "
                "fewer audios or examples"
            )
        input_ids = torch.tensor([ids], device=self._device)
        if not prompt.audios:
            embeds: torch.Tensor = self._model.embed(input_ids)
        elif self._prefixes is None:
            features = fbank(torch.stack([clip.waveform for clip in prompt.audios]))
            embeds = self._model.embed(input_ids, features.to(self._device))
        else:
            embeds = self._model.model.embed_tokens(input_ids)
            prefixes = torch.cat(self._prefixes(prompt.audios)).to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter((input_ids == self.tokenization.audio_token_id)[..., None], prefixes)
        return embeds

    def _replace(self, checkpoint: Path, names: Sequence[str]) -> dict[str, str]:
        source, parameters = Checkpoint.open(checkpoint), dict(self._model.named_parameters())
        digests = {}
        for name in names:
            tensor = source.read(name)
            digests[name] = tensor_sha256(tensor)
            parameters[name].data.copy_(tensor)
        return digests

    def _generate(self, prompt: Prompt, decoding: Decoding, seed: int) -> Generation:
        import torch

        eos = decoding.eos_token_ids if decoding.eos_token_ids is not None else self.tokenization.eos_token_ids
        start = time.perf_counter()
        with torch.no_grad():
            embeds = self.embed(prompt)
            if decoding.temperature > 0:
                torch.manual_seed(seed)
            output = self._model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=self._device),
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                suppress_tokens=[self.tokenization.audio_token_id],
                **_settings(decoding, eos),
            )
            beams = decoding.num_beams > 1
            logprobs = (
                self._model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
                if beams
                else torch.stack(output.logits, dim=1).log_softmax(-1).gather(-1, output.sequences[..., None])[..., 0]
            )
        seconds = time.perf_counter() - start
        ids = output.sequences[0].tolist()
        end = next((n + 1 for n, token in enumerate(ids) if token in eos), len(ids))
        return Generation(
            text=self.tokenization.decode(ids[:end]),
            token_ids=tuple(ids[:end]),
            logprobs=tuple(logprobs[0, :end].tolist()),
            finish_reason="stop" if ids[end - 1] in eos else "length",
            prompt_tokens=embeds.shape[1],
            timings=Timings(total=seconds),
            score=output.sequences_scores[0].item() if beams else None,
        )


def _settings(decoding: Decoding, eos: Sequence[int]) -> dict[str, Any]:
    """Transformers' names, all given so that generation_config.json decides nothing."""
    sampling = decoding.temperature > 0
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "num_beams": decoding.num_beams,
        "length_penalty": decoding.length_penalty,
        "early_stopping": decoding.early_stopping,
        "do_sample": sampling,
        "temperature": decoding.temperature if sampling else None,
        "top_p": decoding.top_p if sampling else None,
        "top_k": decoding.top_k if sampling else None,
        "eos_token_id": list(eos) or None,
        "pad_token_id": eos[0] if eos else 0,
    }


class _Reader:
    """Log-probabilities of next tokens, with the prompt's keys and values kept."""

    def __init__(self, engine: TransformersEngine, prompts: Sequence[Prompt]) -> None:
        self._engine, self._prompts = engine, prompts
        self._kept: tuple[int, Any, torch.Tensor, int] | None = None

    def next_logprobs(self, queries: Sequence[Query]) -> list[list[float]]:
        """See :data:`mergekit_bio.eval.engines.labels.NextLogprobs`."""
        import torch

        answers = []
        with torch.no_grad():
            for prompt, tokens, asked in queries:
                cache, logits, length = self._read(prompt)
                if tokens:
                    ids = torch.tensor([tokens], device=logits.device)
                    logits = self._engine._model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
                    cache.crop(length - cache.get_seq_length())
                answers.append(logits.float().log_softmax(-1)[list(asked)].tolist())
        return answers

    def _read(self, prompt: int) -> "tuple[Any, torch.Tensor, int]":
        if self._kept is None or self._kept[0] != prompt:
            embeds = self._engine.embed(self._prompts[prompt])
            output = self._engine._model(inputs_embeds=embeds, use_cache=True)
            self._kept = (prompt, output.past_key_values, output.logits[0, -1], embeds.shape[1])
        return self._kept[1:]
