"""What is left out of vLLM's log, in a process that is not our command; and that nothing else is."""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.engine.vllm.log import USUAL, USUAL_AT_THE_END, leave_out_the_usual, left_out, stderr_without


def ask_and_move(first: str, second: str) -> None:
    """Ask about clips at two strengths, and print how many threads torch has before, meanwhile and afterwards."""
    from engine.starting import start_vllm

    generator = torch.Generator().manual_seed(3)
    clips = [Clip.from_samples(torch.rand(48_000, generator=generator) - 0.5, sampling_rate=16_000) for _ in range(4)]
    prompts = [Prompt("<Audio><AudioHere></Audio> Who calls?", [clip]) for clip in clips]
    threads = []
    for ask_for in (2, 1):
        torch.set_num_threads(ask_for)
        threads.append(torch.get_num_threads())
    engine = start_vllm(Path(first))
    bound = torch.get_num_threads()
    for checkpoint in (second, first):
        engine.generate(prompts, Decoding(max_new_tokens=2))
        engine.load(checkpoint)
    torch.set_num_threads(bound + 1)
    threads.append(torch.get_num_threads() - bound)
    engine.close()
    torch.set_num_threads(bound + 1)
    threads.append(torch.get_num_threads() - bound)
    print(json.dumps(threads))


@pytest.fixture(scope="module")
def library_user(tiny_sweep) -> subprocess.CompletedProcess[str]:
    """Python that imports this package and starts vLLM in its own process, with vLLM's own settings of its log."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if torch.cuda.is_available():
        pytest.skip("these are vLLM's words on a CPU")
    tests = Path(__file__).parents[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_LOGGING")}
    environment |= {
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'eval'}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    script = "import sys; from engine.test_vllm_log import ask_and_move; ask_and_move(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_sweep[0.5], tiny_sweep[1.0]],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_nothing_is_said_for_every_clip_and_every_layer(library_user):
    """Transformers of a clip and the reload of a strength call what vLLM warns of; its log is not silent otherwise."""
    assert re.findall("set_num_threads|Failed to load weights|weights were not loaded", library_user.stderr) == []
    assert "Reloading weights inplace" in library_user.stderr and "NUMA binding" not in library_user.stderr


def test_what_vllm_says_at_its_start_is_left_to_the_program_that_uses_the_library(library_user):
    assert "Enforce eager set" in library_user.stderr


def test_the_number_of_threads_is_vllms_while_it_runs_and_can_be_set_again_afterwards(library_user):
    assert json.loads(library_user.stdout.splitlines()[-1]) == [2, 1, 0, 1]


def test_every_message_that_is_left_out_is_one_of_vllms():
    """In the source of the module whose logger it is, so that none outlives the release that it was written for."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    for name, beginnings in (USUAL | USUAL_AT_THE_END).items():
        source = Path(importlib.util.find_spec(name).origin).read_text()
        joined = re.sub(r'"\s*\n\s*"', "", source)
        assert [beginning for beginning in beginnings if f'"{beginning}' not in joined] == []


@pytest.fixture
def heard():
    """Messages of a logger that is ours alone, and the logger."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    logger, ear = logging.getLogger("vllm.of.this.test"), Ear()
    logger.setLevel(logging.WARNING)  # whatever level vLLM's own logger has in these tests
    logger.addHandler(ear)
    yield messages, logger
    logger.removeHandler(ear)


def test_messages_are_left_out_by_how_they_begin_and_only_in_the_block(heard):
    messages, logger = heard
    with left_out({logger.name: ("%s: Failed",)}):
        logger.warning("%s: Failed to load weights", "Linear")
        logger.warning("Allocating %.1f MB of device memory", 3)
    logger.warning("%s: Failed to load weights", "Conv2d")
    assert messages == ["Allocating 3.0 MB of device memory", "Conv2d: Failed to load weights"]


def test_other_messages_of_the_same_loggers_are_shown():
    leave_out_the_usual()
    logger = logging.getLogger("vllm.platforms.cpu")
    records = [
        logging.LogRecord(logger.name, logging.WARNING, "cpu.py", 1, text, (), None)
        for text in ("Triton is not installed. triton-cpu is expected on x86 CPUs.", "CPU backend prefers block_size")
    ]
    assert [bool(logger.filter(record)) for record in records] == [False, True]


def test_lines_of_code_that_has_no_logger_are_left_out_by_their_text(capfd):
    with stderr_without("NUMA binding"):
        os.write(2, b"before\n[W] NUMA binding: Using\nafter\n")
    os.write(2, b"outside: NUMA binding\n")
    assert capfd.readouterr().err == "before\nafter\noutside: NUMA binding\n"


def test_what_is_written_before_an_error_is_shown(capfd):
    with pytest.raises(RuntimeError), stderr_without("NUMA binding"):
        os.write(2, b"no memory left\n")
        raise RuntimeError
    assert capfd.readouterr().err == "no memory left\n"
