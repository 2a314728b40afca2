"""Equal steps of rectified flow's time."""

import math

import pytest
import torch
from problems import D64, INTERPOLANTS

from diffusion_lab.samplers import Euler
from diffusion_lab.samplers.base import check_grid
from diffusion_lab.samplers.grids import uniform_time


def test_the_flow_takes_equal_steps_from_noise_to_data():
    grid = uniform_time(8)
    assert torch.equal(check_grid(grid), grid)
    assert grid[0] == -math.inf and grid[4] == 0.0 and grid[-1] == math.inf
    # by hand: t = 3/4 has log-SNR 2 ln(1/3)
    assert float(grid[2]) == pytest.approx(-2 * math.log(3), abs=1e-14)
    alpha, sigma = INTERPOLANTS["rf"](grid)
    t = 1 - torch.arange(9, dtype=D64) / 8
    torch.testing.assert_close(sigma, t, rtol=0, atol=1e-15)
    torch.testing.assert_close(alpha, 1 - t, rtol=0, atol=1e-15)


def test_euler_on_it_is_lius_update():
    """x <- x - v / N with v = E[eps - x0 | x], the only arithmetic of Liu et al."""
    steps, m, c = 6, 0.4, 0.09
    rf = INTERPOLANTS["rf"]

    class Normal:
        """N(m, c) data, E[x0 | x] written out."""

        interpolant = rf

        def __call__(self, x, logsnr, cond=None):
            t = torch.sigmoid(-logsnr / 2)[:, None]
            return m + (1 - t) * c / ((1 - t) ** 2 * c + t**2) * (x - (1 - t) * m)

    start = torch.tensor([[-1.3], [0.2], [2.0]], dtype=D64)
    x = start
    for i in range(steps):
        t = 1 - i / steps
        x0 = m + (1 - t) * c / ((1 - t) ** 2 * c + t**2) * (x - (1 - t) * m)
        x = x - ((x - (1 - t) * x0) / t - x0) / steps
    torch.testing.assert_close(Euler()(Normal(), start, uniform_time(steps)), x, rtol=0, atol=1e-13)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="grid"):
        uniform_time(0)
