"""Beam search by greedy requests: Transformers' tokens and scores, few requests, and nothing left behind."""

import asyncio
import json
import random

import pytest
import torch
from engine.starting import merge_sweep, start_vllm
from engine.test_engines_random import assert_same_generations, random_prompts
from safetensors.torch import load_file, save_file
from tiny_naturelm import SPECIAL, make_base, make_naturelm

from mergekit_bio.engine.interface import Decoding
from mergekit_bio.engine.transformers import TransformersEngine
from mergekit_bio.engine.vllm import beams as beams_module
from mergekit_bio.engine.vllm.online import answer
from mergekit_bio.errors import EngineError

GREEDY = Decoding(max_new_tokens=16)
BEAMS = Decoding(max_new_tokens=12, num_beams=3, eos_token_ids=())


class AsyncClient:
    """vLLM's asynchronous interface over an engine of this process, as ``AsyncLLM`` has it over another process."""

    def __init__(self, engine, *, fail_at=None):
        self._llm, self._rendered = engine._llm.llm_engine, engine._rendered
        self.model_config, self._fail_at, self.asked = self._llm.model_config, fail_at, 0
        self._queues, self._stepping = {}, None

    async def generate(self, request, params, request_id, *, lora_request=None):
        self.asked += 1
        if self.asked == self._fail_at:
            raise EngineError("one request failed")
        queue = self._queues[request_id] = asyncio.Queue()
        self._llm.add_request(request_id, self._rendered(request), params, lora_request=lora_request)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        try:
            while not (output := await queue.get()).finished:
                yield output
            yield output
        finally:
            self._llm.abort_request([request_id])
            del self._queues[request_id]

    async def _step(self):
        while self._llm.has_unfinished_requests():
            for output in self._llm.step():
                if output.request_id in self._queues:
                    self._queues[output.request_id].put_nowait(output)
            await asyncio.sleep(0)


def ask_online(engine, prompts, decoding, *, client=None, adapters=None):
    client = client or AsyncClient(engine)

    async def ask_all():
        asked = [
            answer(
                client,
                engine.tokenization,
                prompt=engine.render(prompt),
                clips=list(prompt.audios),
                decoding=decoding,
                adapter=adapter,
            )
            for prompt, adapter in zip(prompts, adapters or [None] * len(prompts), strict=True)
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(ask_all())


@pytest.fixture
def requests(vllm_engine, monkeypatch):
    """The requests that the engine is asked, as they are made."""
    return spied(vllm_engine, monkeypatch)


def spied(engine, monkeypatch):
    asked, add = [], engine._llm.llm_engine.add_request

    def counted(request_id, *arguments, **named):
        asked.append(request_id)
        return add(request_id, *arguments, **named)

    monkeypatch.setattr(engine._llm.llm_engine, "add_request", counted)
    return asked


def is_free(engine) -> bool:
    return not engine._llm.llm_engine.has_unfinished_requests() and engine._llm.reset_prefix_cache()


@pytest.mark.repeated(24, 50)
def test_beams_are_transformers_and_cost_no_more_than_a_request_a_token(
    clips, count, vllm_engine, transformers_engine, requests, monkeypatch
):
    """One to four beams, end tokens that come up (where beams must fork), all kinds of settings; offline and online."""
    rng = random.Random(3)
    prompts = random_prompts(clips, count, seed=3)
    ended = forked = 0
    for start in range(0, count, 4):
        some = prompts[start : start + 4]
        seen = {token for g in transformers_engine.generate(some, GREEDY) for token in g.token_ids}
        decoding = Decoding(
            max_new_tokens=rng.choice([1, 4, 8, 16, 24]),
            num_beams=rng.choice([1, 2, 2, 3, 4]),
            length_penalty=rng.choice([-1.0, 0.0, 0.7, 1.0, 2.0]),
            early_stopping=rng.choice([False, False, True, "never"]),
            eos_token_ids=tuple(sorted(rng.sample(sorted(seen), k=rng.choice([0, 1, 2, 4, 4])))),
        )
        monkeypatch.setattr(beams_module, "_ROLLOUT_TOKENS", rng.choice([3, 64, 64]))
        theirs = transformers_engine.generate(some, decoding)
        requests.clear()
        assert_same_generations(vllm_engine.generate(some, decoding), theirs)
        assert len(requests) <= len(some) * (1 + decoding.num_beams * (decoding.max_new_tokens - 1))
        assert_same_generations(ask_online(vllm_engine, some, decoding), theirs)
        forked += len(requests) > 2 * len(some) * decoding.num_beams
        ended += sum(generation.finish_reason == "stop" for generation in theirs)
    assert ended > count / 10 and forked
    assert is_free(vllm_engine)


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """A model in which each token has one successor, all but surely, and the prompt's last token has many.

    So the beams part once and then go on as greedy decoding does. Its layers add nothing: the logits are those of a
    bigram model.
    """
    folder = tmp_path_factory.mktemp("chains")
    base = make_base(folder / "base")
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    generator = torch.Generator().manual_seed(0)
    words = len(tensors["lm_head.weight"]) - len(SPECIAL)
    embedding = torch.nn.functional.normalize(torch.randn(words + len(SPECIAL), 64, generator=generator))
    order = torch.randperm(words, generator=generator)
    head = torch.nn.functional.normalize(torch.randn(words + len(SPECIAL), 64, generator=generator))
    last = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]["Ċ"]
    for token, successor in zip(order.tolist(), order.roll(1).tolist(), strict=True):
        if token != last:
            head[successor] = embedding[token]
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": 4 * head}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return merge_sweep(base, make_naturelm(folder / "naturelm", base=base), folder / "out", (0.0,))[0.0]


