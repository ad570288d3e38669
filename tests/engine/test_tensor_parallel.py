"""Two processes that hold half of Llama each answer as one does, and move along a sweep together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.engine.transformers import TransformersEngine

DECODINGS = (Decoding(max_new_tokens=8), Decoding(max_new_tokens=8, num_beams=2))


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    clips = [Clip.from_samples(torch.rand(48_000, generator=generator) - 0.5, sampling_rate=16_000) for _ in range(3)]
    slot = "<Audio><AudioHere></Audio>"
    return [Prompt(f"{slot * count} Who calls?", clips[:count]) for count in (0, 1, 3)]


def answer(first: str, second: str) -> None:
    """Print the token ids at two checkpoints; runs in a process of its own, because vLLM starts others from it."""
    from engine.starting import start_vllm

    engine = start_vllm(Path(first), tensor_parallel_size=2)
    before = answers(engine)
    engine.load(second)
    after = answers(engine)
    engine.close()
    print(json.dumps([before, after]))


def answers(engine) -> list[list[int]]:
    """Greedy ones, then those of a beam search."""
    return [list(answer.token_ids) for decoding in DECODINGS for answer in engine.generate(prompts(), decoding)]


def answer_at_strengths(base: str, adapter: str) -> None:
    """Print the token ids at strengths 0.5 and 1 of a dial."""
    from engine.starting import start_vllm
    from engine.test_beams import AsyncClient, ask_online

    from mergekit_bio.engine.vllm.dial import Dial
    from mergekit_bio.serve.dial import DialRequest, prepared_dial

    with prepared_dial(DialRequest(base, adapter)) as files:
        dial = Dial(["lm"], files.adapters, default=500, aliases={})
        lora = {"max_lora_rank": files.slots.slot_rank, "lora_target_modules": files.slots.vllm_layers, "max_loras": 2}
        engine = start_vllm(files.model, tensor_parallel_size=2, enable_lora=True, **lora)
        asked, adapters = 2 * prompts(), [dial["lm@0.5"]] * 3 + [dial["lm@1"]] * 3
        client = AsyncClient(engine)
        mixed = [ask_online(engine, asked, decoding, client=client, adapters=adapters) for decoding in DECODINGS]
        engine.close()
    by_strength = [[list(one.token_ids) for found in mixed for one in found[start : start + 3]] for start in (0, 3)]
    print(json.dumps(by_strength))


@pytest.mark.long
def test_two_ranks_answer_as_one_process_does(tiny_sweep):
    assert on_two_ranks("answer", tiny_sweep[0.5], tiny_sweep[1.0]) == of_merges(tiny_sweep)


@pytest.mark.soak
def test_two_ranks_answer_at_every_strength_as_merges_do(tiny_sweep):
    folder = tiny_sweep[0.5].parents[1]
    assert on_two_ranks("answer_at_strengths", folder / "base", folder / "naturelm") == of_merges(tiny_sweep)


def of_merges(sweep) -> list[list[list[int]]]:
    """What is right at 0.5 and 1."""
    expected = [answers(TransformersEngine(sweep[alpha], device="cpu")) for alpha in (0.5, 1.0)]
    assert expected[0] != expected[1]
    return expected


def on_two_ranks(function: str, *arguments: Path) -> list[list[list[int]]]:
    """What one of the functions above prints."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    if not {0, 1} <= os.sched_getaffinity(0):
        pytest.skip("two ranks need processors 0 and 1")
    script = f"import sys; from engine.test_tensor_parallel import {function}; {function}(*sys.argv[1:])"
    tests = Path(__file__).parents[1]
    environment = {
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'eval'}",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
