"""Stochastic rounding: unbiased, one of the two neighbours, the same bits wherever and however it is computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bio.merging.rounding import Noise, noise_key, round_into

CPU = torch.device("cpu")
COUNT = 1 << 18
HALVES = (torch.bfloat16, torch.float16)


def draw(key: int, first: int = 0, count: int = COUNT) -> torch.Tensor:
    return Noise(COUNT, CPU).draw(key, first, count).clone()


def rounded(values: torch.Tensor, dtype: torch.dtype, key: int = 1) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    round_into(values.clone(), out, draw(key, 0, values.numel()))
    return out


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.003, -0.3333333, 0.02, 3e-5, -7.7e-6, 6.1035e-5, 2.0**-14 * 1.0003])
def test_right_on_average_and_always_a_neighbour(value, dtype):
    values = torch.full((COUNT,), value)
    results = rounded(values, dtype)
    nearest = values[:1].to(dtype)
    step = (torch.nextafter(nearest, nearest * 2) - nearest).abs().double()
    assert len(results.unique()) <= 2
    assert ((results.double() - values.double()).abs() < step).all()
    # The mean of n draws is off by step * sqrt(p (1 - p) / n): six of these are one in a thousand million.
    assert (results.double().mean() - values[0].double()).abs() < 6 * step * 0.5 / COUNT**0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_on_the_grid_stays(dtype):
    grid = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    grid = grid[grid.isfinite()]
    for key in range(20):
        assert torch.equal(rounded(grid.float(), dtype, key).view(torch.int16), grid.view(torch.int16))


@given(st.integers(0, 1 << 40), st.integers(1, 300), st.integers(0, (1 << 64) - 1))
def test_noise_is_a_function_of_place(first, count, key):
    whole = draw(key, first - first % 7, 400)
    assert torch.equal(draw(key, first, count)[: 400 - first % 7], whole[first % 7 :][:count])


def test_noise_is_uniform_and_without_structure():
    noise = draw(noise_key(0, "model.layers.0.self_attn.q_proj.weight")).double()
    assert noise.min() >= 0 and noise.max() <= 65535
    counts = torch.histc(noise, 256, 0, 65536)
    expected = COUNT / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 255 + 6 * (2 * 255) ** 0.5
    centred = (noise - noise.mean()) / noise.std()
    for lag in (1, 2, 3, 64, 1024, 4096):
        assert (centred[lag:] * centred[:-lag]).mean().abs() < 6 / COUNT**0.5


def test_tensors_and_seeds_have_noise_of_their_own():
    keys = [noise_key(seed, name) for seed in (0, 1) for name in ("a", "b")]
    draws = [draw(key).double() - 32767.5 for key in keys]
    for number, one in enumerate(draws):
        for other in draws[:number]:
            assert ((one * other).mean() / one.var()).abs() < 6 / COUNT**0.5


def test_to_nearest_without_noise():
    values = torch.randn(1000)
    out = torch.empty(1000, dtype=torch.bfloat16)
    round_into(values, out, None)
    assert torch.equal(out, values.to(torch.bfloat16))
