"""What can be served, and what vLLM is told unless flags say otherwise."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from hub_cache import put_in_cache
from safetensors.torch import load_file, save_file

import mergekit_bio
from mergekit_bio.adapter.interface import Base
from mergekit_bio.adapter.load import load_adapter
from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.vllm.dial import SlotAdapter
from mergekit_bio.errors import AdapterError, EngineError, MergekitBioError
from mergekit_bio.serve import command
from mergekit_bio.serve.command import cache_options, parse_flags, prompt_template
from mergekit_bio.serve.dial import DialRequest, prepared_dial, request_of_merges, slot_adapter
from mergekit_bio.serve.settings import ServeSettings


@pytest.fixture(scope="module")
def sources(sweep) -> tuple[Path, Path]:
    """Base and adapter of the sweep."""
    folder = next(iter(sweep.values())).parents[1]
    return folder / "base", folder / "naturelm"


def as_peft(sources, folder: Path, **config) -> Path:
    """The sweep's LoRA as PEFT stores one; it has no ears."""
    stored = load_file(sources[1] / "model.safetensors")
    tensors = {
        name.removeprefix("llama_model.").replace(".default.", "."): tensor
        for name, tensor in stored.items()
        if ".lora_" in name
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(lora | config))
    return folder


def changed_naturelm(sources, folder: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(sources[1], folder)
    stored = load_file(folder / "model.safetensors")
    save_file(stored | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_dials_model_is_the_merge_at_alpha_0_without_a_copy_of_the_base(sources, tmp_path):
    base, adapter = sources
    (merged,) = mergekit_bio.merge(base=base, adapter=adapter, alphas=0.0, out=tmp_path / "merged")
    with prepared_dial(DialRequest(base, adapter)) as dial:
        ours, theirs = Checkpoint.open(tmp_path / "merged"), {}
        for file in sorted(dial.model.glob("*.safetensors")):
            theirs |= load_file(file)
        assert theirs.keys() == ours.tensors.keys()
        assert all(torch.equal(ours.read(name), tensor) for name, tensor in theirs.items())
        linked = [file.resolve() for file in dial.model.iterdir() if file.is_symlink()]
        assert linked == [(base / "model.safetensors").resolve()]
        for name in ("config.json", "processor_config.json", "tokenizer.json", "generation_config.json"):
            assert (dial.model / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert merged.unchanged and not dial.model.exists() and not dial.adapters.exists()
    assert (base / "model.safetensors").is_file()


@pytest.mark.parametrize("alpha", ["2.5", "0.1234", "q_proj=0.3", "0:1:0.1", "half", ""])
def test_a_strength_that_the_dial_has_not_is_refused(sources, alpha):
    request = DialRequest(*sources, alpha=alpha)
    said = r"a dial has strengths from 0 to 2 .* such as 0\.35"
    with pytest.raises(MergekitBioError, match=said), prepared_dial(request):
        pass


def test_what_slots_cannot_hold_is_refused_by_name_with_the_way_out(sources, tmp_path):
    base, adapter = sources

    def refusal(source, **more) -> str:
        with pytest.raises(AdapterError) as refused, prepared_dial(DialRequest(base, source, **more)):
            pass
        return str(refused.value)

    # 1. Of NatureLM-audio's own files, another base than the one that is given.
    embedding = load_file(adapter / "model.safetensors")["llama_embed_tokens.weight"] + 1
    said = refusal(changed_naturelm(sources, tmp_path / "override", **{"llama_embed_tokens.weight": embedding}))
    assert "differs from the base's at every strength" in said and "--alpha 0.5 --base-from-adapter" in said
    # 2. Of PEFT's kinds: with ears they would be refused for this, and without for having none.
    plain = as_peft(sources, tmp_path / "plain")
    assert "brings no audio tower" in refusal(plain)
    assert "leave out what follows the '='" in refusal(f"{adapter}=0.3")
    # 3. Everything that is no LoRA of a linear layer.
    assert slots_of(plain, base).slot_rank == 8
    halves = load_file(plain / "adapter_model.safetensors")
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(half))
        for name, half in halves.items()
        if "lora_B" in name
    }
    norm = {"base_model.model.model.layers.0.input_layernorm.weight": torch.ones(64)}
    kinds = [
        ("dora", {"use_dora": True}, magnitudes, "is changed by DoRA"),
        ("saved", {"modules_to_save": ["input_layernorm"]}, norm, "is changed by a whole tensor"),
    ]
    for name, config, tensors, problem in kinds:
        folder = as_peft(sources, tmp_path / name, **config)
        save_file(halves | tensors, folder / "adapter_model.safetensors")
        with pytest.raises(
            AdapterError, match=f"{problem}, which no LoRA slot holds exactly; merge it at one strength"
        ):
            slots_of(folder, base)


def slots_of(folder: Path, base: Path) -> SlotAdapter:
    """What slots need to know of an adapter, ears or not."""
    source = resolve(base)
    return slot_adapter(load_adapter(resolve(folder), Base(source, Checkpoint.open(source.path))))


def test_merges_of_one_sweep_name_the_dial_that_they_stand_for(sweep, sources, tmp_path):
    half, whole = sweep["alpha-0.50"], sweep["alpha-1.00"]
    request = request_of_merges([whole, half])
    assert (Path(request.base), Path(request.adapter)) == sources
    assert (request.alpha, request.aliases) == ("1", {"alpha-1.00": 1000, "alpha-0.50": 500})
    with pytest.raises(EngineError, match=r"two checkpoints are called alpha-0\.50"):
        request_of_merges([half, half])
    # What they were merged from must be what it was.
    changed = DialRequest(*sources, fingerprints=("0", *request.fingerprints[1:]))
    with pytest.raises(EngineError, match="has changed since the checkpoints were merged"), prepared_dial(changed):
        pass
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    document = json.loads((other / "merge.json").read_text())
    (adapter,) = document["adapters"]
    strengths = {"default": 0.12345, "modules": {}}, {"default": 1.0, "modules": {"q_proj": 0.3}}
    for change, message in [
        ({"base": document["base"] | {"fingerprint": "0"}}, "was not merged from the same base and adapter"),
        *(({"adapters": [adapter | {"alpha": alpha}]}, "is none of a dial's") for alpha in strengths),
    ]:
        (other / "merge.json").unlink()
        (other / "merge.json").write_text(json.dumps(document | change))
        with pytest.raises(EngineError, match=message):
            request_of_merges([half, other])


def test_a_dial_of_merges_finds_an_adapter_in_its_folder_on_the_hub(sources, hub_cache, tmp_path):
    base, adapter = sources
    revision = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/README.md").write_text("Several.")
    snapshot = put_in_cache(hub_cache, "owl/several", revision, tmp_path / "repository")
    shutil.copytree(adapter, snapshot / "ears/naturelm")
    (merged,) = mergekit_bio.merge(
        base=base, adapter="owl/several/ears/naturelm", alphas=[0.35], out=tmp_path / "merged", device="cpu"
    )
    request = request_of_merges([merged.path])
    assert request.adapter == f"owl/several/ears/naturelm@{revision}"
    with prepared_dial(request) as dial:
        assert (dial.adapters / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{half}", "{whole}"], "a server has one merged checkpoint"),
        (["{half}", "--alpha", "0.4"], "has its own alpha"),
        (["{half}", "--base", "x"], "is a checkpoint"),
        (["--dial"], "name some before the flags"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(sweep, command_line, arguments, said):
    named = {"half": sweep["alpha-0.50"], "whole": sweep["alpha-1.00"]}
    code, _, err = command_line("serve", *(argument.format(**named) for argument in arguments))
    assert code == 2 and said in " ".join(err.replace("│", "").split())


def test_flags_are_vllms_and_win_over_private_defaults(sweep, sources):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    half = sweep["alpha-0.50"]
    args = parse_flags(half, ["half"], [])
    assert (args.host, args.allowed_origins, args.allowed_local_media_path) == ("127.0.0.1", [], "")
    assert args.served_model_name == ["half"] and not args.enable_lora
    given = ["--host", "0.0.0.0", "--api-key", "k", "--tensor-parallel-size", "2", "--data-parallel-size", "2"]
    args = parse_flags(half, ["half"], [*given, "--distributed-executor-backend", "ray", "--middleware", "my.Own"])
    assert args.middleware == ["my.Own", "mergekit_bio.serve.guard.Guard"]  # the last is the outermost
    assert (args.host, args.api_key, args.distributed_executor_backend) == ("0.0.0.0", ["k"], "ray")
    assert (args.tensor_parallel_size, args.data_parallel_size) == (2, 2)
    assert prompt_template(args) == LLAMA3_TEMPLATE
    assert prompt_template(parse_flags(half, ["half"], ["--chat-template", "{{ messages }}"])) is None
    with prepared_dial(DialRequest(*sources)) as dial:
        args = parse_flags(dial.model, ["naturelm"], ["--max-loras", "3"], dial)
        assert (args.enable_lora, args.max_lora_rank, args.max_loras, args.max_cpu_loras) == (True, 8, 3, 32)
        assert args.lora_target_modules == ["o_proj", "qkv_proj"]
        args = parse_flags(dial.model, ["naturelm"], ["--max-loras", "50"], dial)
        assert (args.max_loras, args.max_cpu_loras) == (50, 50)  # vLLM keeps at least those of a batch
        with pytest.raises(EngineError, match="--lora-modules cannot be set"):
            parse_flags(dial.model, ["naturelm"], ["--lora-modules", "a=/b"], dial)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], {}),
        (["-tp", "2", "-dp=3"], {"tensor_parallel_size": 2, "data_parallel_size": 3}),
        (["--pipeline_parallel_size=2"], {"pipeline_parallel_size": 2}),
        (["--kv-cache-memory-bytes=1000000000"], {"kv_cache_memory_bytes": 10**9}),
        (["--gpu-memory-utilization", "0.92"], {"gpu_memory_utilization": 0.92}),
        (["--config", "{config}"], {"gpu_memory_utilization": 0.3, "tensor_parallel_size": 2}),
    ],
)
def test_what_flags_say_of_the_cache_counts_in_whichever_form(sweep, tmp_path, flags, said):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    config = tmp_path / "config.yaml"
    config.write_text("gpu-memory-utilization: 0.3\ntensor-parallel-size: 2\n")
    half = sweep["alpha-0.50"]
    flags = [flag.format(config=config) for flag in flags]
    unsaid = {"kv_cache_memory_bytes": None} | {f"{way}_parallel_size": 1 for way in ("tensor", "pipeline", "data")}
    assert cache_options(parse_flags(half, ["half"], flags), flags) == unsaid | said


