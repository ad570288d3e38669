"""On random prompts vLLM's answers are Transformers': greedy, beams, closed lists and label scores."""

import math
import random

import pytest

from mergekit_bio.engine.interface import Decoding, Prompt

pytestmark = pytest.mark.repeated(24, 64)

WORDS = [
    "marsh",
    "wren",
    "tree",
    "frog",
    "gray",
    "wolf",
    "spring",
    "peeper",
    "audio",
    "Label:",
    "What",
    "is",
    "<Audio>",
    "</Audio>",
    "\n",
    "exactly",
    "one",
    "of",
    "Ärger",
    "🐸",
    "7",
]
LABELS = ["marsh wren", "marsh", "tree frog", "tree", "gray wolf", "spring peeper", "Ärger 🐸"]


def random_prompts(clips, count, *, seed, words=(1, 60), audios=(0, 6)) -> list[Prompt]:
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        chosen = rng.choices(clips, k=rng.randint(*audios))
        pieces = [" ".join(rng.choices(WORDS, k=rng.randint(*words))) for _ in range(len(chosen) + 1)]
        pieces[0] = "Q" + pieces[0]
        pieces[-1] += "?"
        prompts.append(Prompt("<AudioHere>".join(pieces), chosen))
    return prompts


def assert_same_generations(ours, theirs, *, tolerance=1e-4):
    for n, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.token_ids == other.token_ids, n
        assert (one.text, one.finish_reason, one.prompt_tokens) == (
            other.text,
            other.finish_reason,
            other.prompt_tokens,
        )
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance), n
        # A score is the sum of the log-probabilities times a power of the length, and so is what float32 rounds away.
        times = max(1.0, abs(other.score / sum(other.logprobs))) if other.score else 1.0
        assert one.score == pytest.approx(other.score, abs=times * tolerance), n


@pytest.fixture(scope="module")
def prompts(clips, count):
    return random_prompts(clips, count, seed=1)


@pytest.fixture(scope="module")
def greedy(prompts, transformers_engine):
    return transformers_engine.generate(prompts, Decoding(max_new_tokens=16))


def test_prompts_cross_several_cache_blocks(greedy):
    lengths = [generation.prompt_tokens for generation in greedy]
    assert min(lengths) < 128 and max(lengths) > 3 * 128


def test_greedy_is_transformers_token_for_token(prompts, greedy, vllm_engine):
    assert_same_generations(vllm_engine.generate(prompts, Decoding(max_new_tokens=16)), greedy)


def test_beams_are_transformers_token_for_token(prompts, greedy, vllm_engine, transformers_engine):
    """With end tokens that really come up, one to four of them, and all kinds of settings."""
    rng = random.Random(2)
    ended = 0
    for n in range(0, len(prompts), 8):
        seen = [token for generation in greedy[n : n + 8] for token in generation.token_ids]
        decoding = Decoding(
            max_new_tokens=rng.choice([1, 6, 12]),
            num_beams=rng.choice([2, 2, 3, 4]),
            length_penalty=rng.choice([0.0, 1.0, 2.0]),
            early_stopping=rng.choice([False, False, True, "never"]),
            eos_token_ids=tuple(sorted({*rng.sample(sorted(set(seen)), k=rng.randint(1, 4))})),
        )
        theirs = transformers_engine.generate(prompts[n : n + 8], decoding)
        assert_same_generations(vllm_engine.generate(prompts[n : n + 8], decoding), theirs)
        ended += sum(generation.finish_reason == "stop" for generation in theirs)
    assert ended > len(prompts) / 10


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_prompt_is_answered_alike_in_any_company(prompts, transformers_engine, num_beams):
    """In the batches of our Transformers engine, where the shorter ones are padded."""
    some, decoding = prompts[:13], Decoding(max_new_tokens=12, num_beams=num_beams)
    assert len({len(prompt.audios) for prompt in some}) > 3
    alone = [transformers_engine.generate([prompt], decoding)[0] for prompt in some]
    assert_same_generations(transformers_engine.generate(some, decoding), alone)


def test_choice_stays_in_the_list_and_has_transformers_probabilities(prompts, vllm_engine, transformers_engine):
    ours = vllm_engine.choose(prompts, LABELS)
    assert {generation.text for generation in ours} <= set(LABELS)
    assert len({generation.text for generation in ours}) > 1
    assert_same_generations(ours, transformers_engine.choose(prompts, LABELS))


def test_loglikelihood_is_transformers(prompts, vllm_engine, transformers_engine):
    few = prompts[:16]
    ours, theirs = vllm_engine.loglikelihood(few, LABELS), transformers_engine.loglikelihood(few, LABELS)
    for scores, expected in zip(ours, theirs, strict=True):
        assert list(scores) == list(expected) == LABELS
        assert scores == pytest.approx(expected, abs=1e-4)


def test_label_scores_are_those_of_whole_answers_that_end(prompts, tiny_sweep, transformers_engine):
    """Read by Transformers' own model in one go, the label behind the prompt, and after it any of three end tokens."""
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    import mergekit_bio.model  # noqa: F401 -- registers the model

    model = AutoModelForMultimodalLM.from_pretrained(tiny_sweep[0.5])
    processor = AutoProcessor.from_pretrained(tiny_sweep[0.5])
    ends = model.generation_config.eos_token_id
    assert len(ends) == 3
    few = prompts[:4]
    for prompt, scores in zip(few, transformers_engine.loglikelihood(few, LABELS), strict=True):
        rendered = processor.render(prompt.text, num_audios=len(prompt.audios))
        inputs = processor(rendered, audio=list(prompt.audios))
        length = inputs["input_ids"].shape[1]
        for label in LABELS:
            ids = torch.tensor([processor.tokenizer.encode(label, add_special_tokens=False)])
            inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :length], ids], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            with torch.inference_mode():
                logprobs = model(**inputs).logits[0, length - 1 :].log_softmax(-1)
            whole = logprobs[:-1].gather(1, ids[0, :, None]).sum() + logprobs[-1, ends].logsumexp(0)
            assert scores[label] == pytest.approx(float(whole), abs=1e-4)


def test_leaving_out_what_is_negligible_changes_nothing_else(prompts, vllm_engine, transformers_engine):
    few = prompts[:8]
    exact = transformers_engine.loglikelihood(few, LABELS)
    for engine in (vllm_engine, transformers_engine):
        for scores, expected in zip(engine.loglikelihood(few, LABELS, negligible=0.05), exact, strict=True):
            scored = {label: score for label, score in scores.items() if score > -math.inf}
            assert scored == pytest.approx({label: expected[label] for label in scored}, abs=1e-4)
            total = sum(map(math.exp, expected.values()))
            assert sum(map(math.exp, scored.values())) > 0.95 * total


def test_sampling_repeats_with_its_seed_and_not_without(prompts, vllm_engine):
    few = prompts[:4]
    sampled = [
        [
            generation.token_ids
            for generation in vllm_engine.generate(few, Decoding(temperature=1.0, seed=seed, max_new_tokens=12))
        ]
        for seed in (3, 3, 4)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
