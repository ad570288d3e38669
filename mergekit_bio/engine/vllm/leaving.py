"""The end of vLLM's processes, without what takes seconds there and helps nobody."""

import atexit
import gc
import multiprocessing
import os


def leave_quickly() -> None:
    """When this process ends by itself, leave its objects alone.

    Python would look through all of them for cycles, several times: two seconds for the 800,000 of a process of
    vLLM's, and a server waits for three such processes, one after the other. Of objects that are left, libraries made
    with nanobind, such as Triton, write pages to stderr that nobody can act on.
    """
    atexit.register(_leave)


def leave_quickly_if_vllms() -> None:
    """The same, in a process that vLLM has started; a user's own program ends as Python ends it."""
    if multiprocessing.parent_process() is not None:
        leave_quickly()


def _leave() -> None:
    gc.freeze()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
