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
