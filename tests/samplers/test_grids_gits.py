"""GITS: local errors against their definition, dynamic programming against brute force, and the grid's worth."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from problems import D64, INTERPOLANTS, gaussian, mixture_1d

from diffusion_lab.denoisers import GaussianDenoiser
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.base import check_grid
from diffusion_lab.samplers.grids import GITS, FittedGrid, karras, uniform_logsnr
from diffusion_lab.samplers.grids.fitted import cheapest_path
from diffusion_lab.samplers.grids.gits import local_errors

EDM = {"logsnr_min": -2 * math.log(80), "logsnr_max": -2 * math.log(0.002)}
C2 = 0.25


def fit(steps, denoiser, B=64, dim=4, rng=None, progress=None, cond=None, dtype=D64, **settings):
    fitted = GITS(**{"steps": steps, **EDM, **settings})
    rng = SampleRNG(range(B)) if rng is None else rng
    return fitted.fit(denoiser, torch.zeros(B, dim, dtype=dtype), cond, rng, progress)


# ---- the cheapest path -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("edges", [1, 2, 3, 4, 7, 8])
def test_dynamic_programming_against_brute_force(edges, growth):
    draw = np.random.default_rng(edges)
    for _ in range(20):
        cost = draw.exponential(size=(9, 9))
        # below the diagonal lies bait
        cost[np.tril_indices(9)] = -10.0

        def price(path, cost=cost):
            return sum(growth**k * cost[a, b] for k, (a, b) in enumerate(pairwise(path)))

        paths = [[0, *inner, 8] for inner in combinations(range(1, 8), edges - 1)]
        assert cheapest_path(cost, edges, growth) == min(paths, key=price)


def test_a_path_has_a_possible_number_of_edges():
    for edges in (0, 9):
        with pytest.raises(ValueError, match="edges"):
            cheapest_path(np.ones((9, 9)), edges)


# ---- the cost --------------------------------------------------------------------------------------------------------


def defined_errors(denoiser, noise, fine):
    """In y = x / alpha: Euler's step from a point of the fine trajectory, less the point of the trajectory."""
    interpolant = denoiser.interpolant
    points, slopes = [interpolant(fine[0])[1] * noise], []

    def keep(k, logsnr, x, x0):
        alpha, sigma = interpolant(fine[k])
        slopes.append((points[-1] - alpha * x0) / sigma)
        points.append(x)

    DDIM()(denoiser, points[0], fine, on_step=keep)
    y = [x / interpolant(level)[0] for x, level in zip(points, fine, strict=True)]
    rho = torch.exp(-fine / 2)
    c = torch.zeros(len(fine), len(fine), dtype=D64)
    for i in range(len(fine) - 1):
        for j in range(i + 1, len(fine)):
            c[i, j] = (y[i] + (rho[j] - rho[i]) * slopes[i] - y[j]).norm(dim=1).mean()
    return c


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_local_errors_are_what_they_are_called(name):
    denoiser, fine = mixture_1d(INTERPOLANTS[name]), GITS(steps=5, fine_steps=12, **EDM).fine
    c = local_errors(denoiser, torch.zeros(8, 1, dtype=D64), None, SampleRNG(range(8)), fine, 8)
    noise = SampleRNG(range(8)).randn((1,), dtype=D64)
    torch.testing.assert_close(c, defined_errors(denoiser, noise, fine), rtol=0, atol=1e-11)
    # one fine step has no error, and nothing goes backwards
    assert float(c.tril(1).abs().max()) == 0.0 and float(c.triu(2)[0, 2:].min()) > 0.0


def test_single_precision_loses_nothing_at_high_noise():
    """Noise 22,000 times the data: float32 is good to the rounding of the denoiser's outputs, 1e-6 and not 1e-3."""
    fine = GITS(steps=5, fine_steps=20, logsnr_min=-20, logsnr_max=10).fine
    noise = SampleRNG(range(8)).randn((4,))

    def denoiser(dtype):
        zero, variance = torch.zeros(4, dtype=dtype), torch.full((4,), C2, dtype=dtype)
        return GaussianDenoiser(mean=zero, covariance=variance, interpolant=INTERPOLANTS["ve"])

    c = local_errors(denoiser(torch.float32), torch.zeros(8, 4), None, SampleRNG(range(8)), fine, 8)
    exact = defined_errors(denoiser(D64), noise.double(), fine)
    torch.testing.assert_close(c, exact, rtol=1e-5, atol=1e-6)


# ---- the grid --------------------------------------------------------------------------------------------------------


