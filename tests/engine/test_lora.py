"""An adapter that vLLM applies while it runs is the merge at alpha 1."""

import json

import pytest
from engine.starting import start_vllm
from engine.test_engines_random import random_prompts
from safetensors.torch import load_file, save_file
from tiny_naturelm import RANK

from mergekit_bio.engine.interface import Decoding
from mergekit_bio.engine.transformers import TransformersEngine
from mergekit_bio.engine.vllm.requests import sampling_params

DECODING = Decoding(max_new_tokens=12)


@pytest.fixture
def adapter(tiny_sweep, tmp_path):
    """The sweep's LoRA as PEFT stores one."""
    stored = load_file(tiny_sweep[1.0].parents[1] / "naturelm" / "model.safetensors")
    tensors = {
        name.removeprefix("llama_model.").replace(".default.", "."): tensor
        for name, tensor in stored.items()
        if ".lora_" in name
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_vllms_lora_beside_audio_equals_the_merge(tiny_sweep, adapter, clips):
    engine = start_vllm(tiny_sweep[0.0], enable_lora=True, max_lora_rank=8)
    from vllm.lora.request import LoRARequest

    prompts = random_prompts(clips, 6, seed=4, words=(5, 30), audios=(1, 4))
    tokenization = engine.tokenization
    params = sampling_params(DECODING, tokenization, seed=0)
    requests = [engine._request(prompt, room=12) for prompt in prompts]
    request = LoRARequest("adapter", 1, str(adapter))
    outputs = engine._llm.generate(requests, params, lora_request=request, use_tqdm=False)
    engine.close()
    merged = TransformersEngine(tiny_sweep[1.0], device="cpu").generate(prompts, DECODING)
    plain = TransformersEngine(tiny_sweep[0.0], device="cpu").generate(prompts, DECODING)
    found = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert found == [generation.token_ids for generation in merged]
    assert found != [generation.token_ids for generation in plain]
