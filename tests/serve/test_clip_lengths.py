"""How long a clip is for the server: 10 s, or what ``/predict``'s max_length_seconds or a data URL says."""

import json

import openai
import pytest
from eval.test_clip_lengths import TOKENS, answers, write_recipe
from serve.requests_to_server import KEY, encoded
from serve.test_server import GREEDY, QUESTION, A, answered, chat, expected, item, predict, wav

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.http import HttpEngine
from mergekit_bio.engine.interface import Prompt
from mergekit_bio.eval.run.evaluate import evaluate


def clip(samples, seconds: float) -> Clip:
    return Clip.from_samples(samples / 2**15, sampling_rate=16_000, seconds=seconds)


def part(samples, seconds) -> dict:
    url = f"data:audio/wav;seconds={seconds};base64,{encoded(samples)}"
    return {"type": "audio_url", "audio_url": {"url": url}}


def test_predict_cuts_and_pads_to_what_the_item_says(http, engines, sounds):
    """One recording at several lengths in one batch, twice: what is remembered of one is not taken for another."""
    lengths = [3, None, 5, 10, 0.5, 3]
    prompts = [Prompt(QUESTION, [clip(sounds[3], 10 if length is None else length)]) for length in lengths]
    wanted = engines[A].generate(prompts, GREEDY)
    assert len({generation.logprobs for generation in wanted}) == 4
    items = [item(str(n), audios=[wav(sounds[3])], max_length_seconds=length) for n, length in enumerate(lengths)]
    for _ in range(2):
        entries = predict(http, *items).json()["responses"]
        assert [entry["predictions"] for entry in entries] == [[generation.text] for generation in wanted]
        assert [entry["usage"]["prompt_tokens"] for entry in entries] == [one.prompt_tokens for one in wanted]
    text = wanted[0].prompt_tokens - 8
    assert [one.prompt_tokens - text for one in wanted] == [8, 29, 14, 29, 1, 8]


def test_a_length_that_no_clip_has_is_its_items_error(http, sounds):
    bad = [0.49, 10.01, 0, -3, "3", True, [3], 1e400]
    items = [item(str(n), audios=[wav(sounds[0])], max_length_seconds=length) for n, length in enumerate(bad)]
    good = item("good", audios=[wav(sounds[0])], max_length_seconds=3)
    for start in range(0, len(items), 7):
        body = {"schema_version": "predictions_v1", "requests": [*items[start : start + 7], good]}
        response = http.post("/predict", content=json.dumps(body))  # which writes Infinity too
        *refused, answer = response.json()["responses"]
        assert response.status_code == 200 and answer["error"] is None and answer["predictions"]
        for entry in refused:
            assert entry["predictions"] == [] and "generation_config.max_length_seconds" in entry["error"]


def test_a_data_url_says_how_long_its_clip_is(client, engines, sounds):
    """Several lengths in one prompt, the same recording among them."""
    text = "Audio: <Audio><AudioHere></Audio>\nLabel: wren\n" * 3 + QUESTION
    heard = [(sounds[3], 3), (sounds[3], 10), (sounds[1], 5.5)]
    content = [{"type": "text", "text": text}, *(part(*one) for one in heard)]
    completion = chat(client, content)
    prompt = Prompt(text, [clip(*one) for one in heard])
    (wanted,) = engines[A].generate([prompt], GREEDY)
    assert (answered(completion), completion.usage.prompt_tokens) == (wanted.token_ids, wanted.prompt_tokens)
    as_ten = Prompt(text, [clip(samples, 10) for samples, _ in heard])
    assert wanted.token_ids != expected(engines[A], as_ten)


@pytest.mark.parametrize("seconds", ["0.4", "11", "nan", "three", ""])
def test_a_data_url_with_another_length_is_the_clients_error(client, sounds, seconds):
    with pytest.raises(openai.BadRequestError, match=r"seconds=|outside 0\.5 to 10 s"):
        chat(client, [part(sounds[0], seconds), {"type": "text", "text": QUESTION}])


def test_the_http_engine_says_how_long_its_clips_are(server, engines, sounds):
    clips = [clip(sounds[n], seconds) for n in (0, 3, 5) for seconds in (3, 5, 10, 7.123456789)]
    prompts = [Prompt(QUESTION, [one]) for one in clips]
    prompts.append(Prompt("<AudioHere> and <AudioHere> and <AudioHere>?", clips[:3]))
    ours = HttpEngine([server.url], api_key=KEY, model=A).generate(prompts, GREEDY)
    for one, other in zip(ours, engines[A].generate(prompts, GREEDY), strict=True):
        assert (one.token_ids, one.prompt_tokens) == (other.token_ids, other.prompt_tokens)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_run_over_http_asks_what_a_run_of_ones_own_asks(server, tmp_path):
    recipe = write_recipe(tmp_path, server.sweep[A])
    done = evaluate(recipe=recipe, out=tmp_path / "http", servers=[server.url], api_key=KEY)
    own = evaluate(recipe=recipe, out=tmp_path / "own", engine="transformers", engine_options={"device": "cpu"})
    found, wanted = answers(done), answers(own)
    assert wanted.keys() == TOKENS.keys()
    for name, rows in wanted.items():
        for seconds, row in rows.items():
            assert found[name][seconds].generated_ids == row.generated_ids
            assert found[name][seconds].prompt_tokens == row.prompt_tokens
