"""How much memory vLLM's cache gets on a CPU: what is free, up to a few gigabytes.

By itself vLLM takes half of the machine and more, and does not start where that is not free.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Where there is room: 32,000 tokens of Llama-3.1-8B.
_USUAL_BYTES = 4 << 30
#: Options of vLLM's that say what its cache gets, and those that say over how many processes Llama is spread.
SAID_BY = ("kv_cache_memory_bytes", "gpu_memory_utilization")
SPREAD_BY = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass(frozen=True)
class CacheMemory:
    """What the cache of an engine on a CPU gets.

    Attributes:
        bytes: Of each of its processes.
        free: Bytes that are free before the model is loaded.
    """

    bytes: int
    free: int

    @property
    def in_words(self) -> str:
        """One line for the user."""
        gib = 1 << 30
        return (
            f"vLLM's cache gets {self.bytes / gib:.1f} GiB of the {self.free / gib:.1f} GiB of memory that are free; "
            "kv_cache_memory_bytes, or VLLM_CPU_KVCACHE_SPACE in GiB, sets another size"
        )

    @property
    def is_less_than_usual(self) -> bool:
        """Whether there is little room."""
        return self.bytes < _USUAL_BYTES


def cache_memory(checkpoint: Path, options: Mapping[str, Any]) -> CacheMemory | None:
    """Size the cache; None where the user has, and on a GPU, where vLLM itself looks for what is free.

    Args:
        checkpoint: The directory whose weights will be loaded.
        options: vLLM's, as far as the user gives them.
    """
    from vllm.platforms import current_platform

    said = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or any(options.get(option) is not None for option in SAID_BY)
    if said or not current_platform.is_cpu():
        return None
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    free = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).available_memory
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return CacheMemory(bytes=cache_bytes(free=free, weights=weights, processes=processes(options)), free=free)


def cache_bytes(*, free: int, weights: int, processes: int = 1) -> int:
    """Bytes for the cache of each process: half of what the weights leave free, and not more than is of use."""
    return max(1, min(_USUAL_BYTES, (free - weights) // 2 // processes))


def processes(options: Mapping[str, Any]) -> int:
    """Over how many processes Llama is spread, each with a cache, and on GPUs each with one of them."""
    sizes = [options.get(option) for option in SPREAD_BY]
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)
