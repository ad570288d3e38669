"""Two sweeps, and one engine of each kind on them for all tests of this folder."""

import json
from pathlib import Path

import pytest
import torch
from engine.starting import merge_sweep, start_vllm
from engine.widened_heads import widened_copy
from safetensors.torch import load_file
from tiny_naturelm import make_base, make_naturelm

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.engine.interface import Prompt
from mergekit_bio.engine.transformers import TransformersEngine


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    base = make_base(folder / "base")
    return merge_sweep(base, make_naturelm(folder / "naturelm", base=base), folder / "out", (0.0, 0.5, 1.0))


@pytest.fixture(scope="session")
def golden_sweep(golden, tmp_path_factory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("golden")
    base = widened_copy(golden / "llama-tiny", folder / "base")
    adapter = widened_copy(golden / "naturelm-tiny-trained-only", folder / "adapter")
    return merge_sweep(base, adapter, folder / "out", (0.0, 0.3, 0.5, 1.0))


@pytest.fixture(scope="session")
def vllm_engine(tiny_sweep):
    """On the self-made sweep; a test that moves it to another alpha moves it back to 0.5."""
    engine = start_vllm(tiny_sweep[0.5])
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def transformers_engine(tiny_sweep):
    return TransformersEngine(tiny_sweep[0.5], device="cpu")


@pytest.fixture(scope="session")
def golden_vllm(golden_sweep):
    engine = start_vllm(golden_sweep[0.5])
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def golden_transformers(golden_sweep):
    return TransformersEngine(golden_sweep[0.5], device="cpu")


@pytest.fixture(scope="session")
def vectors(golden) -> dict[str, torch.Tensor]:
    return load_file(golden / "vectors.safetensors")


@pytest.fixture(scope="session")
def generation(golden) -> dict:
    return json.loads((golden / "vectors.json").read_text())["generation"]


@pytest.fixture(scope="session")
def golden_prompts(golden, vectors) -> dict[str, Prompt]:
    head, tail = LLAMA3_TEMPLATE.split("{}")
    clips = [Clip(waveform.double()) for waveform in vectors["raw_wav"]]
    prompts = json.loads((golden / "vectors.json").read_text())["prompts"]
    return {
        name: Prompt(
            prompt["prompt"].removeprefix(head).removesuffix(tail), [clips[n] for n in prompt["audio_indices"]]
        )
        for name, prompt in prompts.items()
    }


@pytest.fixture(scope="session")
def clips() -> list[Clip]:
    generator = torch.Generator().manual_seed(7)
    return [
        Clip.from_samples(torch.rand(seconds * 16000, generator=generator) - 0.5, sampling_rate=16000)
        for seconds in (1, 3, 5, 8, 10, 12)
    ]
