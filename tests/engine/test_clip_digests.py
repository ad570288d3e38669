"""What a clip's samples are is found once, and a damaged line is as good as none."""

import hashlib
import random
import subprocess
import sys

import pytest
import soundfile
import torch

from mergekit_bio.audio import recording
from mergekit_bio.engine.clip_digests import ClipDigests, clip_key

PLACE = {"start": 0.0, "end": 10.0, "seconds": 10.0}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_another_object_and_another_start_know_what_was_added(tmp_path):
    file = tmp_path / "prefixes/clips"
    first, other = ClipDigests(file), ClipDigests(file)
    assert other.get(sha("key")) is None
    first.add(sha("key"), sha("digest"))
    assert other.get(sha("key")) == ClipDigests(file).get(sha("key")) == sha("digest")
    other.add(sha("another"), sha("more"))
    assert first.get(sha("another")) == sha("more")


def test_without_a_file_they_are_remembered():
    digests = ClipDigests(None)
    digests.add("key", "digest")
    assert (digests.get("key"), digests.get("other")) == ("digest", None)


@pytest.mark.parametrize(
    "other",
    [
        clip_key(["a.wav", 2, 3], "id", **PLACE),
        clip_key(["a.wav", 1, 4], "id", **PLACE),
        clip_key(["b.wav", 1, 3], "id", **PLACE),
        clip_key(["a.wav", 1, 3], "other", **PLACE),
        clip_key(["a.wav", 1, 3], "id", "channel 1", **PLACE),
        *[clip_key(["a.wav", 1, 3], "id", **PLACE | {name: 5.0}) for name in PLACE],
    ],
)
def test_whatever_decides_the_samples_is_in_the_key(other):
    assert other != clip_key(["a.wav", 1, 3], "id", **PLACE) == clip_key(["a.wav", 1, 3], "id", **PLACE)


@pytest.mark.parametrize(
    ("module", "version"),
    [
        (recording, "_DECODER"),
        (soundfile, "__version__"),
        (soundfile, "__libsndfile_version__"),
        (torch, "__version__"),
    ],
)
def test_so_is_what_decodes_them(monkeypatch, module, version):
    before = clip_key("a.wav", **PLACE)
    monkeypatch.setattr(module, version, "another")
    recording.decoder.cache_clear()
    after = clip_key("a.wav", **PLACE)
    monkeypatch.undo()
    recording.decoder.cache_clear()
    assert after != before == clip_key("a.wav", **PLACE)


def test_a_line_that_was_cut_off_or_damaged_is_no_line_and_hides_no_other(tmp_path):
    known = {sha(f"key {n}"): sha(f"digest {n}") for n in range(40)}
    file, chance = tmp_path / "clips", random.Random(0)
    for key, digest in known.items():
        ClipDigests(file).add(key, digest)
        if chance.random() < 0.5:  # killed while it wrote
            line = f"{sha('cut')} {sha('off')} {sha('x')[:16]}\n"
            with file.open("a") as text:
                text.write(line[: chance.randrange(len(line))])
    read = ClipDigests(file)
    assert {key: read.get(key) for key in known} == known and read.get(sha("cut")) is None
    sound = file.read_bytes()
    for _ in range(200):
        broken = bytearray(sound)
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        file.write_bytes(broken)
        read = ClipDigests(file)
        found = {key: read.get(key) for key in known}
        assert sum(digest != known[key] for key, digest in found.items()) <= 1
        assert all(digest in (None, known[key]) for key, digest in found.items())


APPEND = """
import sys
from pathlib import Path
from mergekit_bio.engine.clip_digests import ClipDigests
digests = ClipDigests(Path(sys.argv[1]))
for n in range(2000):
    digests.add(f"{n:032x}" + sys.argv[2] * 32, sys.argv[2] * 64)
"""


def test_processes_append_to_one_file(tmp_path):
    file = tmp_path / "clips"
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, file, digit]) for digit in "abcd"]
    assert [writer.wait() for writer in writers] == [0] * 4
    read = ClipDigests(file)
    assert all(read.get(f"{n:032x}" + digit * 32) == digit * 64 for n in range(2000) for digit in "abcd")
