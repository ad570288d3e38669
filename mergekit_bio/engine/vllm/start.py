"""While vLLM starts: an interruption ends it, and what it objects to is said in one line."""

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_bio.engine.tokenization import read_audio_model_config
from mergekit_bio.engine.vllm.failures import first_failure
from mergekit_bio.errors import EngineError

#: What vLLM's servers say of a parser that they do not have, in a KeyError.
_UNKNOWN_PARSERS = ("'invalid tool call parser", "'invalid reasoning parser")


class _Interruption(BaseException):
    """A KeyboardInterrupt that vLLM does not know."""


def leave_if_imported_again() -> None:
    """End a process of vLLM's that has only come to import the user's script, and finds it starting vLLM.

    Where vLLM spawns its processes, as it does beside a tower on a GPU, each of them imports the script that started
    it. One that is not guarded would be run by each of them, from its beginning.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself tells
        sys.exit(f"{sys.argv[0]}: vLLM imports this script once more; put its work under: if __name__ == '__main__':")


def engine_dtype(checkpoint: Path) -> str:
    """The data type that vLLM is to compute in where nobody says which: the checkpoint's.

    vLLM's own ``"auto"`` makes bfloat16 of float32 without a word.

    Raises:
        CheckpointError: It is no merge with an audio tower.
    """
    return "float32" if read_audio_model_config(checkpoint)["text_config"].get("dtype") == "float32" else "auto"


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a KeyboardInterrupt end the start of vLLM.

    vLLM swallows it where it shakes hands with its engine's process, and then serves all the same, or waits for ever
    for an engine that was interrupted too.
    """
    from vllm.v1.engine import utils

    original = utils.zmq_socket_ctx

    @contextmanager
    def handshake(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with original(*args, **kwargs) as socket:
            try:
                yield socket
            except KeyboardInterrupt:
                raise _Interruption from None

    utils.zmq_socket_ctx = handshake
    try:
        yield
    except _Interruption:
        raise KeyboardInterrupt from None
    finally:
        utils.zmq_socket_ctx = original


@contextmanager
def objections(checkpoint: Path) -> Iterator[None]:
    """Turn what vLLM objects to in its options, and an engine that did not come up, into an error of one line.

    Raises:
        EngineError: What is wrong; vLLM's own error is its cause, where it says more.
    """
    import torch
    from pydantic import ValidationError

    with first_failure() as cause:
        try:
            yield
        except (ValueError, TypeError, KeyError, torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, ValidationError):
                of_option = {str(fault["loc"][0]) if fault["loc"] else "": fault["msg"] for fault in error.errors()}
                reason = "; ".join(f"{option}: {message}".removeprefix(": ") for option, message in of_option.items())
            elif isinstance(error, TypeError):
                reason = f"is every option of the type that it needs? ({error})"
            elif isinstance(error, KeyError) and str(error).startswith(_UNKNOWN_PARSERS):
                reason = str(error.args[0])
            elif isinstance(error, (ValueError, torch.OutOfMemoryError)):
                reason = str(error)
            elif str(error).startswith("Engine core initialization failed"):
                # vLLM's engine is another process, which knows why. Its own error says that it is not there.
                why = f": {cause()}" if cause() else "; why stands above"
                raise EngineError(f"{checkpoint}: vLLM cannot start: its engine did not come up{why}") from None
            else:
                raise
            reason = " ".join(reason.replace("Value error, ", "").split())
            raise EngineError(f"{checkpoint}: vLLM cannot start: {reason}") from error
