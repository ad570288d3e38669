"""The end of vLLM's processes, without what takes seconds there and helps nobody."""

import atexit
import gc
import multiprocessing
import os

#: How vLLM calls its processes, with a number behind it or without.
_VLLMS = ("ApiServer", "EngineCore", "VllmWorker")


def leave_quickly_if_vllms() -> None:
    """In a process that vLLM has started: leave its objects alone when it ends by itself.

    Python would look through all of them for cycles, several times: two seconds for the 800,000 of such a process, and
    a server waits for two of them, one after the other. A process of a user's own ends as Python ends it.
    """
    if multiprocessing.current_process().name.startswith(_VLLMS):
        leave_without_leaks()
        atexit.register(gc.freeze)  # what is registered last is called first


def leave_without_leaks() -> None:
    """Say nothing of the objects that are left when this process ends, if vLLM has frozen them, as its server does.

    Libraries made with nanobind, such as Triton, write pages on them to stderr, and nobody can act on these. What is
    registered for the end of the process after this call is still heard.
    """
    atexit.register(_silence_if_frozen)


def _silence_if_frozen() -> None:
    if gc.get_freeze_count():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
