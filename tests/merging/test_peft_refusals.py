"""What cannot be folded exactly is refused by its name, in one line, and leaves nothing behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging.tiny import ATTENTION, Case, load, train
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

import mergekit_bio
from mergekit_bio.errors import MergekitBioError


def refusal(base: Path, adapter: Path, tmp_path: Path) -> str:
    out = tmp_path / "outputs" / "out"
    with pytest.raises(MergekitBioError) as caught:
        mergekit_bio.merge(base=base, adapter=adapter, alphas=[1.0], out=out, device="cpu")
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def base(base_of) -> Path:
    return base_of("llama")


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """A plain one, to be spoiled."""
    train(Case.of("plain"), base, tmp_path / "adapter")
    return tmp_path / "adapter"


BLOCK_DIAGONAL = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=ATTENTION[:3], nblocks=2)
MADE_BY_PEFT = [
    Case.of("alora_invocation_tokens", alora_invocation_tokens=[1, 2]),
    Case.of("layer_replication", layer_replication=[[0, 2], [1, 3]]),
    Case.of("lora_bias", lora_bias=True),  # of projections without a bias to add it to
    Case.of("use_bdlora", use_bdlora=BLOCK_DIAGONAL),
    Case.of("monteclora_config", monteclora_config=MontecloraConfig(num_samples=2, buffer_size=2)),
    Case.of("kasa_config", kasa_config=KasaConfig()),
    Case.of("velora_config", velora_config=VeloraConfig(num_groups=4)),
    Case.of("init_lora_weights", init_lora_weights="pissa"),
    # PEFT saves the resized side that has LoRA and forgets the other, whose new rows are lost.
    Case.of("lm_head", added_tokens=3, target_modules=["q_proj", "embed_tokens"]),
]


@pytest.mark.parametrize("case", MADE_BY_PEFT, ids=lambda case: f"{case.name}-{case.base}")
def test_an_adapter_that_cannot_be_folded_is_refused_by_name(case, base_of, tmp_path):
    train(case, base_of(case.base), tmp_path / "adapter")
    assert case.name in refusal(base_of(case.base), tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 2}),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("a_setting_of_a_later_release", True),
    ],
)
def test_a_setting_that_needs_more_than_this_machine_is_refused_by_name(setting, value, base, adapter, tmp_path):
    edit(adapter / "adapter_config.json", **{setting: value})
    message = refusal(base, adapter, tmp_path)
    assert setting in message
    assert not isinstance(value, str) or value in message


OTHER_METHODS = {
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LOHA": peft.LoHaConfig(target_modules=ATTENTION),
    "LOKR": peft.LoKrConfig(target_modules=ATTENTION),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "VERA": peft.VeraConfig(target_modules=["q_proj"], r=4),
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_peft_methods_are_refused_by_name(method, base, tmp_path):
    model = peft.get_peft_model(load(base, dtype=torch.float32), OTHER_METHODS[method])
    model.save_pretrained(tmp_path / "adapter")
    assert method in refusal(base, tmp_path / "adapter", tmp_path)


def test_a_quantized_base_is_refused(base, adapter, tmp_path):
    quantized = tmp_path / "quantized"
    shutil.copytree(base, quantized)
    edit(quantized / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "quantization_config" in refusal(quantized, adapter, tmp_path)
