"""What a predictions_v1 request means: settings under beans-next's and Transformers' names, items that are wrong."""

import pytest

from mergekit_bio.errors import PromptError
from mergekit_bio.serve.predictions import BadRequest, GenerationConfig, Item, read_requests

HALF = "\ud800"


def decoding(**config):
    return GenerationConfig(**config).decoding(default_tokens=100, default_beams=2)


@pytest.mark.parametrize(
    ("config", "tokens", "temperature", "beams"),
    [
        ({}, 100, 0.0, 2),
        ({"max_tokens": 256, "temperature": 0.0, "max_length_seconds": None}, 256, 0.0, 2),
        ({"max_tokens": 256, "temperature": 0.7}, 256, 0.7, 1),
        ({"max_tokens": 256, "max_new_tokens": 3}, 3, 0.0, 2),
        ({"temperature": 0.7, "do_sample": False}, 100, 0.0, 2),
        ({"do_sample": True}, 100, 1.0, 1),
        ({"do_sample": True, "temperature": 0.0}, 100, 0.0, 2),
        ({"do_sample": True, "temperature": 0.3}, 100, 0.3, 1),
        ({"temperature": 1.0, "num_beams": 3}, 100, 0.0, 3),
        ({"num_beams": 1}, 100, 0.0, 1),
        (dict.fromkeys(GenerationConfig.model_fields), 100, 0.0, 2),
    ],
    ids=str,
)
def test_settings_go_by_both_names_and_what_is_not_said_is_the_servers(config, tokens, temperature, beams):
    """Two beams are its default, and a temperature above 0 asks for one that is sampled."""
    settings = decoding(**config)
    assert (settings.max_new_tokens, settings.temperature, settings.num_beams) == (tokens, temperature, beams)


def test_transformers_settings_reach_the_decoding():
    settings = decoding(num_beams=3, length_penalty=0.0, early_stopping="never")
    assert (settings.num_beams, settings.length_penalty, settings.early_stopping) == (3, 0.0, "never")
    settings = decoding(do_sample=True, top_p=0.5, top_k=7, seed=11)
    assert (settings.top_p, settings.top_k, settings.seed) == (0.5, 7, 11)


def item(sample_id="a", content="What?", **more):
    return {"sample_id": sample_id, "messages": [{"role": "user", "content": content}], **more}


def read(*items):
    return read_requests({"schema_version": "predictions_v1", "requests": list(items)}, max_batch=8)


def test_half_a_surrogate_pair_is_its_own_items_error():
    """JSON can write one; no tokenizer takes it, and no answer can hold it."""
    broken = [
        item("b", f"What{HALF}?"),
        item("c", audio_inputs=[{"payload_type": "file_path", "data": HALF}]),
        item("d", audio_inputs=[{"payload_type": HALF, "data": ""}]),
    ]
    (_, good), *bad = read(item("a", "Which frog 🐸?"), *broken)
    assert isinstance(good, Item)
    for _, error in bad:
        assert isinstance(error, str)
        error.encode()
    with pytest.raises(BadRequest, match="sample_id"):
        read(item(HALF))


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([], "at least 1 item"),
        (["wren", ""], "choices: number 2 is empty"),
        (["wren", " \n"], "choices: number 2 is empty"),
        (["wren", "owl", "wren"], "choices: 'wren' is there twice"),
        (["wren", 1], "choices.1: Input should be a valid string"),
        (["wren", None], "choices.1: Input should be a valid string"),
        (["wren", HALF], "choices.1: holds half of a surrogate pair"),
        ("wren, owl", "choices: Input should be a valid list"),
        ({"wren": "owl"}, "choices: Input should be a valid list"),
        ([str(n) for n in range(2001)], "at most 2000 items"),
        (["a" * 50_000, "b" * 50_001], "choices: have 100001 characters together; at most 100000 are taken"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_a_list_that_is_no_use_is_its_own_items_error(choices, said):
    (_, error), (_, good) = read(
        item("a", generation_config={"choices": choices}), item("b", generation_config={"choices": ["wren", "owl"]})
    )
    assert isinstance(error, str) and said in error and error.startswith("generation_config.choices")
    assert isinstance(good, Item) and good.generation_config.choices == ["wren", "owl"]
    assert isinstance(read(item(generation_config={"negligible_choices": 1.0}))[0][1], str)


def test_audios_without_a_slot_stand_before_the_users_words():
    wav = {"payload_type": "base64_wav", "data": "AA=="}
    messages = [{"role": "system", "content": "You listen."}, {"role": "user", "content": "What?"}]
    ((_, one),) = read({"sample_id": "a", "messages": messages, "audio_inputs": [wav, wav]})
    user = "<Audio><AudioHere></Audio> <Audio><AudioHere></Audio> What?"
    assert f"user<|end_header_id|>\n\n{user}<|eot_id|>" in one.prompt(system_turns="keep")


def test_system_turns_are_kept_or_dropped():
    """And the last user turn is not all that is kept: beans-next's prompts are one turn, others' may be several."""
    messages = [{"role": role, "content": f"{role}?"} for role in ("system", "user", "assistant", "user")]
    ((_, one),) = read({"sample_id": "a", "messages": messages})
    kept, dropped = (one.prompt(system_turns=choice) for choice in ("keep", "drop"))
    assert kept.startswith("<|start_header_id|>system<|end_header_id|>\n\nsystem?<|eot_id|>")
    assert dropped == kept.partition("<|eot_id|>")[2] and dropped.count("user?") == 2
    ((_, only),) = read({"sample_id": "a", "messages": messages[:1]})
    with pytest.raises(PromptError, match="the messages are empty"):
        only.prompt(system_turns="drop")
