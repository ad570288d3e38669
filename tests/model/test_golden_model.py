"""The merged model against the reference's own logits and tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor, LlamaForCausalLM

import mergekit_bio
import mergekit_bio.model

ALPHAS = (0.0, 0.3, 0.5, 1.0)


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "vectors.safetensors")


@pytest.fixture(scope="module")
def facts(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "vectors.json").read_text())


@pytest.fixture(scope="module")
def directories(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    merged = mergekit_bio.merge(
        base=golden / "llama-tiny",
        adapter=golden / "naturelm-tiny",
        alphas=ALPHAS,
        out=tmp_path_factory.mktemp("golden") / "sweep",
        dtype="float32",
        device="cpu",
    )
    return dict(zip(ALPHAS, (checkpoint.path for checkpoint in merged), strict=True))


def inputs_for(processor: Any, vectors: dict, prompt: dict) -> Any:
    audios = [vectors["raw_wav"][index].double() for index in prompt["audio_indices"]]
    return processor(prompt["prompt"], audio=audios)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", ["single", "icl3"])
def test_last_logits_are_the_references(directories, vectors, facts, alpha: float, name: str) -> None:
    processor = AutoProcessor.from_pretrained(directories[alpha])
    model = AutoModelForMultimodalLM.from_pretrained(directories[alpha]).eval()
    expected = vectors[f"logits_last.{name}.alpha{alpha}"][: model.config.text_config.vocab_size]

    def last_logits(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits[0, -1]

    # The stored logits are of the reference's float32 filter bank, which differs from one processor to the next: by
    # 6e-3 for the second clip, and the reference's own logits with it, by 2e-4.
    inputs = inputs_for(processor, vectors, facts["prompts"][name])
    given = inputs | {"input_features": vectors["fbank"][facts["prompts"][name]["audio_indices"]]}
    assert (last_logits(**given) - expected).abs().max() < 2e-5

    # From the waveform we compute in float64, so what can be compared to the last digit is the reference's float64
    # prefix, put into the prompt by hand.
    embeds = vectors[f"inputs_embeds.{name}"].clone()
    for audio, (start, end) in zip(
        facts["prompts"][name]["audio_indices"], facts["prompts"][name]["audio_positions"], strict=True
    ):
        embeds[start:end] = vectors["prefix_f64in"][audio]
    own = last_logits(**inputs)
    assert (own - last_logits(inputs_embeds=embeds[None])).abs().max() < 2e-5
    assert (own - expected).abs().max() < (1e-4 if name == "single" else 1e-3)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_greedy_and_beam_tokens_are_the_references(directories, vectors, facts, alpha: float) -> None:
    processor = AutoProcessor.from_pretrained(directories[alpha])
    model = AutoModelForMultimodalLM.from_pretrained(directories[alpha]).eval()
    compared = 0
    for run in facts["generation"]["runs"] + facts["generation"]["eos_override_runs"]:
        if run["alpha"] != alpha:
            continue
        inputs = inputs_for(processor, vectors, facts["prompts"][run["prompt"]])
        for key, expected in run.items():
            if not key.startswith(("greedy_ids", "beam2_ids")):
                continue
            _, _, penalty = key.partition("_lp")
            generated = model.generate(
                **inputs,
                max_new_tokens=20,
                do_sample=False,
                num_beams=2 if "beam2" in key else 1,
                length_penalty=float(penalty or 1),
                eos_token_id=run.get("eos_token_id", facts["generation"]["eos_token_id"]),
                pad_token_id=facts["generation"]["pad_token_id_at_generate"],
            )
            assert generated[0, inputs["input_ids"].shape[1] :].tolist() == expected, (run["prompt"], key)
            compared += 1
    assert compared >= 4


def test_a_batch_of_different_prompts_gives_what_each_gives_alone(directories, vectors, facts) -> None:
    """Where the reference pads on the right and its shorter prompts turn to garbage."""
    processor = AutoProcessor.from_pretrained(directories[1.0])
    model = AutoModelForMultimodalLM.from_pretrained(directories[1.0]).eval()
    prompts = [facts["prompts"][name] for name in ("single", "icl3")]
    audios = [[vectors["raw_wav"][index].double() for index in prompt["audio_indices"]] for prompt in prompts]

    inputs = processor([prompt["prompt"] for prompt in prompts], audio=audios)
    generated = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=398)

    answers = generated[:, inputs["input_ids"].shape[1] :].tolist()
    runs = {run["prompt"]: run["greedy_ids"] for run in facts["generation"]["runs"] if run["alpha"] == 1.0}
    assert answers == [runs["single"], runs["icl3"]]


def test_a_fresh_process_needs_only_the_two_imports(directories, vectors, facts, tmp_path: Path) -> None:
    script = """
import sys, torch
import transformers, mergekit_bio.model
from safetensors.torch import load_file
given = load_file(sys.argv[2])
processor = transformers.AutoProcessor.from_pretrained(sys.argv[1])
model = transformers.AutoModelForMultimodalLM.from_pretrained(sys.argv[1])
inputs = processor(open(sys.argv[3]).read(), audio=list(given["audio"]))
ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, num_beams=2, pad_token_id=398)
print(ids[0, inputs["input_ids"].shape[1]:].tolist())
"""
    from safetensors.torch import save_file

    prompt = facts["prompts"]["icl3"]
    save_file({"audio": vectors["raw_wav"][prompt["audio_indices"]].double()}, tmp_path / "audio.safetensors")
    (tmp_path / "prompt").write_text(prompt["prompt"])
    arguments = [directories[0.5], tmp_path / "audio.safetensors", tmp_path / "prompt"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=os.environ
    )

    (run,) = [run for run in facts["generation"]["runs"] if (run["prompt"], run["alpha"]) == ("icl3", 0.5)]
    assert json.loads(done.stdout or "null") == run["beam2_ids"], done.stderr


def test_the_text_only_merge_is_a_plain_llama_with_the_same_logits(golden: Path, directories, tmp_path: Path) -> None:
    mergekit_bio.merge(
        base=golden / "llama-tiny",
        adapter=golden / "naturelm-tiny",
        alphas=[0.5],
        out=tmp_path / "text",
        dtype="float32",
        device="cpu",
        text_only=True,
    )
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "text")(ids).logits
        # With ears, the Llama in the directory is the same, whoever loads it.
        with_ears = AutoModelForMultimodalLM.from_pretrained(directories[0.5])(ids).logits
        as_llama = LlamaForCausalLM.from_pretrained(directories[0.5])(ids).logits

    assert with_ears.equal(plain)
    assert as_llama.equal(plain)


def test_the_prefix_of_a_merged_directory_is_the_originals(golden: Path, directories, vectors) -> None:
    original = mergekit_bio.AudioPrefix.from_pretrained(golden / "naturelm-tiny")
    merged = mergekit_bio.AudioPrefix.from_pretrained(directories[0.3])

    with torch.inference_mode():
        assert merged(vectors["raw_wav"]).equal(original(vectors["raw_wav"]))
