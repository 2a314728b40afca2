"""Power spacing of a schedule's time."""

import math

import pytest
import torch
from problems import D64, PURE_COSINE

from diffusion_lab.process import Cosine, LinearBeta
from diffusion_lab.samplers.base import check_grid
from diffusion_lab.samplers.grids import power_time, uniform_u


def test_the_levels_are_the_powers_of_equal_steps():
    grid = power_time(Cosine(), 4, 2.0)
    u = torch.tensor([1.0, 9 / 16, 1 / 4, 1 / 16], dtype=D64)
    torch.testing.assert_close(grid[:-1], Cosine()(u), rtol=1e-14, atol=0)
    assert float(grid[-1]) == math.inf and torch.equal(check_grid(grid), grid)
    # sigma = sin(pi u / 2) for the unclipped cosine, and pure noise is a legal start
    sigma = torch.sigmoid(-power_time(PURE_COSINE, 4, 2.0)).sqrt()
    torch.testing.assert_close(sigma[:-1], torch.sin(math.pi * u / 2), rtol=1e-12, atol=0)


def test_power_one_is_uniform_and_more_is_finer_towards_the_data():
    assert torch.equal(power_time(Cosine(), 9, 1.0), uniform_u(Cosine(), 9))
    cleanest = [float(power_time(Cosine(), 9, p)[-2]) for p in (0.5, 1.0, 2.0, 3.0)]
    assert cleanest == sorted(cleanest)


def test_it_is_the_grid_of_deis_in_the_time_of_the_score_sde():
    """DEIS: t_i = (t_min^(1/k) + i/N (T^(1/k) - t_min^(1/k)))^k with k = 2, t = s_min + u (1 - s_min)."""
    steps, s_min = 10, 1e-9
    grid = power_time(LinearBeta(s_min=s_min), steps, 2.0)
    i = torch.arange(steps, 0, -1, dtype=D64)
    t = (s_min**0.5 + i / steps * (1 - s_min**0.5)) ** 2
    B = 0.1 * t + 0.5 * 19.9 * t**2
    # s_min^(1/2) = 3e-5 is how far the two can differ, relative to t^(1/2) >= 0.1
    torch.testing.assert_close(grid[:-1], -torch.log(torch.expm1(B)), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("steps", "power"), [(0, 2.0), (5, 0.0), (5, -1.0)])
def test_bad_settings_are_refused(steps, power):
    with pytest.raises(ValueError, match=r"grid|power"):
        power_time(Cosine(), steps, power)
