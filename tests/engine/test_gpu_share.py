"""A tower and vLLM on one GPU, by vLLM's own accounts."""

import pytest

from mergekit_bio.engine.vllm.offline import gpu_share

GIB = 1 << 30
#: A CUDA context, of which each of the two processes has one: 0.3 to 0.5 GiB on the GPUs that are around.
CONTEXT = GIB // 2
#: NatureLM-audio's tower in float32, and what a batch of 16 clips needs besides (eval/results/prefix.md).
TOWER, BATCH = 600_000_000, 600_000_000
#: Llama-3.1-8B in bf16, and the keys and values of its 32 layers with 8 heads of 128 for a prompt of 16,384 tokens.
WEIGHTS, LONGEST_PROMPT = 16_060_522_496, 2 * 2 * 32 * 8 * 128 * 16384


def requested(*, free: int, total: int, share: float) -> int:
    """What vLLM takes, in bytes."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config import CacheConfig
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.v1.worker.utils import request_memory

    snapshot = MemorySnapshot(device="cpu", auto_measure=False, free_memory=free - CONTEXT, total_memory=total)
    return request_memory(snapshot, CacheConfig(gpu_memory_utilization=share))


@pytest.mark.parametrize("gib", [23.5, 31.4, 44.4, 79.1, 139.8])  # what cards of 24, 32, 48, 80 and 141 GB have
def test_the_8b_model_fits_beside_the_tower(gib):
    total = int(gib * GIB)
    free = total - CONTEXT - TOWER - BATCH
    takes = requested(free=free, total=total, share=gpu_share(free=free, total=total))
    assert takes - WEIGHTS - LONGEST_PROMPT > 2 * GIB  # for activations and CUDA graphs
    assert takes > 0.85 * total


def test_with_its_usual_share_vllm_would_not_start_on_a_card_of_24_gb():
    total = int(23.5 * GIB)
    free = total - CONTEXT - TOWER - BATCH
    with pytest.raises(ValueError, match="Free memory on device"):
        requested(free=free, total=total, share=0.92)


def test_a_gpu_that_others_use_gives_what_is_free():
    assert gpu_share(free=11 * GIB, total=80 * GIB) == pytest.approx(0.125)
    assert gpu_share(free=GIB // 2, total=80 * GIB) == 0.0
