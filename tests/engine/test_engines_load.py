"""A running engine moves between the alphas of a sweep and is then what a fresh one would be."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from engine.starting import merge_sweep, start_vllm
from engine.test_engines_random import assert_same_generations, random_prompts
from tiny_naturelm import make_base, make_naturelm

from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.engine.interface import Decoding, EngineSettings, Prompt
from mergekit_bio.engine.prefix_cache import PrefixCache
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.engine.sweep import difference
from mergekit_bio.engine.transformers import TransformersEngine
from mergekit_bio.errors import CheckpointError, EngineError

DECODING = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def prompts(clips):
    """Over 300 tokens, with a beginning in common that spans whole cache blocks."""
    (head,) = random_prompts(clips, 1, seed=5, words=(60, 60), audios=(3, 3))
    tails = random_prompts(clips, 4, seed=6, words=(10, 30), audios=(1, 1))
    return [Prompt(head.text + tail.text, (*head.audios, *tail.audios)) for tail in tails]


@pytest.fixture(scope="module")
def fresh(tiny_sweep, prompts):
    """What an engine that never ran anything else answers."""
    return {
        alpha: TransformersEngine(path, device="cpu").generate(prompts, DECODING) for alpha, path in tiny_sweep.items()
    }


def test_there_and_back_equals_a_fresh_engine(tiny_sweep, vllm_engine, prompts, fresh):
    assert min(generation.prompt_tokens for generation in fresh[0.5]) > 300
    assert len({generation.token_ids for runs in fresh.values() for generation in runs}) > len(prompts)
    for alpha in (0.5, 1.0, 0.0, 1.0, 0.5):
        vllm_engine.load(tiny_sweep[alpha])
        assert_same_generations(vllm_engine.generate(prompts, DECODING), fresh[alpha])


def test_transformers_moves_too(tiny_sweep, prompts, fresh):
    engine = TransformersEngine(tiny_sweep[0.5], device="cpu")
    for alpha in (1.0, 0.0, 0.5):
        engine.load(tiny_sweep[alpha])
        assert_same_generations(engine.generate(prompts, DECODING), fresh[alpha], tolerance=1e-6)


def test_load_replaces_the_folded_tensors_only_and_says_so(tiny_sweep, vllm_engine, transformers_engine):
    loaded = [engine.load(tiny_sweep[1.0]) for engine in (vllm_engine, transformers_engine)]
    back = [engine.load(tiny_sweep[0.5]) for engine in (vllm_engine, transformers_engine)]
    names = difference(tiny_sweep[0.5], tiny_sweep[1.0]).names
    assert sorted({name.split("self_attn.")[1] for name in names}) == [f"{kind}_proj.weight" for kind in "koqv"]
    assert len(names) == 8
    assert loaded[0] == loaded[1] != back[0] == back[1]


def test_staying_is_loading_nothing(tiny_sweep, vllm_engine):
    assert difference(tiny_sweep[0.5], tiny_sweep[0.5]).names == ()
    assert vllm_engine.load(tiny_sweep[0.5]) == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("which", ["vllm_engine", "transformers_engine"])
def test_tampered_weights_are_refused_and_the_sound_ones_stay(request, which, tiny_sweep, prompts, fresh, tmp_path):
    engine = request.getfixturevalue(which)
    copy = tmp_path / "alpha"
    shutil.copytree(tiny_sweep[1.0], copy)
    manifest = json.loads((copy / "merge.json").read_text())
    name = difference(tiny_sweep[0.5], tiny_sweep[1.0]).names[0]
    manifest["tensors"][name]["sha256"] = "0" * 64
    (copy / "merge.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match=r"is not what merge\.json records"):
        engine.load(copy)
    assert engine.checkpoint == tiny_sweep[0.5]
    assert_same_generations(engine.generate(prompts, DECODING), fresh[0.5])


def test_a_checkpoint_of_another_sweep_is_refused(tiny_sweep, transformers_engine, tmp_path):
    base = make_base(tmp_path / "base", seed=3)
    other = merge_sweep(base, make_naturelm(tmp_path / "naturelm"), tmp_path / "out", (0.5,))[0.5]
    with pytest.raises(EngineError, match=r"not merged from the same base"):
        transformers_engine.load(other)
    with pytest.raises(EngineError, match=r"no merge\.json"):
        transformers_engine.load(base)
    with pytest.raises(CheckpointError, match="is not a merged model with an audio tower"):
        TransformersEngine(base)


def test_an_engine_needs_room_for_the_prompt(vllm_engine, clips):
    from mergekit_bio.errors import PromptError

    with pytest.raises(PromptError, match="raise max_model_len"):
        vllm_engine.generate([Prompt("frog " * 4000)], DECODING)
    with pytest.raises(PromptError, match="raise max_audios"):
        vllm_engine.generate([Prompt("a<AudioHere>" * 7, clips[:1] * 7)], DECODING)


class FailingReads:
    """Reading a checkpoint's tensors fails as a disk fails: from the n-th read on, in the folders that are named."""

    def __init__(self, monkeypatch):
        self.left: dict[Path, int] = {}
        read = Checkpoint.read

        def failing(checkpoint, name):
            if checkpoint.root in self.left:
                self.left[checkpoint.root] -= 1
                if self.left[checkpoint.root] < 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(checkpoint, name)

        monkeypatch.setattr(Checkpoint, "read", failing)


