import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.audio.prompt import PromptTokenizer, render_prompt
from mergekit_bio.errors import PromptError

# Bytes for tokens: every piece's ids are plain to see.
BOS, AUDIO = 1000, 1001
tokenize = PromptTokenizer(
    encode=lambda text: [AUDIO if c == "\x01" else BOS if c == "\x02" else ord(c) for c in text],
    bos_token_id=BOS,
    audio_token_id=AUDIO,
)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [BOS, 97, 98]),
        ("a<AudioHere>b", [BOS, 97, AUDIO, 98]),
        ("<AudioHere>b", [BOS, AUDIO, 98]),
        ("a<AudioHere>", [BOS, 97, AUDIO]),
        ("<AudioHere><AudioHere>", [BOS, AUDIO, AUDIO]),
        ("\x02a", [BOS, 97]),
    ],
)
def test_one_bos_and_one_placeholder_a_slot(prompt: str, ids: list[int]) -> None:
    assert tokenize(prompt) == ids


def test_every_slot_is_as_long_as_its_audio() -> None:
    assert tokenize("a<AudioHere>b<AudioHere>", audio_lengths=[2, 3]) == [
        BOS,
        97,
        AUDIO,
        AUDIO,
        98,
        AUDIO,
        AUDIO,
        AUDIO,
    ]


@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1]])
def test_more_or_fewer_audios_than_slots_are_an_error(lengths: list[int]) -> None:
    with pytest.raises(PromptError, match=rf"2 audio slots.*{len(lengths)} audio"):
        tokenize("<AudioHere> or <AudioHere>", audio_lengths=lengths)


def test_an_empty_prompt_and_a_written_placeholder_are_errors() -> None:
    with pytest.raises(PromptError, match="empty"):
        tokenize(" \n")
    with pytest.raises(PromptError, match="placeholder token itself"):
        tokenize("a\x01b<AudioHere>")


def test_token_ids_are_the_references(golden: Path) -> None:
    tokenizer = Tokenizer.from_file(str(golden / "llama-tiny" / "tokenizer.json"))
    own = PromptTokenizer(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids, bos_token_id=389, audio_token_id=391
    )
    for prompt in json.loads((golden / "vectors.json").read_text())["prompts"].values():
        ids = own(prompt["prompt"], audio_lengths=[29] * len(prompt["audio_indices"]))

        expected = [prompt["bos_token_id"]]
        for number, part in enumerate(prompt["part_token_ids"]):
            expected += [391] * 29 * (number > 0) + part
        assert ids == expected
        assert len(ids) == prompt["sequence_length"]
        for start, end in prompt["audio_positions"]:
            assert set(ids[start:end]) == {391}


def test_an_instruction_without_a_slot_gets_the_references_lead() -> None:
    prompt = render_prompt("  What is it? ", template=LLAMA3_TEMPLATE, num_audios=1)

    assert prompt == (
        "<|start_header_id|>user<|end_header_id|>\n\n<Audio><AudioHere></Audio> What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_slots_that_are_written_are_left_as_they_are() -> None:
    instruction = "Audio: <Audio><AudioHere></Audio>\nLabel:"

    assert render_prompt(instruction, template="[{}]", num_audios=1) == f"[{instruction}]"


def test_text_without_audio_has_no_slot() -> None:
    assert render_prompt("Hello {name}", template="[{}]", num_audios=0) == "[Hello {name}]"


@pytest.mark.parametrize(
    ("instruction", "audios"), [("What?", 2), ("<AudioHere>", 2), ("<AudioHere>", 0), ("<AudioHere><AudioHere>", 1)]
)
def test_rendering_checks_the_audios_too(instruction: str, audios: int) -> None:
    with pytest.raises(PromptError, match="audio slot"):
        render_prompt(instruction, template="{}", num_audios=audios)


def test_an_empty_instruction_is_an_error() -> None:
    with pytest.raises(PromptError, match="empty"):
        render_prompt("  ", template=LLAMA3_TEMPLATE, num_audios=1)


@given(st.lists(st.text(alphabet="ab \n<>Audio", max_size=8), min_size=1, max_size=5))
def test_no_token_spans_a_slot(pieces: list[str]) -> None:
    prompt = "x" + "<AudioHere>".join(pieces)
    pieces = prompt.split("<AudioHere>")

    ids = tokenize(prompt)

    assert ids.count(AUDIO) == len(pieces) - 1
    assert "".join(chr(i) if i < BOS else "<AudioHere>" for i in ids[1:]) == prompt
