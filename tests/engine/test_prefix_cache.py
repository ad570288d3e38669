"""A clip goes through the tower once, whoever asks, however often, and a damaged file never gets into an answer."""

import os
import random
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine.starting import start_vllm
from safetensors.torch import load_file

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.engine.prefix_cache import PrefixCache, tower_digest
from mergekit_bio.engine.transformers import TransformersEngine


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


def test_what_is_forgotten_takes_no_memory_and_is_encoded_again(tower, clips):
    cache = PrefixCache(tower)
    first = cache(clips)
    cache.forget(clip.digest for clip in clips[1:])
    assert cache.held_bytes == first[0].nbytes and cache.known(clip.digest for clip in clips) == {clips[0].digest}
    again = cache(clips)
    assert cache.encoded == 2 * len(clips) - 1
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


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


def test_a_clip_is_decoded_for_its_digest_or_its_prefix_and_only_once(tower, clips):
    decoded = []

    def decode():
        decoded.append("clip 0")
        return clips[0].waveform

    cache = PrefixCache(tower)
    (prefix,) = cache([Clip(decode)])
    assert decoded == ["clip 0"]
    assert torch.equal(cache([Clip(decode, digest=clips[0].digest)])[0], prefix)
    assert decoded == ["clip 0"]
    assert torch.equal(PrefixCache(tower)([Clip(decode, digest=clips[0].digest)])[0], prefix)
    assert decoded == ["clip 0"] * 2


def test_a_later_run_reads_the_folder_and_another_tower_does_not(tower, clips, tmp_path):
    first = PrefixCache(tower, folder=tmp_path)
    prefixes = first(clips[:3])
    first.flush()
    later = PrefixCache(tower, folder=tmp_path)
    assert later.known(clip.digest for clip in clips) == {clip.digest for clip in clips[:3]}
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


