import pytest
from tiny_naturelm import NATURELM

from mergekit_bio.audio.layout import merged_config, placeholder_token, processor_config
from mergekit_bio.errors import CheckpointError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "vocab_size": 128_256,
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "torch_dtype": "bfloat16",
}


def tokenizer(*special: str, first: int = 128_000) -> dict:
    tokens = [{"id": first + n, "content": text, "special": True} for n, text in enumerate(special)]
    return {"added_tokens": [{"id": 5, "content": "<|reserved_plain|>", "special": False}, *tokens]}


LLAMA3 = tokenizer(
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"
)


def test_the_config_holds_a_complete_llama_and_a_complete_tower() -> None:
    config = merged_config(text_config=LLAMA, naturelm_config=NATURELM, tokenizer=LLAMA3)

    assert config["model_type"] == "naturelm_audio"
    assert config["architectures"] == ["NatureLMAudioForConditionalGeneration"]
    assert config["audio_token_id"] == 128_002
    assert config["audio_config"]["hidden_size"] == 64
    assert config["audio_config"]["qformer"]["num_attention_heads"] == 2
    assert (config["bos_token_id"], config["eos_token_id"]) == (LLAMA["bos_token_id"], LLAMA["eos_token_id"])
    text = config["text_config"]
    assert text["architectures"] == ["LlamaForCausalLM"]
    assert {key: text[key] for key in LLAMA if key != "torch_dtype"} == {
        k: v for k, v in LLAMA.items() if k != "torch_dtype"
    }
    assert config["dtype"] == text["dtype"] == "bfloat16"
    assert "torch_dtype" not in text


def test_another_dtype_is_recorded() -> None:
    config = merged_config(text_config=LLAMA, naturelm_config=NATURELM, tokenizer=LLAMA3, dtype="float32")

    assert config["dtype"] == config["text_config"]["dtype"] == "float32"


def test_the_processor_knows_slot_length_and_template() -> None:
    config = processor_config(text_config=LLAMA, naturelm_config=NATURELM, tokenizer=LLAMA3)

    assert config == {
        "audio_token": "<|reserved_special_token_0|>",
        "clip_samples": 160_000,
        "prefix_length": 29,
        "processor_class": "NatureLMAudioProcessor",
        "prompt_template": NATURELM["prompt_template"],
        "sampling_rate": 16_000,
    }


def test_another_tokenizers_first_reserved_token_serves() -> None:
    assert placeholder_token(tokenizer("<s>", "<unused_7>", "<unused_8>")) == ("<unused_7>", 128_001)


@pytest.mark.parametrize(
    ("text_config", "naturelm_config", "tokens", "message"),
    [
        (LLAMA | {"model_type": "qwen2"}, NATURELM, LLAMA3, "'qwen2'"),
        (LLAMA, NATURELM, tokenizer("<s>", "</s>"), "no reserved special token"),
        (LLAMA | {"vocab_size": 128_002}, NATURELM, LLAMA3, "vocab_size 128002"),
        (LLAMA | {"hidden_size": None}, NATURELM, LLAMA3, "hidden_size"),
        (LLAMA, {}, LLAMA3, "beats_cfg"),
    ],
)
def test_refuses_sources_that_do_not_go_together(text_config, naturelm_config, tokens, message: str) -> None:
    for build in (merged_config, processor_config) if "qwen2" not in message else (merged_config,):
        with pytest.raises(CheckpointError, match=message):
            build(text_config=text_config, naturelm_config=naturelm_config, tokenizer=tokens)


@pytest.mark.parametrize("template", ["no place", "{} and {}", 7])
def test_refuses_a_template_without_exactly_one_place(template: object) -> None:
    with pytest.raises(CheckpointError, match="prompt_template"):
        processor_config(text_config=LLAMA, naturelm_config=NATURELM | {"prompt_template": template}, tokenizer=LLAMA3)