@pytest.fixture
def failing_reads(monkeypatch) -> FailingReads:
    return FailingReads(monkeypatch)


@pytest.mark.parametrize("read_well", [0, 1, 6])
def test_an_error_while_loading_leaves_the_weights_of_before(
    read_well, tiny_sweep, transformers_engine, prompts, fresh, failing_reads
):
    failing_reads.left[tiny_sweep[1.0]] = read_well
    with pytest.raises(EngineError, match=r"alpha-1\.00: its weights could not be loaded \(.*Input/output error\)"):
        transformers_engine.load(tiny_sweep[1.0])
    assert transformers_engine.checkpoint == tiny_sweep[0.5]
    assert_same_generations(transformers_engine.generate(prompts, DECODING), fresh[0.5])


def test_after_an_error_a_slot_answers_from_the_right_weights(tiny_sweep, prompts, fresh, failing_reads):
    with EngineSlot(TransformersEngine, EngineSettings(options={"device": "cpu"})) as slot:
        slot.at(tiny_sweep[0.5])
        failing_reads.left |= {tiny_sweep[1.0]: 6, tiny_sweep[0.5]: 3}  # nor can it go back
        with pytest.raises(EngineError, match=r"alpha-1\.00: its weights could not be loaded"):
            slot.at(tiny_sweep[1.0])
        failing_reads.left.clear()
        assert_same_generations(slot.at(tiny_sweep[0.5]).generate(prompts, DECODING), fresh[0.5])
        assert_same_generations(slot.at(tiny_sweep[1.0]).generate(prompts, DECODING), fresh[1.0], tolerance=1e-6)


def test_a_second_engine_in_the_process_works_and_survives_errors_while_loading(
    tiny_sweep, prompts, fresh, failing_reads
):
    engine = start_vllm(
        tiny_sweep[1.0],
        prefixes=PrefixCache.of_checkpoint(tiny_sweep[1.0], device="cpu"),
        structured_outputs_config={"backend": "guidance"},
    )
    # Whoever brings prefixes has a tower; vLLM needs none.
    assert engine._llm.apply_model(lambda model: sum(part.numel() for part in model.audio_prefix.parameters())) == [0]
    assert_same_generations(engine.generate(prompts[:2], DECODING), fresh[1.0][:2])
    for read_well in (1, 6):  # in the middle of a fused parameter; in the second layer
        failing_reads.left[tiny_sweep[0.0]] = read_well
        with pytest.raises(EngineError, match=r"alpha-0\.00: its weights could not be loaded \(.*Input/output error\)"):
            engine.load(tiny_sweep[0.0])
        assert_same_generations(engine.generate(prompts, DECODING), fresh[1.0])
    failing_reads.left.clear()
    engine.load(tiny_sweep[0.0])
    assert_same_generations(engine.generate(prompts, DECODING), fresh[0.0])
    engine.close()
    engine.close()  # nothing more to do
