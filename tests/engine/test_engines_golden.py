"""Both engines give the reference implementation's tokens, from raw audio and from prefixes encoded beforehand."""

import pytest
from engine.test_engines_random import assert_same_generations

from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.engine.interface import Decoding
from mergekit_bio.engine.prefix_cache import PrefixCache

GREEDY = Decoding(max_new_tokens=20)


@pytest.fixture(params=["golden_vllm", "golden_transformers"])
def engine(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["raw audio", "prefixes"])
def source(request, engine, golden_sweep, monkeypatch):
    """Where the engine gets its prefixes from."""
    if request.param == "prefixes":
        cache = PrefixCache(AudioPrefix.from_pretrained(golden_sweep[0.5]))
        monkeypatch.setattr(engine, "prefixes", cache)
    return request.param


def test_greedy_and_beams_are_the_stored_ones_at_every_alpha(engine, source, golden_sweep, golden_prompts, generation):
    for alpha, checkpoint in golden_sweep.items():
        engine.load(checkpoint)
        runs = [run for run in generation["runs"] if run["alpha"] == alpha]
        prompts = [golden_prompts[run["prompt"]] for run in runs]
        assert [run["prompt"] for run in runs] == ["single", "icl3"]
        greedy = engine.generate(prompts, GREEDY)
        beams = engine.generate(prompts, Decoding(max_new_tokens=20, num_beams=2))
        for run, one, two in zip(runs, greedy, beams, strict=True):
            assert list(one.token_ids) == run["greedy_ids"], (alpha, run["prompt"])
            assert list(two.token_ids) == run["beam2_ids"], (alpha, run["prompt"])
            assert two.score == pytest.approx(run["beam2_sequence_score"], abs=1e-4)
            assert two.score == pytest.approx(sum(two.logprobs) / len(two.logprobs), abs=1e-5)


def test_other_end_tokens_and_length_penalties_give_the_stored_tokens(engine, golden_sweep, golden_prompts, generation):
    for run in generation["eos_override_runs"]:
        engine.load(golden_sweep[run["alpha"]])
        prompt = [golden_prompts[run["prompt"]]]
        eos = tuple(run["eos_token_id"])
        (greedy,) = engine.generate(prompt, Decoding(max_new_tokens=20, eos_token_ids=eos))
        assert list(greedy.token_ids) == run["greedy_ids"]
        assert greedy.finish_reason == ("stop" if run["greedy_ids"][-1] in eos else "length")
        for penalty in (0.0, 1.0, 2.0):
            decoding = Decoding(max_new_tokens=20, num_beams=2, length_penalty=penalty, eos_token_ids=eos)
            (beam,) = engine.generate(prompt, decoding)
            assert list(beam.token_ids) == run[f"beam2_ids_lp{penalty}"], (run["alpha"], penalty)
            assert beam.score == pytest.approx(run[f"beam2_score_lp{penalty}"], rel=1e-4)


def test_the_prompt_is_as_long_as_the_references(engine, golden, golden_prompts):
    import json

    stored = json.loads((golden / "vectors.json").read_text())["prompts"]
    for name, prompt in golden_prompts.items():
        (generation,) = engine.generate([prompt], Decoding(max_new_tokens=1))
        assert generation.prompt_tokens == stored[name]["sequence_length"]


def test_the_engines_agree_on_both_prompts(golden_vllm, golden_transformers, golden_sweep, golden_prompts):
    for engine in (golden_vllm, golden_transformers):
        engine.load(golden_sweep[0.5])
    prompts = list(golden_prompts.values())
    assert_same_generations(golden_vllm.generate(prompts, GREEDY), golden_transformers.generate(prompts, GREEDY))
