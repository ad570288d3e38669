"""Leaves out of vLLM's log what it says at every start and nobody can act on; whatever else it says is shown."""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

#: Logger -> how its messages begin, before their values are filled in. vLLM warns of these at every start of this
#: package's model: of parts that another model would use, and of settings that were chosen on purpose.
USUAL = {
    "vllm.config.model": ("Model does not support mm_device_do_normalize",),
    "vllm.config.vllm": (
        "Enforce eager set, disabling torch.compile",
        "Inductor compilation was disabled by user settings",
        "Model Runner V2 requires Triton",
        "TORCH_COMPILE_DISABLE is set",
    ),
    "vllm.engine.arg_utils": ("The global random seed is set to",),
    "vllm.lora.model_manager": ("Regarding %s, no matching PunicaWrapper",),  # the tower, which has no LoRA slots
    "vllm.platforms.cpu": ("Triton is not installed", "Reset SSM cache type to float32"),
    "vllm.renderers.hf": ("You specified `--chat-template-content-format %s` which is different",),
    "vllm.v1.engine.input_processor": (
        "vLLM has deprecated support for supporting different tokenizers for different LoRAs",
        "Passing raw prompts to InputProcessor is deprecated",
    ),
    "vllm.triton_utils.importing": ("Triton is installed, but doesn't include CPU backend",),
}

#: The same of a server's end: an engine that has been stopped gives no more answers, and vLLM calls that a failure.
USUAL_AT_THE_END = {"vllm.v1.engine.async_llm": ("AsyncLLM output_handler failed.",)}


class _LeaveOut(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginnings)


def leave_out_the_usual() -> None:
    """Leave out what vLLM warns of at every start, in this process.

    It is for programs, not for libraries: call it where the program is imported, for vLLM's processes import their
    program again, before they import vLLM.
    """
    _leave_out(USUAL)
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)


def leave_out_the_usual_at_the_end() -> None:
    """Leave out what vLLM says where its engine is stopped on purpose; called when it is, in the server's process."""
    _leave_out(USUAL_AT_THE_END)


def _leave_out(messages: Mapping[str, tuple[str, ...]]) -> None:
    for logger, beginnings in messages.items():
        logging.getLogger(logger).addFilter(_LeaveOut(beginnings))


@contextmanager
def left_out(messages: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Leave some messages out of the log while the block runs.

    Args:
        messages: Logger -> how its messages begin, before their values are filled in.
    """
    filters = {logging.getLogger(logger): _LeaveOut(beginnings) for logger, beginnings in messages.items()}
    for logger, leave_out in filters.items():
        logger.addFilter(leave_out)
    try:
        yield
    finally:
        for logger, leave_out in filters.items():
            logger.removeFilter(leave_out)


@contextmanager
def stderr_without(text: str) -> Iterator[None]:
    """Leave out the lines with some text in them from what the block writes to file descriptor 2.

    It is for C++ code that has no logger. The other lines are written when the block ends.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if text.encode() not in line))