def test_what_is_encoded_together_lies_in_one_file(tower, clips, tmp_path):
    cache = PrefixCache(tower, folder=tmp_path, batch_size=2)
    cache(clips)
    cache.flush()
    (file,) = tmp_path.rglob("*.safetensors")
    assert load_file(file).keys() == {clip.digest for clip in clips}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_prefixes_are_kept_in_llamas_dtype_rounded_once(tower, clips, tmp_path, dtype):
    exact = PrefixCache(tower)(clips[:2])
    for _ in range(2):  # encoded, then read
        cache = PrefixCache(tower, folder=tmp_path)
        cache.keep_in(dtype)
        for kept, prefix in zip(cache(clips[:2]), exact, strict=True):
            assert kept.dtype == (torch.float32 if dtype == torch.float64 else dtype)
            assert torch.equal(kept.to(dtype), prefix.to(dtype))
        cache.flush()
    assert cache.encoded == 0
    cache.keep_in(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
    cache(clips[:2])
    assert cache.encoded == 2  # of another dtype, they are others


def start_transformers(checkpoint, prefixes):
    return TransformersEngine(checkpoint, dtype="bfloat16", device="cpu", prefixes=prefixes)


def start_vllm_in_bfloat16(checkpoint, prefixes):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    return start_vllm(checkpoint, dtype="bfloat16", prefixes=prefixes)


@pytest.mark.parametrize("start", [start_transformers, start_vllm_in_bfloat16])
def test_bfloat16_answers_are_the_same_to_the_last_bit(tiny_sweep, tower, clips, start):
    """From prefixes in bfloat16, and from the same in float32, which the engine rounds."""
    engine = start(tiny_sweep[0.5], PrefixCache(tower))
    prompts, decoding = [Prompt("Which?", [clip]) for clip in clips], Decoding(max_new_tokens=5)
    answers = engine.generate(prompts, decoding)
    assert engine.prefixes.dtype == torch.bfloat16
    engine.prefixes = PrefixCache(tower)
    engine.load(tiny_sweep[1.0])
    engine.load(tiny_sweep[0.5])  # whatever vLLM keeps of the prompts is forgotten
    expected = engine.generate(prompts, decoding)
    assert engine.prefixes.dtype == torch.float32 and engine.prefixes.encoded == len(clips)
    engine.close()
    assert [(a.token_ids, a.logprobs) for a in answers] == [(a.token_ids, a.logprobs) for a in expected]


def kept(folder, clip):
    """The file that keeps a clip's prefix."""
    (file,) = (file for file in folder.rglob("*.safetensors") if clip.digest in load_file(file))
    return file


@pytest.mark.parametrize("harm", ["empty", "cut", "other clip", "garbage", "gone"])
def test_a_damaged_file_is_made_again(tower, clips, tmp_path, harm):
    cache = PrefixCache(tower, folder=tmp_path, batch_size=1)
    (right,) = cache(clips[:1])
    cache(clips[1:2])
    cache.flush()
    path = kept(tmp_path, clips[0])
    sound = path.read_bytes()
    broken = {
        "empty": b"",
        "cut": sound[:-40],
        "other clip": kept(tmp_path, clips[1]).read_bytes(),
        "garbage": os.urandom(200),
    }
    later = PrefixCache(tower, folder=tmp_path, batch_size=1)
    assert later.known([clips[0].digest])
    path.unlink() if harm == "gone" else path.write_bytes(broken[harm])
    for cache in (later, PrefixCache(tower, folder=tmp_path, batch_size=1)):  # has seen the sound file; has not
        assert torch.equal(cache(clips[:1])[0], right)
        cache.flush()
    assert later.encoded == 1
    healed = PrefixCache(tower, folder=tmp_path)
    assert torch.equal(healed(clips[:1])[0], right) and healed.encoded == 0


def test_no_flipped_bit_gets_into_a_prefix(tower, clips, tmp_path):
    cache = PrefixCache(tower, folder=tmp_path)
    cache.keep_in(torch.bfloat16)
    short = [Clip.from_samples(clip.waveform, sampling_rate=16_000, seconds=1) for clip in clips[:2]]
    right = cache(short)
    cache.flush()
    path = kept(tmp_path, short[0])
    sound, bits = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(sound[:8], "little")
    for place in [*bits.sample(range(header), 60), *bits.sample(range(header, len(sound)), 20)]:
        broken = bytearray(sound)
        broken[place] ^= 1 << bits.randrange(8)
        for file in path.parent.glob("*.safetensors"):
            file.unlink()
        path.write_bytes(broken)
        later = PrefixCache(tower, folder=tmp_path)
        later.keep_in(torch.bfloat16)
        assert all(torch.equal(*pair) for pair in zip(later(short), right, strict=True))
        later.flush()


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
encoded = 0
for number in range(len(clips)):
    cache = PrefixCache(tower, folder=Path(folder))
    cache(clips[:number + 1])
    encoded += cache.encoded
    cache.flush()
print(encoded)
"""


def test_a_clip_is_encoded_once_by_all_processes_that_share_a_folder(tower, clips, tiny_sweep, tmp_path_factory):
    folder, elsewhere = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("clips")
    torch.save([clip.waveform for clip in clips], elsewhere / "clips.pt")
    flags = [elsewhere / "first", elsewhere / "second"]
    inputs = [tiny_sweep[0.5], folder, elsewhere / "clips.pt"]
    workers = [
        subprocess.Popen([sys.executable, "-c", FILL, *inputs, *pair], stdout=subprocess.PIPE, text=True)
        for pair in (flags, flags[::-1])
    ]
    encoded = [int(worker.communicate()[0]) for worker in workers]
    assert sum(encoded) == len(clips)
    assert not list(folder.rglob("*.part"))
    cache = PrefixCache(tower, folder=folder)
    prefixes = cache(clips)
    assert cache.encoded == 0
    for clip, prefix in zip(clips, prefixes, strict=True):
        torch.testing.assert_close(prefix, by_hand(tower, clip), atol=1e-4, rtol=0)


HOLD = """
import sys, time
from pathlib import Path
from mergekit_bio.engine.prefix_folder import PrefixFolder
folder = PrefixFolder(Path(sys.argv[1]))
print(len(folder.claim([sys.argv[2]])), flush=True)
time.sleep(600)
"""


def test_the_clip_of_a_process_that_was_killed_is_encoded_by_another(tower, clips, tmp_path):
    cache = PrefixCache(tower, folder=tmp_path)
    cache(clips[2:3])
    cache.flush()
    (folder,) = tmp_path.iterdir()
    command = [sys.executable, "-c", HOLD, folder, clips[0].digest]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "1\n"
        with ThreadPoolExecutor(1) as beside:
            encoding = beside.submit(cache, clips[:2])
            while cache.encoded < 2:
                time.sleep(0.001)
            assert clips[0].digest not in cache.known([clips[0].digest])  # it is waited for
            holder.kill()
            prefixes = encoding.result()
    assert cache.encoded == 3
    torch.testing.assert_close(prefixes[0], by_hand(tower, clips[0]), atol=1e-4, rtol=0)


def test_a_disk_that_is_full_is_told_of_and_nothing_half_written_stays(tower, clips, tmp_path):
    cache = PrefixCache(tower, folder=tmp_path)
    assert cache.problem is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        prefixes = cache(clips[:2])
        cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (File too large)" in cache.problem
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["locks"]
    assert all(torch.equal(*pair) for pair in zip(cache(clips[:2]), prefixes, strict=True))
    assert cache.encoded == 2  # in memory they are at hand


def test_a_sweep_costs_the_tower_of_one_alpha(tiny_sweep, transformers_engine, tower, clips, monkeypatch):
    cache = PrefixCache(tower)
    monkeypatch.setattr(transformers_engine, "prefixes", cache)
    prompts = [Prompt("Which?", [clip]) for clip in clips]
    for alpha in (1.0, 0.0, 0.5):
        transformers_engine.load(tiny_sweep[alpha])
        transformers_engine.generate(prompts, Decoding(max_new_tokens=1))
    assert cache.encoded == len(clips)
