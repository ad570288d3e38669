"""Sweeps and engines for tests."""

from pathlib import Path

import pytest

import mergekit_bio

MAX_AUDIOS = 6


def merge_sweep(base: Path, adapter: Path, out: Path, alphas) -> dict[float, Path]:
    merged = mergekit_bio.merge(base=base, adapter=adapter, alphas=alphas, out=out, dtype="float32", device="cpu")
    return dict(zip(alphas, (checkpoint.path for checkpoint in merged), strict=True))


def start_vllm(checkpoint: Path, **options):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from mergekit_bio.engine.vllm.offline import VllmEngine

    given = {"max_model_len": 2048, "max_audios": MAX_AUDIOS, "enforce_eager": True}
    return VllmEngine(checkpoint, **given | options)