@pytest.fixture(scope="module")
def chained_vllm(chains):
    """With room for two prompts of two beams, or one of four."""
    engine = start_vllm(chains, max_num_seqs=4)
    yield engine
    engine.close()


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_that_do_not_fork_ask_one_request_each_for_64_tokens(chains, chained_vllm, clips, num_beams, monkeypatch):
    prompts = random_prompts(clips, 6, seed=4)
    requests = spied(chained_vllm, monkeypatch)
    for tokens, rollouts in ((4, 1), (24, 1), (64, 1), (100, 2)):
        decoding = Decoding(max_new_tokens=tokens, num_beams=num_beams, eos_token_ids=())
        requests.clear()
        ours = chained_vllm.generate(prompts, decoding)
        assert len(requests) == len(prompts) * num_beams * rollouts, tokens
        if tokens == 24:
            assert_same_generations(ours, TransformersEngine(chains, device="cpu").generate(prompts, decoding))


def test_a_search_that_is_interrupted_leaves_the_engine_free(vllm_engine, transformers_engine, clips, monkeypatch):
    prompts = random_prompts(clips, 5, seed=5)
    engine, steps = vllm_engine._llm.llm_engine, []

    def interrupted():
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return type(engine).step(engine)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "step", interrupted)
        vllm_engine.generate(prompts, BEAMS)
    assert is_free(vllm_engine)
    assert_same_generations(vllm_engine.generate(prompts, BEAMS), transformers_engine.generate(prompts, BEAMS))


def test_a_failing_request_fails_its_own_prompt_with_its_own_words(vllm_engine, transformers_engine, clips):
    prompts = random_prompts(clips, 3, seed=6)
    answers = ask_online(vllm_engine, prompts, BEAMS, client=AsyncClient(vllm_engine, fail_at=7))
    failures = [error for error in answers if isinstance(error, Exception)]
    assert [(type(error), str(error)) for error in failures] == [(EngineError, "one request failed")]
    for found, wanted in zip(answers, transformers_engine.generate(prompts, BEAMS), strict=True):
        if found not in failures:
            assert_same_generations([found], [wanted])
    assert is_free(vllm_engine)


def test_who_leaves_a_search_leaves_no_request_behind(vllm_engine, clips):
    (prompt,) = random_prompts(clips, 1, seed=7)

    async def leave():
        client = AsyncClient(vllm_engine)
        asking = asyncio.create_task(
            answer(
                client,
                vllm_engine.tokenization,
                prompt=vllm_engine.render(prompt),
                clips=list(prompt.audios),
                decoding=Decoding(max_new_tokens=500, num_beams=4, eos_token_ids=()),
            )
        )
        while client.asked < 6:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(leave())
    assert is_free(vllm_engine)


def test_more_beams_than_the_engine_tells_tokens_for_are_refused_in_one_line(vllm_engine, clips):
    prompts = random_prompts(clips, 2, seed=8)
    with pytest.raises(EngineError, match=r"40 beams with 3 end tokens need 161 log-probabilities .* take fewer beams"):
        vllm_engine.generate(prompts, Decoding(num_beams=40))
    assert is_free(vllm_engine)
