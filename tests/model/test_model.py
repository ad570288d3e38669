"""What a user of Transformers expects of the merged model, on a self-made one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.errors import CheckpointError, PromptError
from mergekit_bio.model.loading import load_model
from mergekit_bio.model.modeling import NatureLMAudioForConditionalGeneration


@pytest.fixture(scope="module")
def processor(merged: Path) -> Any:
    return AutoProcessor.from_pretrained(merged)


@pytest.fixture(scope="module")
def model(merged: Path) -> Any:
    return AutoModelForMultimodalLM.from_pretrained(merged, dtype=torch.float32).eval()


def audio(seed: int = 0, seconds: float = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(round(seconds * 16_000), dtype=torch.float64, generator=generator) - 0.5


def tensors_on_disk(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("shard_size", ["50GB", "40KB"])
def test_save_and_load_round_trip_bit_exactly(merged: Path, tmp_path: Path, shard_size: str) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(merged)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard_size)

    before, after = tensors_on_disk(merged), tensors_on_disk(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > (shard_size == "40KB")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.equal(after[name]), name
    config, again = (json.loads((p / "config.json").read_text()) for p in (merged, tmp_path / "again"))
    assert again["audio_config"] == config["audio_config"]
    assert again["model_type"] == "naturelm_audio"


def test_the_processor_round_trips(merged: Path, processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)

    prompt = processor.render("What is it?")
    first, second = processor(prompt, audio=audio()), again(prompt, audio=audio())
    assert first["input_ids"].equal(second["input_ids"])
    assert first["input_features"].equal(second["input_features"])


@pytest.mark.parametrize(("option", "dtype"), [({}, torch.bfloat16), ({"dtype": torch.float32}, torch.float32)])
def test_llama_has_the_dtype_asked_for_and_the_tower_stays_float32(merged: Path, option: dict, dtype: Any) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(merged, **option)

    assert model.dtype == model.lm_head.weight.dtype == dtype
    assert {p.dtype for p in model.audio_prefix.parameters()} == {torch.float32}


def test_torch_dtype_and_device_map_work(merged: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged, torch_dtype="float16", device_map={"": "cpu"})

    assert isinstance(model, NatureLMAudioForConditionalGeneration)
    assert model.dtype == torch.float16


def test_bf16_generates(merged: Path, processor: Any) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(merged)
    inputs = processor(processor.render("What is it?"), audio=audio())

    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 4


@torch.no_grad()
def test_the_prefix_stands_where_the_slot_is(model: Any, processor: Any, merged: Path) -> None:
    inputs = processor("ab<AudioHere>c", audio=audio())

    ids = inputs["input_ids"][0]
    assert (ids == model.config.audio_token_id).nonzero().flatten().tolist() == list(range(3, 32))
    embeds = model.embed(**{key: inputs[key] for key in ("input_ids", "input_features")})
    from mergekit_bio.audio.waveform import prepare

    expected = AudioPrefix.from_pretrained(merged)(prepare(audio())[None])
    assert (embeds[:, 3:32] - expected).abs().max() < 1e-5
    assert embeds[:, :3].equal(model.model.embed_tokens(inputs["input_ids"][:, :3]))


@torch.no_grad()
def test_forward_without_generate_sees_the_audio_and_trains(model: Any, processor: Any) -> None:
    prompt = processor.render("What is it?")
    one, two = processor(prompt, audio=audio(1)), processor(prompt, audio=audio(2))

    assert not torch.allclose(model(**one).logits, model(**two).logits, atol=1e-3)
    with torch.enable_grad():
        loss = model(**one, labels=one["input_ids"]).loss
        loss.backward()
    assert model.audio_prefix.audio_llama_proj.weight.grad.any()
    model.zero_grad()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_beams": 1}])
def test_a_batch_gives_what_its_prompts_give_alone(model: Any, processor: Any, options: dict) -> None:
    prompts = ["<AudioHere>", "A longer prompt, <AudioHere> and <AudioHere>, ends here:", "no audio at all"]
    audios = [[audio(1)], [audio(2), audio(3, seconds=11)], []]
    options = {"max_new_tokens": 8, "do_sample": False} | options

    def generate(prompts: list[str], audios: list) -> list[list[int]]:
        torch.manual_seed(0)
        inputs = processor(prompts, audio=audios)
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()

    together = generate(prompts, audios)

    assert all(len(row) == 8 or processor.tokenizer.eos_token_id in row for row in together)
    if not options["do_sample"]:
        pad = processor.pad_token_id
        for prompt, own, row in zip(prompts, audios, together, strict=True):
            (alone,) = generate([prompt], [own])
            assert row[: len(alone)] == alone
            assert set(row[len(alone) :]) <= {pad}


def test_the_audios_are_encoded_once_however_many_beams(model: Any, processor: Any) -> None:
    sizes: list[int] = []
    handle = model.audio_prefix.beats.register_forward_hook(lambda _m, _a, out: sizes.append(len(out)))

    model.generate(**processor("<AudioHere>?", audio=audio()), num_beams=4, max_new_tokens=5, do_sample=False)
    handle.remove()

    assert sizes == [1]


@pytest.mark.parametrize(
    ("prompts", "audios"),
    [
        ("<AudioHere>", []),
        ("no slot", [audio()]),
        ("<AudioHere> <AudioHere>", [audio()]),
        (["<AudioHere>", "a"], [[], [audio()]]),
        (["<AudioHere>", "a"], [[audio()]]),
        ("", []),
    ],
)
def test_prompts_and_audios_must_fit(processor: Any, prompts: Any, audios: Any) -> None:
    with pytest.raises(PromptError):
        processor(prompts, audio=audios)


def test_a_typed_placeholder_breaks_nothing(processor: Any, model: Any) -> None:
    with pytest.raises(PromptError, match="write <AudioHere> instead"):
        processor("<|reserved_special_token_0|> <AudioHere>", audio=audio())
    with pytest.raises(PromptError, match="1 audio placeholders"):
        model(
            torch.tensor([[model.config.bos_token_id, model.config.audio_token_id]]),
            input_features=torch.zeros(1, 998, 128),
        )


def test_any_sampling_rate_and_a_flat_list_of_audios(processor: Any) -> None:
    stereo = torch.rand(2, 44_100, dtype=torch.float64) - 0.5

    inputs = processor(["<AudioHere>", "a<AudioHere>"], audio=[stereo, stereo], sampling_rate=44_100)

    assert inputs["input_features"].shape == (2, 998, 128)
    assert inputs["attention_mask"].tolist() == [[0] + [1] * 30, [1] * 31]


def test_chat_messages_become_the_references_prompt(processor: Any) -> None:
    content = [{"type": "audio", "audio": audio().numpy()}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]

    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)

    assert text == processor.render("What is it?")
    assert inputs["input_ids"].equal(processor(text, audio=audio())["input_ids"])


def test_unknown_options_are_not_swallowed(processor: Any) -> None:
    with pytest.raises(TypeError, match="truncatoin"):
        processor("a", truncatoin=True)


def test_strict_loading_names_the_tensor(merged: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = AutoModelForMultimodalLM.from_pretrained(merged)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(merged).save_pretrained(tmp_path)
    load_model(tmp_path, device="cpu")
    held = load_file(tmp_path / "model.safetensors")
    del held["audio_prefix.ln_audio.weight"]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"missing keys: audio_prefix\.ln_audio\.weight"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, mergekit_bio.model",
        "import mergekit_bio.model, transformers",
        "import mergekit_bio.model.processing, transformers",
    ],
)
def test_importing_the_models_package_registers_it(merged: Path, imports: str) -> None:
    script = f"{imports}\nprint(type(transformers.AutoConfig.from_pretrained({str(merged)!r})).__name__)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert (done.stdout.strip(), done.stderr) == ("NatureLMAudioConfig", "")


def test_importing_the_package_leaves_python_s_imports_alone() -> None:
    script = "import sys; before = list(sys.meta_path); import mergekit_bio; print(sys.meta_path == before)"

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "True"


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import mergekit_bio, sys; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_config_made_by_hand_makes_a_model(merged: Path) -> None:
    config = AutoConfig.from_pretrained(merged)

    model = NatureLMAudioForConditionalGeneration(config)

    assert model.audio_prefix.config == config.audio_prefix_config
    assert all(parameter.isfinite().all() for parameter in model.parameters())
