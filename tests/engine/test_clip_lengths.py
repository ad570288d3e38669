"""Clips of several lengths: every engine takes as many tokens for each as its prefix has, and answers alike."""

import pytest
import torch
from engine.test_engines_random import LABELS, assert_same_generations, random_prompts

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.engine.prefix_cache import PrefixCache

TOKENS = {3: 8, 5: 14, 10: 29}
GREEDY = Decoding(max_new_tokens=8)


def clips_of(samples: torch.Tensor) -> dict[int, Clip]:
    """One recording, heard at every length."""
    return {seconds: Clip.from_samples(samples, sampling_rate=16_000, seconds=seconds) for seconds in TOKENS}


@pytest.fixture(scope="module")
def recordings() -> list[dict[int, Clip]]:
    generator = torch.Generator().manual_seed(21)
    return [clips_of(torch.rand(seconds * 16_000, generator=generator) - 0.5) for seconds in (2, 4, 11)]


@pytest.fixture(scope="module")
def prompts(recordings) -> list[Prompt]:
    """Each recording at each length, then several lengths in one prompt, in every order."""
    alone = [Prompt("Which species?", [clip]) for clips in recordings for clip in clips.values()]
    mixed = [clip for clips in recordings for clip in clips.values()]
    return alone + random_prompts(mixed, 12, seed=4, audios=(2, 6))


@pytest.fixture(scope="module")
def expected(prompts, transformers_engine):
    return transformers_engine.generate(prompts, GREEDY)


def test_a_prompt_takes_as_many_tokens_as_its_clips_prefixes_have(prompts, expected):
    text = expected[0].prompt_tokens - TOKENS[3]
    assert [generation.prompt_tokens for generation in expected[:9]] == [
        text + tokens for tokens in TOKENS.values()
    ] * 3


def test_the_length_of_a_clip_changes_what_is_answered(expected):
    for n in range(0, 9, 3):
        assert len({generation.logprobs for generation in expected[n : n + 3]}) == 3


@pytest.mark.parametrize("prefixes", ["vLLM's tower", "the cache"])
def test_vllm_answers_as_transformers_does(prompts, expected, vllm_engine, tiny_sweep, monkeypatch, prefixes):
    if prefixes == "the cache":
        monkeypatch.setattr(vllm_engine, "prefixes", PrefixCache(AudioPrefix.from_pretrained(tiny_sweep[0.5])))
        # Else vLLM would take what it remembers of the clips.
        vllm_engine._reset_caches()
    assert_same_generations(vllm_engine.generate(prompts, GREEDY), expected)
    assert_same_generations(vllm_engine.generate(prompts[::-1], GREEDY), expected[::-1])  # known by now


def test_beams_choices_and_label_scores_too(prompts, transformers_engine, vllm_engine):
    some, beams = prompts[:3] + prompts[9:13], Decoding(max_new_tokens=5, num_beams=2)
    assert_same_generations(vllm_engine.generate(some, beams), transformers_engine.generate(some, beams))
    assert_same_generations(vllm_engine.choose(some, LABELS), transformers_engine.choose(some, LABELS))
    pairs = zip(vllm_engine.loglikelihood(some, LABELS), transformers_engine.loglikelihood(some, LABELS), strict=True)
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_processor_and_the_model_take_them_too(prompts, expected, transformers_engine):
    """Transformers' own way in: one call of the processor for a batch, one of the model's ``generate``."""
    engine = transformers_engine
    processor, model = engine.tokenization.processor, engine._model
    for batch in ([0, 1, 2], [1, 4, 7], [9, 10, 11]):  # several lengths, one length, several in one prompt
        texts = [processor.render(prompts[n].text, num_audios=len(prompts[n].audios)) for n in batch]
        inputs = processor(texts, audio=[list(prompts[n].audios) for n in batch]).to("cpu")
        assert isinstance(inputs["input_features"], torch.Tensor) == (batch == [1, 4, 7])
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=GREEDY.max_new_tokens,
                eos_token_id=list(engine.tokenization.eos_token_ids),
                pad_token_id=engine.tokenization.eos_token_ids[0],
                suppress_tokens=[engine.tokenization.audio_token_id],
            )
            logits = model(**inputs).logits
        assert logits.shape[:2] == inputs["input_ids"].shape
        for row, n in zip(ids[:, inputs["input_ids"].shape[1] :].tolist(), batch, strict=True):
            assert tuple(row[: len(expected[n].token_ids)]) == expected[n].token_ids


def test_an_array_is_a_clip_of_ten_seconds_for_the_processor(transformers_engine):
    processor = transformers_engine.tokenization.processor
    samples = torch.rand(48_000, generator=torch.Generator().manual_seed(2)) - 0.5
    clips = clips_of(samples)
    as_array, as_clip, short = (processor(processor.render("What?"), audio) for audio in (samples, clips[10], clips[3]))
    assert torch.equal(as_array["input_features"], as_clip["input_features"])
    assert as_array["input_ids"].shape[1] == as_clip["input_ids"].shape[1] == short["input_ids"].shape[1] + 29 - 8


def test_a_saved_processor_still_knows_the_lengths(transformers_engine, tmp_path):
    from mergekit_bio.model.processing import NatureLMAudioProcessor

    transformers_engine.tokenization.processor.save_pretrained(tmp_path)
    (clip,) = (clip for seconds, clip in clips_of(torch.zeros(16_000)).items() if seconds == 3)
    assert NatureLMAudioProcessor.from_pretrained(tmp_path).num_placeholders(clip) == 8
