"""vLLM's worker for a CPU, without what it repeats at every start and for every clip."""

import os
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from mergekit_bio.engine.vllm.log import left_out, stderr_without

_SET_NUM_THREADS = torch.set_num_threads
#: Matrix products that oneDNN keeps compiled, beside the 32 that vLLM keeps for each linear layer. Every number of
#: tokens in a batch asks for its own, a third of a megabyte for the demo's Llama: the usual 1024 take hours to fill.
_COMPILED_PRODUCTS = "64"


def _keep_threads(nthreads: int) -> None:
    """Threads are bound to cores, and their number stays."""


class QuietCPUWorker(CPUWorker):
    """The same worker. While it is there, ``torch.set_num_threads`` does nothing, as with vLLM's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _COMPILED_PRODUCTS)
        with stderr_without("NUMA binding: Using MEMBIND policy"):
            super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        """Bind the threads."""
        with left_out({"vllm.v1.worker.cpu_worker": ("%s is not found in LD_PRELOAD", "CPU backend doesn't allow")}):
            super().init_device()
        # vLLM's own replacement warns at every call, and vLLM itself calls it twice for every clip.
        torch.set_num_threads = _keep_threads

    def shutdown(self) -> None:
        """Stop, and let the number of threads be set again."""
        super().shutdown()
        torch.set_num_threads = _SET_NUM_THREADS