def test_the_note_on_the_dial_has_the_name_that_is_served(sources, command_line, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.entrypoints.cli.serve import ServeSubcommand

    monkeypatch.setattr("os.environ", os.environ.copy())
    served = []
    monkeypatch.setattr(ServeSubcommand, "cmd", lambda args: served.append(ServeSettings.from_environment()))
    base, adapter = sources
    code, _, err = command_line("serve", "--base", base, "--adapter", adapter, "--served-model-name", "birds")
    assert code == 0 and "note: birds@0 to birds@2 are served unmerged: " in err
    (settings,) = served
    dial = settings.make_dial()
    assert (settings.num_beams, settings.max_new_tokens, settings.page) == (2, 300, None)
    assert dial is not None and "birds@2" in dial and "birds@2.001" not in dial and "naturelm@1" not in dial


def test_calls_of_functions_are_not_held_to_what_guidance_cannot_read(sweep, command_line, monkeypatch):
    """vLLM's llama3_json writes grammars for xgrammar; each request with tools would be refused."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm import envs
    from vllm.entrypoints.cli.serve import ServeSubcommand

    strict = []
    monkeypatch.setattr(ServeSubcommand, "cmd", lambda args: strict.append(envs.VLLM_ENFORCE_STRICT_TOOL_CALLING))
    for flags in ([], ["--structured-outputs-config", '{"backend": "xgrammar"}']):
        monkeypatch.setattr("os.environ", os.environ.copy())
        os.environ.pop("VLLM_ENFORCE_STRICT_TOOL_CALLING", None)
        assert command_line("serve", sweep["alpha-0.50"], *flags)[0] == 0
    assert strict == [False, True]


def test_a_flag_that_vllm_objects_to_is_named_in_one_line(sweep, command_line, monkeypatch):
    """Before any process of vLLM's is started."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setattr("os.environ", os.environ.copy())
    model = sweep["alpha-0.50"]
    code, out, err = command_line("serve", model, "--gpu-memory-utilization", "7")
    line = f"error: {model}: vLLM cannot start: gpu_memory_utilization: Input should be less than or equal to 1"
    assert code == 1 and err.splitlines()[-1] == line
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prot", "8770"], "unrecognized arguments: --prot; did you mean --port?"),
        (["--tensor_paralel_size=2"], "--tensor-paralel-size=2; did you mean --tensor-parallel-size?"),
        (["--request-logs", "f"], "did you mean --request-log?"),  # ours, not vLLM's
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice requires --tool-call-parser"),
        (["--config", "flags.txt"], "Config file must be of a yaml/yml type"),
        (["--port", "high"], "argument --port: invalid int value: 'high'"),
        (["--port", "8770", "merged/half"], "merged/half: what is served stands before the flags"),
    ],
)
def test_a_flag_that_nobody_knows_is_told_before_anything_is_fetched(command_line, flags, said):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    code, out, err = command_line("serve", "--base", "owl/nothing", "--adapter", "owl/nothing", *flags)
    assert code == 2 and said in " ".join(err.split())
    assert not out and len(err.splitlines()) < 8


