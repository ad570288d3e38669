"""A merged multimodal model in vLLM, which reads the files by names of its own: a tiny Qwen2-Audio hears as PEFT's."""

import numpy as np
import pytest
import torch
import transformers
from merging.architectures import merge, rename, train, unmerged
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
PROMPT = "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>what is it?<|im_end|>\n<|im_start|>assistant\n"
SOUND = (0.3 * np.sin(0.2 * np.arange(16_000))).astype(np.float32)
RATE = 16_000
TOKENS = 24


def make_processor() -> transformers.Qwen2AudioProcessor:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    return transformers.Qwen2AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=8), fast)


def make_base(processor: transformers.Qwen2AudioProcessor) -> transformers.Qwen2AudioForConditionalGeneration:
    tokenizer = processor.tokenizer
    audio = transformers.Qwen2AudioEncoderConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8
    )
    text = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.3, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    token = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    config = transformers.Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_id=token)
    torch.manual_seed(0)
    return transformers.Qwen2AudioForConditionalGeneration(config)


@pytest.mark.long
def test_vllm_answers_about_a_sound_as_the_unmerged_model_does(tmp_path):
    from vllm import LLM, SamplingParams

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    processor = make_processor()
    processor.save_pretrained(base)
    make_base(processor).save_pretrained(base)
    rename(base / "model.safetensors", "language_model.model.model.", "language_model.model.")  # as on the hub
    settings = {"target_modules": ["q_proj", "v_proj", "fc1", "linear", "lm_head"]}
    train(transformers.Qwen2AudioForConditionalGeneration.from_pretrained(base), adapter, settings)
    merged = merge(base, adapter, tmp_path / "merged", dtype="keep")

    inputs = processor(text=PROMPT, audio=[SOUND], sampling_rate=RATE, return_tensors="pt")

    def answer(model) -> list[int]:
        tokens = model.eval().generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0]
        return tokens[inputs["input_ids"].shape[1] :].tolist()

    original = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(base)
    without = answer(original)
    expected = answer(unmerged(original, adapter))
    assert expected != without
    llm = LLM(
        str(merged), dtype="float32", enforce_eager=True, max_model_len=1024, limit_mm_per_prompt={"audio": 1},
        max_num_seqs=2,
    )  # fmt: skip
    request = {"prompt": PROMPT, "multi_modal_data": {"audio": [(SOUND, RATE)]}}
    (output,) = llm.generate(request, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected
