"""Somebody changes their mind while vLLM starts, or has given it options that it does not take."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from engine.starting import start_vllm
from eval.evaluation import write_evaluation

from mergekit_bio.engine.vllm.offline import VllmEngine
from mergekit_bio.engine.vllm.start import objections
from mergekit_bio.errors import EngineError


def _family(group: int) -> list[str]:
    """The names of a group's processes that have not ended."""
    lines = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(maxsplit=2) for line in lines]
    return [args for pgid, state, args in rows if int(pgid) == group and not state.startswith("Z")]


@pytest.mark.parametrize(
    "everybody",
    [
        pytest.param(True, id="Ctrl-C in a terminal"),
        pytest.param(False, id="SIGTERM from a scheduler", marks=pytest.mark.soak),
    ],
)
def test_an_interruption_ends_the_start_of_vllm_and_all_of_its_processes(everybody, tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # as outside the tests: vLLM's core is a process of its own
    evaluation = write_evaluation(tmp_path / "evaluation")
    program = "from mergekit_bio.cli.app import main; main()"
    command = [sys.executable, "-c", program, "eval", evaluation.recipe, "--out", tmp_path / "run", "--engine", "vllm"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    try:
        while not any("EngineCore" in name for name in _family(process.pid)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        if everybody:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        assert process.wait(60) == 130
        deadline = time.monotonic() + 30
        while left := _family(process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
    finally:
        if _family(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert "interrupted\n" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"tensor_parallel_size": 5}, "heads .* must be divisible by tensor parallel size"),
        ({"gpu_memory_utilization": 7}, "gpu_memory_utilization: Input should be less than or equal to 1"),
        ({"max_num_seqs": "many"}, "is every option of the type that it needs"),
    ],
)
def test_an_option_that_vllm_objects_to_is_named_in_one_line(tiny_sweep, option, match):
    with pytest.raises(EngineError, match=match) as refusal:
        start_vllm(tiny_sweep[0.5], **option)
    assert str(refusal.value).startswith(f"{tiny_sweep[0.5]}: vLLM cannot start: ")
    assert "\n" not in str(refusal.value) and refusal.value.__cause__


def test_a_float32_checkpoint_is_computed_in_float32(vllm_engine):
    """vLLM's own default makes bfloat16 of it."""
    assert vllm_engine._llm.llm_engine.model_config.dtype == torch.float32


@pytest.mark.parametrize("option", [{"max_model_len": "long"}, {"max_model_len": -1}, {"max_audios": 0}])
def test_an_option_of_our_own_is_a_whole_number(tiny_sweep, option):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with pytest.raises(EngineError, match="write a whole number"):
        VllmEngine(tiny_sweep[0.5], **option)


def test_an_engine_that_does_not_come_up_is_an_error_and_a_bug_is_a_traceback(tmp_path):
    with pytest.raises(EngineError, match="why stands above"), objections(tmp_path):
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    with pytest.raises(RuntimeError, match="a bug"), objections(tmp_path):
        raise RuntimeError("a bug")
    with pytest.raises(KeyError, match="a bug"), objections(tmp_path):
        raise KeyError("a bug")


@pytest.mark.long
def test_an_engine_that_does_not_come_up_names_its_cause(tiny_sweep):
    """Its own process has it; what it says is in the one line of the process that a user has started."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    script = f"""
from mergekit_bio.engine.vllm.offline import VllmEngine
VllmEngine({str(tiny_sweep[0.5])!r}, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 50)
"""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("mergekit_bio.errors.EngineError: "))
    assert "vLLM cannot start: its engine did not come up: Available memory on node" in said, done.stderr[-3000:]
    assert "is less than" in said  # at once, where others hold memory, or when the cache is made


def test_a_script_without_a_main_guard_is_told_so(tiny_sweep, tmp_path):
    """On a GPU vLLM spawns its engine's process, which imports the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import mergekit_bio.engine.vllm.offline as offline\n"
        f"offline.VllmEngine({str(tiny_sweep[0.5])!r}, enforce_eager=True, max_model_len=512)\n"
    )
    environment = os.environ | {"VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    told = f"{script}: vLLM imports this script once more; put its work under: if __name__ == '__main__':"
    assert done.returncode == 1 and done.stderr.splitlines().count(told) == 1
    assert "bootstrapping" not in done.stderr and "direct cause" not in done.stderr
    ending = "vLLM cannot start: its engine did not come up; why stands above"
    assert [line for line in done.stderr.splitlines() if line.endswith(ending)]
