"""The vLLM model reads prompts as the processor does, and says what it needs where it cannot."""

import builtins
import sys

import pytest
import torch
from engine.test_engines_random import random_prompts

from mergekit_bio.engine.interface import Prompt
from mergekit_bio.engine.vllm.plugin import require_vllm
from mergekit_bio.errors import EngineError, MissingPackageError


def prompts_of_all_kinds(clips):
    """Slots at either end, next to each other and none; pieces that would be other tokens if joined."""
    odd = [
        Prompt("<AudioHere>?", clips[:1]),
        Prompt("Label:<AudioHere>", clips[:1]),
        Prompt("<Aud<AudioHere>io> mar<AudioHere>sh wren", clips[:2]),
        Prompt("a<AudioHere><AudioHere>x", clips[:2]),
        Prompt("no audio, <|eot_id|> special"),
    ]
    return odd + random_prompts(clips, 20, seed=9)


@pytest.mark.parametrize("how", ["token ids", "text"])
def test_prompt_tokens_are_the_processors(vllm_engine, clips, how):
    from vllm import SamplingParams

    processor = vllm_engine.tokenization.processor
    for prompt in prompts_of_all_kinds(clips):
        text = processor.render(prompt.text, num_audios=len(prompt.audios))
        wanted = processor(text, audio=[clip.waveform for clip in prompt.audios] or None)["input_ids"][0].tolist()
        if how == "token ids":
            request = vllm_engine._request(prompt, room=1)
        else:
            request = {"prompt": processor.tokenizer.bos_token + text}
            if prompt.audios:
                request["multi_modal_data"] = {"audio": [clip.waveform.numpy() for clip in prompt.audios]}
        (output,) = vllm_engine._llm.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)
        assert output.prompt_token_ids == wanted, prompt.text


def test_audio_at_another_rate_is_resampled_as_everywhere_else(vllm_engine, clips):
    """Not with vLLM's own resampler, which has another filter."""
    from vllm import SamplingParams

    from mergekit_bio.audio.clip import Clip

    generator = torch.Generator().manual_seed(3)
    samples = (torch.rand(2 * 44100, 2, generator=generator) - 0.5).double()
    ids = vllm_engine.tokenization.prompt_ids(Prompt("What?", clips[:1]), expanded=False)
    logprobs = []
    for audio in [(samples.numpy(), 44100), Clip.from_samples(samples, sampling_rate=44100).waveform.numpy()]:
        request = {"prompt_token_ids": ids, "multi_modal_data": {"audio": [audio]}}
        (output,) = vllm_engine._llm.generate([request], SamplingParams(temperature=0, max_tokens=1, logprobs=5))
        logprobs.append({token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()})
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-6)


@pytest.mark.parametrize(
    ("audios", "message"),
    [
        ([torch.zeros(16000).numpy()] * 2, "3 audio slots"),
        ([torch.zeros(100).numpy()], "too short"),
        ([torch.full((16000,), float("nan")).numpy()], "NaN"),
        ([torch.zeros(30, 64)] * 3, "has 30 tokens"),
    ],
    ids=["number", "short", "NaN", "prefix"],
)
def test_audios_that_do_not_fit_are_refused(vllm_engine, audios, message):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    request = {"prompt": "<AudioHere> <AudioHere> <AudioHere>", "multi_modal_data": {"audio": audios}}
    with pytest.raises(VLLMValidationError, match=message):
        vllm_engine._llm.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)


def test_without_vllm_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_vllm(name, *arguments, **named):
        if name.split(".")[0] == "vllm":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_vllm)
    with pytest.raises(MissingPackageError, match=r"pip install 'mergekit-bio\[vllm\]' \(without a GPU"):
        require_vllm()


def test_another_release_of_vllm_is_refused_by_name(monkeypatch):
    version = type(sys)("vllm.version")
    version.__version__ = "0.33.1"
    monkeypatch.setitem(sys.modules, "vllm.version", version)
    with pytest.raises(EngineError, match=r"vLLM 0\.33\.1 is installed, but mergekit-bio works with vLLM 0\.32"):
        require_vllm()
