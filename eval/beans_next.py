"""A client of the predictions_v1 contract, as strict and as patient as beans-next's own; written from the contract.

    python eval/beans_next.py http://127.0.0.1:8000/predict FOLDER    # asks about every recording of a folder

It is not beans-next: that is a package of its own, which is not on PyPI. It asks what beans-next asks (``/health`` and
``/info`` at the root, batches as large as ``/info`` allows and 512 at most, whole files as base64 whatever they are,
``max_tokens``, ``temperature`` and ``max_length_seconds``, no key), and ends where beans-next ends: at any 4xx but 408
and 429, at an answer of another shape, at twelve failures in a row. Only the standard library is needed.
"""

import argparse
import base64
import json
import time
import urllib.error
import urllib.request
import wave
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

SCHEMA = "predictions_v1"
TIMEOUT, ATTEMPTS, LARGEST_BATCH = 120, 12, 512
_ITEM = {"sample_id": str, "predictions": list, "error": (str, type(None)), "finish_reason": (str, type(None))}
_ITEM |= {"usage": (dict, type(None)), "latency_sec": (int, float, type(None))}
#: One of its prompts of detection, which has a system turn.
_MESSAGES = [
    {"role": "system", "content": "You are an expert in bioacoustics."},
    {"role": "user", "content": "<Audio><AudioHere></Audio>\nWhat is the common name for the focal species?"},
]


class ContractBroken(Exception):
    """The server did what ends a run."""


def request(url: str, body: object = None) -> Any:
    """A request's JSON, asked again where beans-next asks again."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Accept": "application/json"} | ({} if body is None else {"Content-Type": "application/json"})
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise ContractBroken(f"{url}: status {error.code}: {error.read()[:500]!r}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            pass
        time.sleep(min(30.0, 0.5 * 2**attempt))
    raise ContractBroken(f"{url}: no answer after {ATTEMPTS} attempts")


def probe(predict_url: str) -> dict[str, Any]:
    """``/health``, and what ``/info`` says; both stand at the root."""
    request(urljoin(predict_url, "/health"))
    info = request(urljoin(predict_url, "/info"))
    texts = [info.get(key) for key in ("name", "model", "model_revision")]
    if SCHEMA not in info.get("schema_versions", ()) or not all(isinstance(text, str) for text in texts):
        raise ContractBroken(f"/info: {info}")
    return dict(info)


def predict(predict_url: str, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to a batch, in its order."""
    answer = request(predict_url, {"schema_version": SCHEMA, "requests": list(items)})
    if answer.keys() != {"schema_version", "responses"} or answer["schema_version"] != SCHEMA:
        raise ContractBroken(f"/predict: its keys are {sorted(answer)}")
    found = {one["sample_id"]: one for one in answer["responses"]}
    ids = [item["sample_id"] for item in items]
    if len(found) != len(answer["responses"]) or found.keys() != set(ids):
        raise ContractBroken("/predict: other sample_ids than were asked about")
    for one in found.values():
        wrong = [key for key, value in one.items() if key not in _ITEM or not isinstance(value, _ITEM[key])]
        if wrong or not (one.get("error") or (one["predictions"] and isinstance(one["predictions"][0], str))):
            raise ContractBroken(f"/predict: {wrong or one}")
    return [found[sample_id] for sample_id in ids]


def items(recordings: Sequence[Path], *, max_tokens: int) -> Iterator[dict[str, Any]]:
    """A recording each: the file as it is."""
    for recording in recordings:
        with wave.open(str(recording)) as file:
            rate = file.getframerate()
        data = base64.b64encode(recording.read_bytes()).decode()
        yield {
            "sample_id": recording.stem,
            "messages": _MESSAGES,
            "audio_inputs": [{"payload_type": "base64_wav", "data": data, "sample_rate": rate}],
            "generation_config": {"max_tokens": max_tokens, "temperature": 0.0, "max_length_seconds": 10},
        }


def conformance(predict_url: str) -> list[str]:
    """What the contract promises beside answers, each promise in words once it has held."""
    silence = {"payload_type": "base64_wav", "data": base64.b64encode(_silence()).decode(), "sample_rate": 16_000}
    good = {"messages": _MESSAGES, "audio_inputs": [silence], "generation_config": {"max_tokens": 3}}
    plain = {"messages": [{"role": "user", "content": "x"}], "audio_inputs": [silence], "generation_config": {}}
    bad = {"messages": [], "audio_inputs": [], "generation_config": {}}
    named = [{"sample_id": name, **item} for name, item in (("good", good), ("plain", plain), ("bad", bad))]
    held = []
    answers = predict(predict_url, named)
    if [bool(one.get("error")) for one in answers] == [False, False, True]:
        held.append("a bad item has an error of its own, the others their answers")
    most = probe(predict_url)["max_batch_size"]
    many = [{"sample_id": str(number), **good} for number in range(most + 1)]
    refused = {
        "the same sample_id twice is status 400": (400, {"schema_version": SCHEMA, "requests": [named[0], named[0]]}),
        "more items than max_batch_size are status 413": (413, {"schema_version": SCHEMA, "requests": many}),
        "another schema is status 422": (422, {"schema_version": "predictions_v2", "requests": []}),
        "what is no request is status 422": (422, []),
    }
    for promise, (status, body) in refused.items():
        try:
            request(predict_url, body)
        except ContractBroken as error:
            if f"status {status}:" in str(error):
                held.append(promise)
    if len(held) != 1 + len(refused):
        raise ContractBroken(f"only these held: {held}")
    return held


def _silence() -> bytes:
    """A millisecond of it: what beans-next sends to see whether a server answers."""
    import io

    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", ""))
        writer.writeframes(bytes(32))
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predict_url")
    parser.add_argument("recordings", type=Path, help="a folder of .wav files")
    parser.add_argument("--max-tokens", type=int, default=16)
    options = parser.parse_args()
    info = probe(options.predict_url)
    size = min(info["max_batch_size"], LARGEST_BATCH) if info.get("supports_batching") else 1
    print(f"{info['model']} ({info['model_revision']}): batches of {size}")
    for promise in conformance(options.predict_url):
        print(f"held: {promise}")
    recordings = sorted(options.recordings.glob("*.wav"))
    start, answers = time.perf_counter(), Counter[str]()
    for first in range(0, len(recordings), size):
        batch = list(items(recordings[first : first + size], max_tokens=options.max_tokens))
        for answer in predict(options.predict_url, batch):
            if answer.get("error"):
                raise ContractBroken(f"{answer['sample_id']}: {answer['error']}")
            answers[answer["predictions"][0]] += 1
    megabytes = sum(file.stat().st_size for file in recordings) / 1e6
    print(f"{answers.total()} of {len(recordings)} answered ({megabytes:.0f} MB of files) in "
          f"{time.perf_counter() - start:.1f} s; most often: {answers.most_common(1)[0][0]!r}")  # fmt: skip


if __name__ == "__main__":
    main()
