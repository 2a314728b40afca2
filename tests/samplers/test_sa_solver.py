"""SA-Solver: its special cases, exactness for known data, orders with and without noise, agreement with diffusers."""

import math

import laws
import pytest
import torch
from problems import (
    D64,
    INTERPOLANTS,
    PURE_COSINE,
    exact_ends,
    gaussian,
    mixture_1d,
    mixture_4d,
    observed_order,
)

from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, CountingDenoiser
from diffusion_lab.samplers.dpmpp_sde import DPMSolverPPSDE
from diffusion_lab.samplers.grids import karras, uniform_logsnr, uniform_u
from diffusion_lab.samplers.sa_solver import SASolver
from diffusion_lab.samplers.unipc import UniPC


class Noises:
    """Stands for SampleRNG: hands out given noises in turn."""

    def __init__(self, noises):
        self.noises = iter(noises)

    def randn_like(self, x):
        return next(self.noises)


def solver(predictor_order, corrector_order, tau, variant="exact"):
    return SASolver(
        predictor_order=predictor_order, corrector_order=corrector_order, tau=tau, variant=variant
    )


@pytest.mark.parametrize("variant", ["exact", "bh1"])
@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("orders", [(1, 0), (1, 2), (2, 2), (3, 4), (2, 4), (4, 1)], ids=str)
def test_laws(orders, tau, variant):
    laws.check_everything(solver(*orders, tau, variant))


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_one_call_and_one_noise_a_step_but_none_at_the_last(tau):
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]))
    rng, start = Noises([torch.zeros(2, 1, dtype=D64)] * (6 if tau else 0)), torch.zeros(2, 1, dtype=D64)
    SASolver(tau=tau)(counting, start, uniform_u(PURE_COSINE, 7), rng=rng)
    assert counting.calls == 7 and next(rng.noises, None) is None


# ---- special cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "other"),
    [
        (solver(1, 0, 0.0), DDIM()),
        (solver(1, 0, 1.0), DDIM(eta=1.0)),
        # the line through two outputs integrated exactly, for the same SDE: eta = tau^2
        (solver(2, 0, 0.0), DPMSolverPPSDE(eta=0.0, solver_type="heun")),
        (solver(2, 0, 0.6), DPMSolverPPSDE(eta=0.36, solver_type="heun")),
        (solver(1, 2, 0.0, "bh1"), UniPC(order=1, variant="bh1")),
        (solver(2, 3, 0.0, "bh1"), UniPC(order=2, variant="bh1")),
        (solver(3, 4, 0.0, "bh1"), UniPC(order=3, variant="bh1")),
        (solver(3, 0, 0.0, "bh1"), UniPC(order=3, variant="bh1", corrector=False)),
    ],
    ids=lambda sampler: None,
)
def test_special_cases(sampler, other):
    for interpolant in INTERPOLANTS.values():
        torch.testing.assert_close(
            laws.run(sampler, interpolant), laws.run(other, interpolant), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_known_data_keep_their_law(interpolant, tau):
    # the sampler is then affine in start and noises: its mean is alpha x0 and its variance, the sum of squares of its
    # factors, sigma^2, at every level
    grid, data = torch.tensor([-9.0, -4.0, -3.5, 1.0, 2.0, math.inf], dtype=D64), 0.7

    def known(x, logsnr, cond=None):
        return torch.full_like(x, data)

    known.interpolant = interpolant
    alphas, sigmas = interpolant(grid)
    # row 0 has no noise; row k has one unit of the k-th, the first being the start's
    units = torch.eye(len(grid), dtype=D64)[:, 1:, None]
    start, xs = alphas[0] * data + sigmas[0] * units[:, 0], []
    SASolver(tau=tau)(
        known, start, grid, rng=Noises(units[:, 1:].unbind(1)), on_step=lambda k, logsnr, x, x0: xs.append(x)
    )
    for x, alpha, sigma in zip(xs, alphas[1:], sigmas[1:], strict=True):
        torch.testing.assert_close(x[0], alpha.reshape(1) * data, rtol=1e-12, atol=1e-13)
        variance = ((x[1:] - x[0]) ** 2).sum()
        torch.testing.assert_close(variance, sigma**2, rtol=1e-11, atol=1e-25)


def test_the_corrector_makes_a_difference_with_noise():
    with_it, without = (laws.run(solver(2, c, 1.0), INTERPOLANTS["vp"]) for c in (3, 0))
    assert float((with_it - without).abs().max()) > 1e-3


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("orders", "expected"), [((2, 0), 2), ((2, 3), 3)], ids=str)
def test_order_without_noise(orders, expected):
    # (3, 4) is UniPC's order 4
    laws.check_order(solver(*orders, 0.0), expected)


@pytest.mark.parametrize("order", [2, 3])
def test_order_with_a_corrector_of_the_predictors_order(order):
    # the predictor's error, of one order more once it is in the corrector, is the larger one on coarse grids: order 2
    # goes 2.55, 2.62, 2.54, 2.40, 2.26, 2.15 from 40 to 2560 steps
    vp = INTERPOLANTS["vp"]
    observed, errors = observed_order(solver(order, order, 0.0), vp, exact_ends(), (1280, 2560))
    assert abs(observed - order) <= 0.35, (observed, errors)


@pytest.mark.parametrize("order", [3, 4])
def test_local_order_of_the_predictor_without_noise(order):
    laws.check_local_order(solver(order, 0, 0.0), order)


