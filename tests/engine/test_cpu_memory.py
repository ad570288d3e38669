"""What vLLM's cache gets on a CPU: half of what is free, and nothing that the user has not said already."""

import pytest

from mergekit_bio.engine.vllm.cpu_memory import CacheMemory, cache_bytes, cache_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "weights", "processes", "gets"),
    [
        (64, 16, 1, 4),  # room enough
        (24, 0, 1, 4),
        (20, 16, 1, 2),  # half of what the weights leave
        (12, 6, 2, 1.5),  # two processes with a cache each
        (6, 0, 1, 3),
    ],
)
def test_the_cache_gets_half_of_what_is_free_and_4_gib_at_most(free, weights, processes, gets):
    assert cache_bytes(free=free * GIB, weights=weights * GIB, processes=processes) == gets * GIB


def test_where_nothing_is_free_vllm_says_so_itself():
    assert cache_bytes(free=1 * GIB, weights=16 * GIB) == 1


def test_what_a_user_says_is_not_sized_again(tiny_sweep, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("a GPU's memory is vLLM's to size")
    checkpoint = tiny_sweep[0.5]
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert cache_memory(checkpoint, {}) is None
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    for option in ("kv_cache_memory_bytes", "gpu_memory_utilization"):
        assert cache_memory(checkpoint, {option: 1}) is None
    sized = cache_memory(checkpoint, {"tensor_parallel_size": 2})
    assert 0 < sized.bytes <= min(sized.free // 4, 4 * GIB)


def test_the_note_names_both_sizes_and_what_sets_another():
    words = CacheMemory(bytes=3 * GIB, free=7 * GIB).in_words
    assert words.startswith("vLLM's cache gets 3.0 GiB of the 7.0 GiB of memory that are free; ")
    assert "VLLM_CPU_KVCACHE_SPACE" in words
