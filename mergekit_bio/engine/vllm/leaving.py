"""The end of vLLM's processes, without what takes seconds there and helps nobody."""

import atexit
import gc
import multiprocessing
import os
import signal

#: How vLLM calls its processes, with a number behind it or without.
_VLLMS = ("ApiServer", "EngineCore", "VllmWorker")
#: Says that Ctrl-C is a server's, and not also its engine's.
_VARIABLE = "MERGEKIT_BIO_CTRL_C_IS_THE_SERVERS"


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


def keep_ctrl_c_for_this_process() -> None:
    """Have the engine of the server that this process becomes leave Ctrl-C to it.

    A terminal sends Ctrl-C to all processes. An engine that ends by itself looks to its server like one that has died:
    requests fail, and pages are written on it. The server ends its engine, after Ctrl-C as after SIGTERM.
    """
    os.environ[_VARIABLE] = "1"
    # vLLM's engine is forked or spawned. A forked one has loaded this package already, and calls nothing of it again.
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}))


def leave_ctrl_c_to_the_server() -> None:
    """In an engine's process: do what :func:`keep_ctrl_c_for_this_process` wants, if it was called.

    It is for processes that were spawned, and called when vLLM has set its own handlers.
    """
    engines = multiprocessing.current_process().name.startswith(("EngineCore", "VllmWorker"))
    if engines and _VARIABLE in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