def moments(sampler, steps, variance):
    """Errors of the factor of the mean, and of the variance, from log-SNR -5 to 5 on Gaussian data: a linear map.

    Row 0 starts at one and meets no noise; row k starts at zero and meets one unit of noise, at step k.
    """
    grid = uniform_logsnr(-5.0, 5.0, steps + 1)
    rows, vp, seen = torch.eye(steps + 1, dtype=D64)[:, :, None], INTERPOLANTS["vp"], {}
    sampler(
        gaussian(vp, variance),
        rows[0],
        grid,
        rng=Noises(rows[1:]),
        on_step=lambda k, logsnr, x, x0: seen.__setitem__(k, x.ravel()),
    )
    (a, s), (a2, s2) = vp(grid[0]), vp(grid[steps])
    start, end, factors = a**2 * variance + s**2, a2**2 * variance + s2**2, seen[steps - 1]
    # alpha_next / alpha is the drift without the score, of which the ODE takes one half and the SDE (1 + tau^2) halves
    mean = a2 / a * (torch.sqrt(end / start) * a / a2) ** (1 + sampler.tau**2)
    return float(factors[0] - mean), float((factors[1:] ** 2).sum() + factors[0] ** 2 * start - end)


# The mean follows the ODE of its tau and converges as without noise. The variance does no better than 2: an output has
# the noise of its x, which the polynomial through earlier outputs does not know.
@pytest.mark.parametrize(
    ("orders", "tau", "mean", "variance"),
    [
        ((1, 0), 0.5, 1, 1),
        ((2, 0), 0.5, 2, 2),
        ((1, 2), 0.5, 2, 2),
        ((3, 4), 0.5, 4, 2),
        ((1, 0), 1.0, math.inf, 1),
        ((2, 0), 1.0, math.inf, 2),
        ((1, 2), 1.0, math.inf, 2),
        ((3, 0), 1.0, math.inf, 2),
        ((3, 4), 1.0, math.inf, 2),
    ],
    ids=str,
)
def test_order_of_mean_and_variance_with_noise(orders, tau, mean, variance):
    coarse, fine = (moments(solver(*orders, tau), steps, 0.25) for steps in (160, 320))
    assert math.log2(coarse[1] / fine[1]) == pytest.approx(variance, abs=0.1)
    if mean == math.inf:
        # with tau = 1, E[x0 | x] is a martingale of the reversed process: on average every step is exact
        assert abs(coarse[0]) < 1e-14 and abs(fine[0]) < 1e-14
    else:
        assert math.log2(coarse[0] / fine[0]) == pytest.approx(mean, abs=0.1)


@pytest.mark.parametrize("sampler", [SASolver(), solver(2, 2, 0.5, "bh1")], ids=["default", "few_steps"])
def test_marginals(sampler):
    laws.check_marginals(sampler)


# ---- public code -----------------------------------------------------------------------------------------------------

GRID = karras(0.05, 20.0, 7.0, 12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "orders", [(1, 1), (1, 2), (1, 4), (2, 2), (2, 3), (2, 4), (3, 1), (3, 3), (3, 4)], ids=str
)
def test_diffusers(orders, tau, monkeypatch):
    # the scheduler has the change for few steps built in, "bh1" here. It never goes to sigma = 0 (it would be 0 times
    # infinity), so the last step is left out.
    pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_sasolver

    vp, steps = INTERPOLANTS["vp"], len(GRID) - 1
    draws = torch.randn(steps + 1, 6, 4, generator=torch.Generator().manual_seed(1), dtype=D64)
    problem, x, ours, theirs = mixture_4d(vp), vp(GRID[0])[1] * draws[0], [], []
    solver(*orders, tau, "bh1")(
        problem, x, GRID, rng=Noises(draws[1:]), on_step=lambda k, logsnr, x, x0: ours.append(x)
    )
    noises = iter(draws[1:])
    monkeypatch.setattr(scheduling_sasolver, "randn_tensor", lambda shape, **options: next(noises))
    scheduler = scheduling_sasolver.SASolverScheduler(
        predictor_order=orders[0],
        corrector_order=orders[1],
        prediction_type="sample",
        tau_func=lambda t: torch.tensor(tau, dtype=D64),
        lower_order_final=False,
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.exp(-GRID / 2)
    for t, logsnr in zip(scheduler.timesteps[:-1], GRID, strict=False):
        x = scheduler.step(problem(x, logsnr), t, x).prev_sample
        theirs.append(x)
    for a, b in zip(ours[:-1], theirs, strict=True):
        assert float((a - b).abs().max()) < 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        {"predictor_order": 0},
        {"predictor_order": 5},
        {"corrector_order": -1},
        {"corrector_order": 5},
        {"tau": -0.1},
        {"tau": math.inf},
        {"tau": math.nan},
        {"variant": "bh2"},
    ],
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError):
        SASolver(**options)


def test_noise_needs_a_source():
    with pytest.raises(ValueError, match="draws noise"):
        SASolver()(mixture_1d(INTERPOLANTS["vp"]), torch.zeros(1, 1, dtype=D64), GRID)
    assert not SASolver(tau=0.0).stochastic
    SASolver(tau=0.0)(mixture_1d(INTERPOLANTS["vp"]), torch.zeros(1, 1, dtype=D64), GRID, rng=SampleRNG([0]))