def final_error(grid, c2=C2):
    """1 - std(DDIM's samples) / std(data) for N(0, c2), in closed form: 1 - prod cos(theta_i - theta_(i+1))."""
    theta = torch.atan(torch.exp(-grid / 2) / c2**0.5)
    return 1 - float(torch.cos(theta.diff()).prod())


@pytest.mark.parametrize("growth", [1.0, 1.15])
@pytest.mark.parametrize("steps", [4, 6, 10, 20])
def test_it_beats_the_usual_grids_on_gaussian_data(steps, growth):
    """And comes near the best grid there is, which is uniform in theta."""
    grid = fit(steps, gaussian(INTERPOLANTS["vp"], C2, 4), growth=growth)
    usual = [
        uniform_logsnr(*EDM.values(), steps),
        karras(0.002, 80.0, 7.0, steps),
    ]
    theta = torch.linspace(math.atan(80 / C2**0.5), 0, steps + 1, dtype=D64)
    best = final_error(-2 * torch.log(C2**0.5 * torch.tan(theta)))
    assert best < final_error(grid) < 1.2 * best
    assert final_error(grid) < 0.6 * min(final_error(other) for other in usual)


def test_it_beats_the_usual_grids_on_a_mixture():
    """Distance of DDIM's samples from 2,000 steps of DDIM out of the same, new, noise."""
    denoiser = mixture_1d(INTERPOLANTS["ve"])
    noise = 80 * SampleRNG(range(1000, 1200)).randn((1,), dtype=D64)
    exact = DDIM()(denoiser, noise, karras(0.002, 80.0, 7.0, 2000))
    grids = [fit(8, denoiser, B=200, dim=1), uniform_logsnr(*EDM.values(), 8), karras(0.002, 80.0, 7.0, 8)]
    fitted, *usual = [float((DDIM()(denoiser, noise, grid) - exact).abs().mean()) for grid in grids]
    assert fitted < 0.6 * min(usual), (fitted, usual)


def test_the_grid_is_part_of_the_fine_one():
    denoiser = gaussian(INTERPOLANTS["rf"], C2, 4)
    fine = GITS(steps=5, **EDM).fine
    torch.testing.assert_close(fine, karras(0.002, 80.0, 7.0, 60), rtol=1e-12, atol=1e-12)
    for steps in (2, 5, 60):
        grid = fit(steps, denoiser)
        assert grid.shape == (steps + 1,) and torch.equal(check_grid(grid), grid)
        assert float(grid[0]) == float(fine[0]) and set(grid.tolist()) <= set(fine.tolist())
    assert torch.equal(grid, fine) and isinstance(GITS(steps=5, **EDM), FittedGrid)


def test_growth_moves_levels_towards_the_data():
    denoiser = gaussian(INTERPOLANTS["vp"], C2, 4)
    middle = [float(fit(10, denoiser, growth=growth)[5]) for growth in (0.7, 1.0, 1.5)]
    assert middle == sorted(middle) and middle[0] < middle[-1]


# ---- what every fit owes ---------------------------------------------------------------------------------------------


def test_same_grid_whatever_the_batch_the_interpolant_and_the_past_of_the_rng():
    calls, used = [], SampleRNG(range(64))
    used.randn((4,))
    whole = fit(10, gaussian(INTERPOLANTS["vp"], C2, 4))
    parts = fit(
        10,
        gaussian(INTERPOLANTS["vp"], C2, 4),
        rng=used,
        batch_size=13,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert torch.equal(parts, whole)
    assert calls == [(k + 1, 5 * 60) for k in range(5 * 60)]
    for name in ("ve", "rf"):
        assert torch.equal(fit(10, gaussian(INTERPOLANTS[name], C2, 4)), whole)
    fine = GITS(steps=10, **EDM).fine
    tables = [
        local_errors(
            gaussian(INTERPOLANTS["vp"], C2, 4),
            torch.zeros(64, 4, dtype=D64),
            None,
            SampleRNG(range(64)),
            fine,
            size,
        )
        for size in (64, 13)
    ]
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-12, atol=0)


def test_conditions_are_dealt_out_with_their_samples():
    seen = []

    class Labelled:
        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            assert logsnr.shape == (x.shape[0],)
            seen.append((x.shape[0], cond["label"].tolist()))
            return 0.5 * x

    label = {"label": torch.tensor([7, 8, 9])}
    fit(3, Labelled(), B=3, dim=2, cond=label, fine_steps=4, batch_size=2)
    assert seen == [(2, [7, 8])] * 4 + [(1, [9])] * 4


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"steps": 61},
        {"logsnr_min": -math.inf},
        {"logsnr_max": -9.0},
        {"rho": 0.0},
        {"growth": 0.0},
        {"batch_size": 0},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="GITS"):
        GITS(**{"steps": 10, **EDM, **settings})
