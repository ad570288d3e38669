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

DECODING = Decoding(max_new_tokens=8)


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    clips = [Clip.from_samples(torch.rand(48_000, generator=generator) - 0.5, sampling_rate=16_000) for _ in range(3)]
    slot = "<Audio><AudioHere></Audio>"
    return [Prompt(f"{slot * count} Who calls?", clips[:count]) for count in (0, 1, 3)]


def answer(first: str, second: str) -> None:
    """Print the token ids at two checkpoints; runs in a process of its own, because vLLM starts others from it."""
    from engine.starting import start_vllm

    engine = start_vllm(Path(first), tensor_parallel_size=2)
    before = engine.generate(prompts(), DECODING)
    engine.load(second)
    after = engine.generate(prompts(), DECODING)
    engine.close()
    print(json.dumps([[answer.token_ids for answer in answers] for answers in (before, after)]))


def test_two_ranks_answer_as_one_process_does(tiny_sweep):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    if not {0, 1} <= os.sched_getaffinity(0):
        pytest.skip("two ranks need processors 0 and 1")
    checkpoints = [tiny_sweep[0.5], tiny_sweep[1.0]]
    script = "import sys; from engine.test_tensor_parallel import answer; answer(*sys.argv[1:])"
    tests = Path(__file__).parents[1]
    environment = {
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'eval'}",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }

    done = subprocess.run(
        [sys.executable, "-c", script, *checkpoints], capture_output=True, text=True, env=os.environ | environment
    )

    assert done.returncode == 0, done.stderr[-2000:]
    expected = [
        [answer.token_ids for answer in TransformersEngine(path, device="cpu").generate(prompts(), DECODING)]
        for path in checkpoints
    ]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert [list(map(tuple, answers)) for answers in found] == expected
    assert expected[0] != expected[1]
