"""Which checkpoints can be served together, and what vLLM is told unless flags say otherwise."""

import json
import shutil
import subprocess
import sys

import pytest

from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.errors import CheckpointError, EngineError
from mergekit_bio.serve.command import find_models, parse_flags, prompt_template


def test_checkpoints_are_named_after_their_directories(sweep):
    assert find_models(sweep.values()) == {name: path.resolve() for name, path in sweep.items()}


def test_what_cannot_be_served_is_said_before_anything_starts(sweep, tmp_path):
    first, second = sweep.values()
    base = first.parents[1] / "base"
    with pytest.raises(CheckpointError, match="model_type 'llama', which cannot hear"):
        find_models([base])
    with pytest.raises(EngineError, match=f"two checkpoints are called {first.name}"):
        find_models([first, first])
    copy = tmp_path / "other"
    shutil.copytree(second, copy)
    manifest = json.loads((copy / "merge.json").read_text())
    manifest["tensors"][min(manifest["tensors"])]["sha256"] = "0" * 64
    (copy / "merge.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match=r"is not what merge\.json records"):
        find_models([first, copy])


def test_flags_are_vllms_and_win_over_private_defaults(sweep):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    models = find_models(sweep.values())
    args = parse_flags(models, [])
    assert (args.host, args.allowed_origins, args.allowed_local_media_path) == ("127.0.0.1", [], "")
    assert args.served_model_name == list(models)
    given = ["--host", "0.0.0.0", "--api-key", "k", "--tensor-parallel-size", "2", "--data-parallel-size", "2"]
    args = parse_flags(models, [*given, "--distributed-executor-backend", "ray"])
    assert (args.host, args.api_key, args.distributed_executor_backend) == ("0.0.0.0", ["k"], "ray")
    assert (args.tensor_parallel_size, args.data_parallel_size) == (2, 2)
    assert prompt_template(args) == LLAMA3_TEMPLATE
    assert prompt_template(parse_flags(models, ["--chat-template", "{{ messages }}"])) is None
    with pytest.raises(EngineError, match="--served-model-name"):
        parse_flags(models, ["--served-model-name", "frog"])


def test_a_flag_that_vllm_objects_to_is_named_in_one_line(sweep):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    (model, *_) = sweep.values()
    program = "from mergekit_bio.cli.app import main; main()"
    command = [sys.executable, "-c", program, "serve", model, "--gpu-memory-utilization", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    line = f"error: {model}: vLLM cannot start: gpu_memory_utilization: Input should be less than or equal to 1"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stdout + done.stderr
