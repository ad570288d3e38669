"""A clip goes through the tower once, whoever asks, however often, and a damaged file never gets into an answer."""

import os
import subprocess
import sys

import pytest
import torch

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.engine.prefix_cache import PrefixCache, tower_digest


@pytest.fixture(scope="module")
def tower(tiny_sweep):
    return AudioPrefix.from_pretrained(tiny_sweep[0.5])


def by_hand(tower, clip):
    with torch.no_grad():
        return tower(clip.waveform[None])[0]


def test_each_clip_is_encoded_once_and_right(tower, clips):
    cache = PrefixCache(tower, batch_size=2)
    prefixes = cache([clips[0], clips[1], clips[0], clips[2]])
    assert cache.encoded == 3
    for clip, prefix in zip([clips[0], clips[1], clips[0], clips[2]], prefixes, strict=True):
        torch.testing.assert_close(prefix, by_hand(tower, clip), atol=1e-4, rtol=0)
    again = cache([clips[2], clips[1]])
    assert cache.encoded == 3
    assert torch.equal(again[0], prefixes[3]) and torch.equal(again[1], prefixes[1])


def test_clips_that_differ_in_one_sample_in_the_middle_are_two(tower, clips):
    waveform = clips[4].waveform.clone()
    waveform[70_000] += 1e-9
    other = Clip(waveform)
    assert other.digest != clips[4].digest
    cache = PrefixCache(tower)
    cache([clips[4], other])
    assert cache.encoded == 2


def test_memory_keeps_to_its_budget_and_drops_the_least_recently_used(tower, clips):
    size = by_hand(tower, clips[0]).nbytes
    cache = PrefixCache(tower, memory_bytes=2 * size)
    cache(clips[:2])
    cache(clips[:1])
    cache(clips[2:3])  # drops clip 1
    assert cache.held_bytes == 2 * size and cache.encoded == 3
    cache([clips[0], clips[2]])
    assert cache.encoded == 3
    cache([clips[1]])
    assert cache.encoded == 4
    tiny = PrefixCache(tower, memory_bytes=1)
    tiny(clips[:1])
    assert tiny.held_bytes == 0


def test_a_later_run_reads_the_folder_and_another_tower_does_not(tower, clips, tmp_path):
    first = PrefixCache(tower, folder=tmp_path)
    prefixes = first(clips[:3])
    later = PrefixCache(tower, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(later(clips[:3]), prefixes, strict=True))
    assert later.encoded == 0
    other = AudioPrefix(tower.config).eval()
    other.load_state_dict(tower.state_dict())
    assert tower_digest(other) == tower_digest(tower)
    with torch.no_grad():
        other.audio_llama_proj.bias[0] += 1e-3
    changed = PrefixCache(other, folder=tmp_path)
    changed(clips[:3])
    assert changed.encoded == 3


def kept(folder, clip):
    """The file that keeps a clip's prefix."""
    (file,) = folder.rglob(f"{clip.digest}.safetensors")
    return file


@pytest.mark.parametrize("harm", ["empty", "cut", "bit", "other clip", "garbage"])
def test_a_damaged_file_is_made_again(tower, clips, tmp_path, harm):
    cache = PrefixCache(tower, folder=tmp_path, batch_size=1)
    (right,) = cache(clips[:1])
    cache(clips[1:2])
    path = kept(tmp_path, clips[0])
    sound = path.read_bytes()
    broken = {
        "empty": b"",
        "cut": sound[:-40],
        "bit": sound[:-1] + bytes([sound[-1] ^ 1]),
        "other clip": kept(tmp_path, clips[1]).read_bytes(),
        "garbage": os.urandom(200),
    }[harm]
    path.write_bytes(broken)
    later = PrefixCache(tower, folder=tmp_path, batch_size=1)
    assert torch.equal(later(clips[:1])[0], right)
    assert later.encoded == 1
    healed = PrefixCache(tower, folder=tmp_path)
    assert torch.equal(healed(clips[:1])[0], right) and healed.encoded == 0


FILL = """
import sys, time, torch
from pathlib import Path
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.prefix_cache import PrefixCache
checkpoint, folder, waveforms, ready, other = sys.argv[1:]
tower, clips = AudioPrefix.from_pretrained(checkpoint), [Clip(waveform) for waveform in torch.load(waveforms)]
Path(ready).touch()
while not Path(other).exists():
    time.sleep(0.001)
for _ in range(3):
    PrefixCache(tower, folder=Path(folder))(clips)
"""


def test_processes_share_a_folder(tower, clips, tiny_sweep, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("shared")
    torch.save([clip.waveform for clip in clips], elsewhere / "clips.pt")
    flags = [elsewhere / "first", elsewhere / "second"]
    inputs = [tiny_sweep[0.5], tmp_path, elsewhere / "clips.pt"]
    workers = [subprocess.Popen([sys.executable, "-c", FILL, *inputs, *pair]) for pair in (flags, flags[::-1])]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert not list(tmp_path.rglob("*.part"))
    cache = PrefixCache(tower, folder=tmp_path)
    prefixes = cache(clips)
    assert cache.encoded == 0
    for clip, prefix in zip(clips, prefixes, strict=True):
        torch.testing.assert_close(prefix, by_hand(tower, clip), atol=1e-4, rtol=0)


def test_a_sweep_costs_the_tower_of_one_alpha(tiny_sweep, transformers_engine, tower, clips, monkeypatch):
    cache = PrefixCache(tower)
    monkeypatch.setattr(transformers_engine, "prefixes", cache)
    prompts = [Prompt("Which?", [clip]) for clip in clips]
    for alpha in (1.0, 0.0, 0.5):
        transformers_engine.load(tiny_sweep[alpha])
        transformers_engine.generate(prompts, Decoding(max_new_tokens=1))
    assert cache.encoded == len(clips)
