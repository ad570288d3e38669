"""The dial: an engine with LoRA slots answers at every strength as the float32 merge at that strength does."""

import itertools
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine.starting import merge_sweep, start_vllm
from engine.test_beams import AsyncClient, ask_online
from engine.test_engines_random import random_prompts
from engine.widened_heads import widened_copy
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from tiny_naturelm import make_base, make_naturelm

from mergekit_bio import demo
from mergekit_bio.engine.interface import Decoding
from mergekit_bio.engine.transformers import TransformersEngine
from mergekit_bio.engine.vllm.dial import LISTED, Dial, SlotAdapter, parse_strength, write_strength
from mergekit_bio.serve.dial import DialRequest, prepared_dial

DEMO = Path(demo.__file__).parent / "model"
GREEDY, BEAMS = Decoding(max_new_tokens=12), Decoding(max_new_tokens=8, num_beams=2)


@pytest.fixture
def sources(request, tmp_path):
    """A base and its NatureLM-audio."""
    if request.param == "demo":
        return DEMO / "base", DEMO / "adapter"
    if request.param == "tiny":
        base = make_base(tmp_path / "base")
        return base, make_naturelm(tmp_path / "naturelm", base=base)
    golden = request.getfixturevalue("golden")
    base = widened_copy(golden / "llama-tiny", tmp_path / "base")
    return base, widened_copy(golden / "naturelm-tiny-trained-only", tmp_path / "naturelm")


