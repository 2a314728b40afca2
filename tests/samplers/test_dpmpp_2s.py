"""DPM-Solver++ (2S): the integral it stands for, order, cost, and public code."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, mixture_1d, mixture_4d
from scipy.integrate import quad

from diffusion_lab.samplers.counting import CountingDenoiser
from diffusion_lab.samplers.dpmpp_2s import DPMSolverPP2S
from diffusion_lab.samplers.grids import karras, uniform_u

EVERY_R = pytest.mark.parametrize("r", [0.3, 0.5, 1.0])


@EVERY_R
def test_laws(r):
    laws.check_everything(DPMSolverPP2S(r=r))


@EVERY_R
def test_order_of_convergence(r):
    laws.check_order(DPMSolverPP2S(r=r), 2)


@EVERY_R
def test_a_step_is_the_integral_of_the_line_s_value_half_way(r):
    # x0 linear in the level: D is its value half-way for every r, and x_next the ODE's solution for that constant
    lam, lam_next, vp, calls = -0.4, 0.7, INTERPOLANTS["vp"], []

    def denoiser(x, logsnr):
        calls.append((float(logsnr) / 2, float(x)))
        return torch.full_like(x, 0.3 - 0.8 * float(logsnr) / 2)

    def exact(value, at):
        (_, s), (a2, s2) = (vp(torch.tensor(2 * v, dtype=D64)) for v in (lam, at))
        integral, _ = quad(lambda v: math.exp(v - at) * value, lam, at, epsabs=1e-15)
        return float(s2 / s) * 0.9 + float(a2) * integral

    denoiser.interpolant = vp
    level, level_next = (torch.tensor(2 * v, dtype=D64) for v in (lam, lam_next))
    found, _ = DPMSolverPP2S(r=r).step(
        denoiser, torch.full((1, 1), 0.9, dtype=D64), level, level_next, None, None
    )
    assert float(found) == pytest.approx(exact(0.3 - 0.8 * (lam + lam_next) / 2, lam_next), abs=1e-14)
    between = lam + r * (lam_next - lam)
    assert calls[1] == pytest.approx((between, exact(0.3 - 0.8 * lam, between)), abs=1e-14)


def test_calls():
    for grid, expected in ((laws.GRID, 2 * (len(laws.GRID) - 1) - 1), (uniform_u(PURE_COSINE, 8), 2 * 6 + 2)):
        counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]))
        DPMSolverPP2S()(counting, torch.zeros(2, 1, dtype=D64), grid)
        assert counting.calls == expected


# ---- public code -----------------------------------------------------------------------------------------------------

GRID = karras(0.05, 20.0, 7.0, 12)


def start():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=D64)


def trajectory(sampler, problem, x):
    """The samples after each step."""
    xs = []
    sampler(problem, x, GRID, on_step=lambda k, logsnr, x, x0: xs.append(x))
    return xs


def assert_agree(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("r", [0.3, 0.5, 0.9])
def test_diffusers(r):
    """The single-step scheduler, whose steps are ours and their inner levels in one list; it cannot have r = 1."""
    diffusers = pytest.importorskip("diffusers")
    vp, finite = INTERPOLANTS["vp"], GRID[:-1]
    between = torch.stack([finite[:-1], finite[:-1] + r * finite.diff()], 1).reshape(-1)
    levels = torch.cat([between, GRID[-2:]])
    scheduler = diffusers.DPMSolverSinglestepScheduler(prediction_type="sample", lower_order_final=True)
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.exp(-levels / 2)
    # its own list has an odd number of substeps end in [1, 2] + [1] too
    assert list(scheduler.order_list) == [1, 2] * (len(finite) - 1) + [1]
    problem, x, theirs = mixture_4d(vp), vp(GRID[0])[1] * start(), []
    ours = trajectory(DPMSolverPP2S(r=r), problem, x)
    for t, logsnr in zip(scheduler.timesteps, levels, strict=False):
        x = scheduler.step(problem(x, logsnr), t, x).prev_sample
        theirs.append(x)
    assert_agree(ours, [*theirs[1::2], theirs[-1]], 1e-9)


def test_k_diffusion(sampling):
    problem, sigmas, xs = mixture_4d(INTERPOLANTS["ve"]), torch.exp(-GRID / 2), []
    end = sampling.sample_dpmpp_2s_ancestral(
        lambda x, sigma: problem(x, -2 * torch.log(sigma)),
        sigmas[0] * start(),
        sigmas,
        callback=lambda of: xs.append(of["x"]),
        disable=True,
        eta=0.0,
    )
    assert_agree(trajectory(DPMSolverPP2S(), problem, sigmas[0] * start()), [*xs[1:], end], 1e-12)


@pytest.mark.parametrize("r", [0.0, 1.1, math.nan])
def test_bad_arguments_are_refused(r):
    with pytest.raises(ValueError, match="r in"):
        DPMSolverPP2S(r=r)
