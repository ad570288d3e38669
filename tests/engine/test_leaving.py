"""How vLLM's processes end, and a user's own beside them."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, gc, multiprocessing, sys

def work():
    from mergekit_bio.engine.vllm.leaving import leave_quickly_if_vllms
    atexit.register(print, "before", file=sys.stderr)
    leave_quickly_if_vllms()
    atexit.register(print, "after", file=sys.stderr)
    atexit.register(lambda: print(gc.get_freeze_count(), "frozen", file=sys.stderr))

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work, name=sys.argv[1] or None)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize(
    ("name", "heard"),
    [("", ["0 frozen", "after", "before"]), ("EngineCore_DP1", ["0 frozen", "after"])],
    ids=["a user's own process", "one of vLLM's"],
)
def test_the_last_words_of_a_process_are_heard(tmp_path, name, heard):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run([sys.executable, script, name], capture_output=True, text=True, check=True)
    assert ended.stderr.splitlines() == heard


SERVER = """
import multiprocessing, os, signal, sys

def engine():
    from mergekit_bio.engine.vllm.leaving import leave_ctrl_c_to_the_server
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: print(signal.Signals(number).name, flush=True))  # as vLLM does
    if sys.argv[1] == "spawn":  # else vLLM thinks that its plugins are loaded
        leave_ctrl_c_to_the_server()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    from mergekit_bio.engine.vllm.leaving import keep_ctrl_c_for_this_process
    if sys.argv[2] == "server":
        keep_ctrl_c_for_this_process()
    process = multiprocessing.get_context(sys.argv[1]).Process(target=engine, name="EngineCore")
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize(("program", "heard"), [("server", ["SIGTERM"]), ("evaluation", ["SIGINT", "SIGTERM"])])
def test_a_servers_engine_leaves_ctrl_c_to_its_server_and_ends_when_it_is_told(tmp_path, method, program, heard):
    script = tmp_path / "script.py"
    script.write_text(SERVER)
    ended = subprocess.run([sys.executable, script, method, program], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == heard
