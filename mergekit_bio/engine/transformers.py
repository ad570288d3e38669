"""The reference engine: Transformers' own generate, in small batches."""

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mergekit_bio.audio.device import gpus_on, pick_device
from mergekit_bio.checkpoint.digest import tensor_sha256
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.decoding.labels import NextLogprobs, Query, build_trie, choice_generation, choose, score_labels
from mergekit_bio.engine.interface import (
    Decoding,
    EngineSettings,
    Generation,
    Prompt,
    check_options,
)
from mergekit_bio.engine.prefix_cache import PrefixCache
from mergekit_bio.engine.sweep import difference, replace_weights
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.errors import EngineError, MergekitBioError, MissingPackageError, PromptError

if TYPE_CHECKING:
    import torch


_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class TransformersEngine:
    """Runs wherever PyTorch does.

    Prompts of similar length go together. What is shorter is padded on the left and masked, so that a prompt's answer
    does not depend on its neighbours beyond floating-point noise. Prompts that are sampled go alone: each has a seed.

    Args:
        checkpoint: A merged directory, or a hub id.
        dtype: Of Llama; ``"auto"`` takes the checkpoint's.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        batch_size: Prompts that go together at most.
        prefixes: Where audio prefixes come from; by default the model's own tower, which then encodes a clip once.

    Attributes:
        prefixes: Where audio prefixes come from.

    Raises:
        EngineError: There is no such dtype or device.
    """

    name: ClassVar = "transformers"
    remote: ClassVar = False
    baseline: ClassVar = False
    packages: ClassVar = ("transformers",)
    advice: ClassVar = ""

    @classmethod
    def missing(cls) -> MissingPackageError | None:
        """The error that says how to install Transformers, where it is not."""
        return (
            None
            if find_spec("transformers")
            else MissingPackageError("transformers", "eval", "the transformers engine")
        )

    @classmethod
    def set_environment(cls, *, quiet: bool) -> None:
        """Transformers reads nothing there that a run needs."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that it does not have."""
        check_options(cls.name, options, known=("dtype", "device"))

    @classmethod
    def prompts_at_once(cls, settings: EngineSettings) -> int:
        """One batch."""
        return 8

    @classmethod
    def gpus(cls, options: Mapping[str, Any]) -> int:
        """One, unless ``device`` says otherwise."""
        return gpus_on(str(options.get("device", "auto")))

    @classmethod
    def start(cls, checkpoint: str, settings: EngineSettings) -> Self:
        """Start it on a checkpoint, with a prefix cache of its own."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would draw over the run's own
        directory, device = resolve(checkpoint).path, settings.options.get("device", "auto")
        prefixes = PrefixCache.of_checkpoint(directory, device=device, folder=settings.prefixes)
        return cls(directory, prefixes=prefixes, **settings.options)

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 8,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.checkpoint = resolve(checkpoint).path
        from mergekit_bio.model.loading import load_weights

        if dtype not in _DTYPES:
            raise EngineError(f"dtype={dtype}: no such data type; write {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
        self._device, self._batch_size = pick_device(device), batch_size
        self._model: Any = load_weights(self.checkpoint, device=self._device, dtype=dtype)
        self.tokenization = Tokenization.from_checkpoint(self.checkpoint)
        self.prefixes = prefixes or PrefixCache(self._model.audio_prefix)
        self.prefixes.keep_in(self._model.model.embed_tokens.weight.dtype)

    def render(self, prompt: Prompt) -> str:
        """The prompt in the checkpoint's own template."""
        return self.tokenization.render(prompt)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """See :meth:`mergekit_bio.engine.interface.Engine.generate`."""
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        by_length = sorted(range(len(prompts)), key=lambda n: len(ids[n]))
        size = 1 if decoding.temperature > 0 else self._batch_size
        answers: dict[int, Generation] = {}
        for start in range(0, len(prompts), size):
            batch = by_length[start : start + size]
            generations = self._generate(
                [prompts[n] for n in batch], [ids[n] for n in batch], decoding, seed=decoding.seed + batch[0]
            )
            answers |= zip(batch, generations, strict=True)
        return [answers[n] for n in range(len(prompts))]

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """See :meth:`mergekit_bio.engine.interface.Engine.choose`."""
        root = build_trie(labels, self.tokenization.encode)
        eos = self.tokenization.eos_token_ids
        generations = []
        for prompt in prompts:
            start = time.perf_counter()
            (choice,) = choose(root, prompts=1, eos_token_ids=eos, next_logprobs=self._next_logprobs([prompt]))
            seconds = time.perf_counter() - start
            length = len(self.tokenization.prompt_ids(prompt, expanded=True))
            generations.append(choice_generation(choice, prompt_tokens=length, seconds=seconds))
        return generations

    def loglikelihood(
        self, prompts: Sequence[Prompt], labels: Sequence[str], *, negligible: float = 0.0
    ) -> list[dict[str, float]]:
        """See :meth:`mergekit_bio.engine.interface.Engine.loglikelihood`."""
        root = build_trie(labels, self.tokenization.encode)
        scores = []
        for prompt in prompts:  # one by one: each is read once, however many steps its labels take
            scores += score_labels(
                root,
                labels,
                prompts=1,
                eos_token_ids=self.tokenization.eos_token_ids,
                next_logprobs=self._next_logprobs([prompt]),
                negligible=negligible,
            )
        return scores

    def load(self, checkpoint: str | Path) -> str:
        """See :meth:`mergekit_bio.engine.interface.Engine.load`."""
        target = resolve(checkpoint).path
        change = difference(self.checkpoint, target)
        fingerprint = replace_weights(change, self.checkpoint, self._replace, self.close)
        self.checkpoint = target
        return fingerprint

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, with a placeholder for every prefix token.

        Raises:
            PromptError: The prompt is empty or longer than the model takes.
        """
        ids = self.tokenization.prompt_ids(prompt, expanded=True)
        if len(ids) >= self.tokenization.max_tokens:
            raise PromptError(
                f"the prompt is {len(ids)} tokens long, but the model takes {self.tokenization.max_tokens}; give "
                "fewer audios, examples or choices"
            )
        return ids

    def _embed(self, ids: Sequence[int], prefixes: "Sequence[torch.Tensor]") -> "torch.Tensor":
        """A prompt as Llama sees it, its audios' prefixes where the placeholders are: ``[tokens, hidden]``."""
        import torch

        input_ids = torch.tensor(ids, device=self._device)
        embeds: torch.Tensor = self._model.model.embed_tokens(input_ids)
        if not prefixes:
            return embeds
        heard = torch.cat(list(prefixes)).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter((input_ids == self.tokenization.audio_token_id)[:, None], heard)

    def _next_logprobs(self, prompts: Sequence[Prompt]) -> NextLogprobs:
        """What walks a trie of labels: reads a prompt once and each query's tokens behind it."""
        import torch

        @lru_cache(maxsize=1)  # the queries about one prompt come together
        def read(prompt: int) -> "tuple[Any, torch.Tensor, int]":
            """The prompt's keys and values, the logits of the next token, and its length."""
            ids = self._prompt_ids(prompts[prompt])
            output = self._model(
                inputs_embeds=self._embed(ids, self.prefixes(prompts[prompt].audios))[None], use_cache=True
            )
            return output.past_key_values, output.logits[0, -1], len(ids)

        def ask(queries: Sequence[Query]) -> list[list[float]]:
            answers: dict[tuple[int, tuple[int, ...]], list[float]] = {}
            places = {(query.prompt, query.tokens): list(query.candidates) for query in queries}
            with torch.no_grad():
                # The longest first: what is read for them answers the queries about their beginnings too.
                for query in sorted(queries, key=lambda query: (query.prompt, -len(query.tokens))):
                    if (query.prompt, query.tokens) in answers:
                        continue
                    cache, logits, length = read(query.prompt)
                    rows = logits[None]
                    if query.tokens:
                        ids = torch.tensor([query.tokens], device=logits.device)
                        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                        rows = torch.cat([rows, output.logits[0]])
                        cache.crop(length - cache.get_seq_length())  # back to the prompt alone
                    for end, row in enumerate(rows):
                        place = query.prompt, query.tokens[:end]
                        if place in places and place not in answers:
                            answers[place] = row.float().log_softmax(-1)[places[place]].tolist()
            return [answers[query.prompt, query.tokens] for query in queries]

        return ask

    def _replace(self, checkpoint: Path, names: Sequence[str]) -> list[tuple[dict[str, str], str | None]]:
        parameters, digests = dict(self._model.named_parameters()), {}
        try:
            source = Checkpoint.open(checkpoint)
            for name in names:
                tensor = source.read(name)
                digests[name] = tensor_sha256(tensor)
                parameters[name].data.copy_(tensor)
        except (OSError, MergekitBioError) as error:
            return [(digests, str(error))]
        return [(digests, None)]

    def _generate(
        self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], decoding: Decoding, *, seed: int
    ) -> list[Generation]:
        """Answer one batch."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        eos = self.tokenization.end_tokens(decoding)
        beams = decoding.num_beams > 1
        start = time.perf_counter()
        with torch.no_grad():
            heard = iter(self.prefixes([clip for prompt in prompts for clip in prompt.audios]))
            rows = [
                self._embed(prompt_ids, [next(heard) for _ in prompt.audios])
                for prompt, prompt_ids in zip(prompts, ids, strict=True)
            ]
            # Generation continues a row at its right end, so the padding stands on the left.
            embeds = pad_sequence(rows, batch_first=True, padding_side="left")
            mask = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
            if decoding.temperature > 0:
                torch.manual_seed(seed)
            output = self._model.generate(
                inputs_embeds=embeds,
                attention_mask=pad_sequence(mask, batch_first=True, padding_side="left"),
                return_dict_in_generate=True,
                output_scores=beams,
                output_logits=not beams,
                suppress_tokens=[self.tokenization.audio_token_id],
                **_settings(decoding, eos),
            )
            logprobs = (
                self._model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
                if beams
                else _logprobs(output.logits, output.sequences)
            )
        seconds = time.perf_counter() - start
        scores = output.sequences_scores.tolist() if beams else [None] * len(prompts)
        generations = []
        for prompt_ids, tokens, logs, score in zip(
            ids, output.sequences.tolist(), logprobs.tolist(), scores, strict=True
        ):
            # A row goes on with padding after its first end token.
            end = next((n + 1 for n, token in enumerate(tokens) if token in eos), len(tokens))
            generations.append(
                self.tokenization.generation(
                    tokens[:end], logs[:end], decoding, prompt_tokens=len(prompt_ids), seconds=seconds, score=score
                )
            )
        return generations


def _logprobs(logits: "Sequence[torch.Tensor]", sequences: "torch.Tensor") -> "torch.Tensor":
    """Of tokens ``[prompts, steps]``, from each step's logits ``[prompts, vocabulary]``."""
    import torch

    steps = [step.log_softmax(-1).gather(-1, sequences[:, n, None]) for n, step in enumerate(logits)]
    return torch.cat(steps, dim=1)


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