@pytest.mark.parametrize(
    ("sources", "slots"),
    [
        pytest.param("tiny", 4, id="more strengths than slots"),
        pytest.param("golden", 11, id="as many strengths as slots, the reference's model", marks=pytest.mark.long),
        pytest.param("demo", 12, id="the demo's model", marks=pytest.mark.soak),
    ],
    indirect=["sources"],
)
def test_eleven_strengths_at_once_are_eleven_merges(sources, slots, clips, tmp_path):
    """Greedy and with two beams, all strengths in one batch; three times, so that slots are used again."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    base, adapter = sources
    strengths = [n / 10 for n in range(11)]
    merges = merge_sweep(base, adapter, tmp_path / "merged", strengths)
    prompts = random_prompts(clips, 33, seed=4, words=(5, 60), audios=(1, 4))
    asked = list(zip(prompts, itertools.cycle(strengths)))
    wanted = {}
    for strength, path in merges.items():
        merged, own = TransformersEngine(path, device="cpu"), [n for n, (_, at) in enumerate(asked) if at == strength]
        for decoding in (GREEDY, BEAMS):
            answers = merged.generate([prompts[n] for n in own], decoding)
            wanted |= {(n, decoding): answer.token_ids for n, answer in zip(own, answers, strict=True)}
    with prepared_dial(DialRequest(base, adapter)) as files:
        dial = Dial([files.name], files.adapters, default=500, aliases={})
        engine = start_vllm(
            files.model,
            dtype="float32",
            enable_lora=True,
            max_loras=slots,
            max_cpu_loras=max(6, slots),
            max_lora_rank=files.slots.slot_rank,
            lora_target_modules=files.slots.vllm_layers,
        )
        adapters = [dial[f"{files.name}@{strength:g}"] for _, strength in asked]
        for decoding in (GREEDY, BEAMS, GREEDY):
            found = ask_online(engine, prompts, decoding, client=AsyncClient(engine), adapters=adapters)
            assert [one.token_ids for one in found] == [wanted[n, decoding] for n in range(len(asked))]
        engine.close()
    assert len({wanted[n, GREEDY] for n in range(len(asked))}) > 11  # strengths and prompts matter


def test_a_name_is_one_adapter_however_its_strength_is_written(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    SlotAdapter({"model.layers.1.self_attn.q_proj": (8, 2.0)}).save(tmp_path)
    dial = Dial(["lm", "other", "alpha-0.40"], tmp_path, default=500, aliases={"alpha-0.40": 400})
    same = [dial[name] for name in ("lm@0.35", "lm@.35", "lm@.350", "lm@0.350", "other@0.35")]
    assert {(one.lora_name, one.lora_int_id, one.lora_path) for one in same} == {
        ("lm@0.35", 351, str(tmp_path / "0.35"))
    }
    assert {dial[name].lora_name for name in (None, "", "lm", "other", "lm@0.5")} == {"lm@0.5"}
    assert dial["alpha-0.40"].lora_name == "lm@0.4"
    assert dial["lm@0"].lora_int_id == 1 and dial["lm@2"].lora_int_id == 2001
    for name in ("lm@", "lm@2.001", "lm@-1", "lm@0.3500", "lm@1e1", "lm@nan", "lm@0.5@0.5", "l@0.5", "@0.5", "lm@ 1"):
        assert name not in dial
        with pytest.raises(KeyError):
            dial[name]
    assert [*dial] == [f"lm@{n / 10:g}" for n in range(11)] and len(dial) == 11


def test_a_strength_that_many_ask_for_at_once_is_there_whole_for_each_of_them(tmp_path):
    """Each with a dial of its own, as the processes of one server have."""
    peft = pytest.importorskip("vllm.lora.peft_helper", reason="vLLM is not installed")
    module = "model.layers.1.self_attn.q_proj"
    SlotAdapter({module: (8, 2.0)}).save(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"the weights")

    def scaling(thousandths: int) -> float:
        dial = Dial(["lm"], tmp_path, default=500, aliases={})
        folder = Path(dial[f"lm@{thousandths / 1000}"].lora_path)
        assert (folder / "adapter_model.safetensors").read_bytes() == b"the weights"
        return peft.PEFTHelper.from_local_dir(str(folder), None).get_rank_and_scaling(module)[1]

    strengths = [n // 16 for n in range(16 * 50)]
    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(scaling, strengths)] == pytest.approx([n / 500 for n in strengths], abs=1e-12)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {f"{n / 1000:g}" for n in range(50)}


def test_a_strength_that_the_disk_does_not_take_is_the_servers_trouble_and_said(tmp_path):
    """By vLLM's own handlers of errors, to which its routes and ours leave it."""
    handlers = pytest.importorskip("vllm.entrypoints.serve.exception_handling.register", reason="no vLLM")
    app = FastAPI()
    handlers.init_exception_handler(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    SlotAdapter({"model.layers.1.self_attn.q_proj": (8, 2.0)}).save(tmp_path)
    dial = Dial(["lm"], tmp_path, default=500, aliases={})
    assert dial["lm@0.4"].lora_name == "lm@0.4"

    @app.get("/{name}")
    async def name_of(name: str) -> str:
        return dial[name].lora_name

    shutil.rmtree(tmp_path)
    answer = TestClient(app).get("/lm@0.35")
    assert answer.status_code == 503
    assert "cannot write the adapter of strength 0.35: No such file or directory" in answer.text
    assert str(tmp_path) not in answer.text


@given(st.integers(0, 2000))
def test_every_strength_is_read_as_it_is_written(thousandths):
    assert parse_strength(write_strength(thousandths)) == parse_strength(f"{thousandths / 1000:.3f}") == thousandths
    assert re.fullmatch(r"[012](\.\d{1,3})?", write_strength(thousandths))


@given(st.text())
def test_any_text_is_a_strength_or_none(text):
    assert parse_strength(text) in (None, *range(2001))


@pytest.mark.parametrize("thousandths", [0, 350, 1000, *LISTED[2:4], 2000])
def test_ranks_and_scalings_by_module_are_what_vllm_reads_of_an_adapter(thousandths, tmp_path):
    """Names that end alike, or hold what means something in a regular expression."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.lora.peft_helper import PEFTHelper

    one = {"model.layers.1.self_attn.q_proj": (8, 2.0), "model.layers.2.self_attn.q_proj": (8, 2.0)}
    many = one | {"model.layers.11.self_attn.q_proj": (4, 0.3), "model.layers.1.mlp.up_proj": (16, 1.7)}
    for modules in (one, many):
        helper = PEFTHelper.from_dict(SlotAdapter(modules).config(thousandths))
        for module, (rank, scaling) in modules.items():
            found_rank, found = helper.get_rank_and_scaling(module)
            assert found_rank == rank and found == pytest.approx(scaling * thousandths / 1000, abs=1e-12)
    assert (SlotAdapter(one).slot_rank, SlotAdapter(many).slot_rank) == (8, 16)
    assert (
        SlotAdapter({"a.q_proj": (33, 1.0)}).slot_rank == 64 and SlotAdapter({"a.q_proj": (513, 1.0)}).slot_rank is None
    )
    assert SlotAdapter(many).vllm_layers == ["gate_up_proj", "qkv_proj"]