def test_an_address_that_cannot_be_had_is_told_in_one_line_by_vllms_own_try(sweep, command_line, monkeypatch):
    """Before any process of vLLM's is started."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setattr("os.environ", os.environ.copy())
    half = sweep["alpha-0.50"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (["--port", port], f"port {port} of 127.0.0.1 is in use; give another --port"),
            (["--host", "203.0.113.9"], "--host 203.0.113.9: this machine has no such address; give one that it has"),
            (["--port", "70000"], "--port 70000: write a number from 1 to 65535"),
        ]
        for flags, said in cases:
            code, out, err = command_line("serve", half, *flags)
            assert code == 1 and err.splitlines()[-1].startswith(f"error: {said}")
            assert "Traceback" not in out + err
    code, out, err = command_line("serve", half, "--enable-auto-tool-choice", "--tool-call-parser", "owl")
    assert code == 1 and f"error: {half}: vLLM cannot start: invalid tool call parser: owl" in err.splitlines()[-1]


def test_a_sweep_is_no_checkpoint_and_says_how_one_or_all_of_it_are_served(sweep, command_line):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = sweep["alpha-0.50"].parent
    code, _, err = command_line("serve", folder)
    said = err.splitlines()[-1]
    assert code == 1 and said.startswith(f"error: {folder}: is a sweep; name one of the folders in it: alpha-0.00, ")
    assert said.endswith(f"mergekit-bio serve {folder}/* --dial")


def test_a_page_says_what_to_install_and_that_it_has_one_server(sweep, command_line, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setattr("os.environ", os.environ.copy())
    half = sweep["alpha-0.50"]
    code, _, err = command_line("serve", half, "--page", "--api-server-count", "2")
    assert code == 1 and "error: --page needs one API server" in err
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, err = command_line("serve", half, "--page")
    line = "error: serve --page needs gradio; install it with: pip install 'mergekit-bio[page]'"
    assert code == 1 and err.splitlines()[-1] == line
