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


@pytest.mark.long
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
    expected = [answers(TransformersEngine(path, device="cpu")) for path in checkpoints]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == expected
    assert expected[0] != expected[1]
