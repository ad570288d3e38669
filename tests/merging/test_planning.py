"""Deciding what happens to every tensor: how long that takes, and where it is carried out."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_bio.merging import devices
from mergekit_bio.merging.merge import plan_merge
from mergekit_bio.merging.request import MergeRequest


def write_experts(folder: Path, layers: int) -> None:
    """base/ of many small tensors in a file a layer, as mixtures of experts have them, and adapter/ for all of them."""
    weights, factors, weight_map = {}, {}, {}
    for name in ("base", "adapter"):
        (folder / name).mkdir(parents=True)
    for layer in range(layers):
        modules = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for expert in range(20)]
        weights = {f"{module}.weight": torch.zeros(2, 2) for module in modules}
        if layer == 0:
            weights |= {name: torch.zeros(4, 2) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        factors |= {
            f"base_model.model.{module}.lora_{half}.weight": torch.zeros(shape)
            for module in modules
            for half, shape in (("A", (1, 2)), ("B", (2, 1)))
        }
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(weights, folder / "base" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "base/model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": layers}
    (folder / "base/config.json").write_text(json.dumps(config))
    save_file(factors, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))


def calls_of(function: Callable[[], object]) -> int:
    """How many functions are called, Python's own among them: work, whatever the machine is busy with."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("alphas", [["0.5,layers=0.2..0.8,up_proj=0.3"], ["0:1:0.25"]], ids=str)
def test_a_model_of_four_times_as_many_tensors_takes_four_times_the_work_to_plan(tmp_path, alphas):
    work = []
    for layers in (10, 40):
        write_experts(tmp_path / str(layers), layers)
        base, adapter = tmp_path / str(layers) / "base", tmp_path / str(layers) / "adapter"
        request = MergeRequest(base=base, adapter=adapter, alphas=alphas)
        plan_merge(request)  # what is done once, imports for example
        work.append(calls_of(lambda request=request: plan_merge(request)))
    assert work[1] < 4.4 * work[0]


def test_a_device_without_float64_leaves_folding_to_the_cpu(monkeypatch):
    """Such a device is not at hand here, so that its name is all that is tried: PyTorch's for Apple's GPUs."""
    monkeypatch.setattr(devices, "pick_device", lambda name: name)
    assert devices.compute_devices("mps") == [torch.device("cpu")]
