"""DPM-Solver: the integrals it stands for, its orders, its cost, and diffusers' single-step scheduler."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, exact_ends, mixture_1d, mixture_4d, observed_order
from scipy.integrate import quad

from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.counting import CountingDenoiser
from diffusion_lab.samplers.dpm_solver import DPMSolver
from diffusion_lab.samplers.grids import karras, uniform_u

ORDERS = pytest.mark.parametrize("order", [1, 2, 3])


@ORDERS
def test_laws(order):
    laws.check_everything(DPMSolver(order=order))


def test_order_one_is_ddim():
    for interpolant in INTERPOLANTS.values():
        assert torch.equal(laws.run(DPMSolver(order=1), interpolant), laws.run(DDIM(), interpolant))


# ---- the integrals ---------------------------------------------------------------------------------------------------


class Noise:
    """A denoiser whose eps is a function of half the log-SNR alone, whatever x is; it keeps the calls it had."""

    interpolant = INTERPOLANTS["vp"]

    def __init__(self, eps):
        self.eps, self.calls = eps, []

    def __call__(self, x, logsnr, cond=None):
        lam = 0.5 * float(logsnr.reshape(-1)[0])
        self.calls.append((lam, float(x)))
        alpha, sigma = self.interpolant(torch.tensor(2 * lam, dtype=D64))
        return (x - sigma * self.eps(lam)) / alpha


def exact(eps, x, lam, lam_next):
    """The ODE's solution where eps depends on the level alone."""
    (alpha, _), (alpha_next, _) = (
        Noise.interpolant(torch.tensor(2 * at, dtype=D64)) for at in (lam, lam_next)
    )
    integral, _ = quad(lambda at: math.exp(-at) * eps(at), lam, lam_next, epsabs=1e-15)
    return float(alpha_next) * (x / float(alpha) - integral)


def test_order_three_integrates_a_line_exactly_at_both_stages():
    lam, lam_next, denoiser = -0.4, 0.7, Noise(lambda at: 0.3 - 0.8 * at)
    level, level_next = (torch.tensor(2 * v, dtype=D64) for v in (lam, lam_next))
    x = torch.full((1, 1), 0.7, dtype=D64)
    found, _ = DPMSolver(order=3).step(denoiser, x, level, level_next, None, None)
    assert float(found) == pytest.approx(exact(denoiser.eps, 0.7, lam, lam_next), abs=1e-14)
    # the third call is at two thirds of the way, and at the solution there
    at, x_2 = denoiser.calls[2]
    assert at == pytest.approx(lam + 2 / 3 * (lam_next - lam), abs=1e-14)
    assert x_2 == pytest.approx(exact(denoiser.eps, 0.7, lam, at), abs=1e-14)
    assert denoiser.calls[1][0] == pytest.approx(lam + 1 / 3 * (lam_next - lam), abs=1e-14)


def test_order_two_takes_the_noise_half_way():
    lam, lam_next, denoiser = -0.4, 0.7, Noise(lambda at: 0.3 - 0.8 * at)
    level, level_next = (torch.tensor(2 * v, dtype=D64) for v in (lam, lam_next))
    x = torch.full((1, 1), 0.7, dtype=D64)
    found, _ = DPMSolver(order=2).step(denoiser, x, level, level_next, None, None)
    middle = denoiser.eps((lam + lam_next) / 2)
    assert float(found) == pytest.approx(exact(lambda at: middle, 0.7, lam, lam_next), abs=1e-14)


# ---- order and cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTERPOLANTS)
@ORDERS
def test_order_of_convergence(order, name):
    observed, errors = observed_order(DPMSolver(order=order), INTERPOLANTS[name], exact_ends())
    assert abs(observed - order) <= 0.35, (observed, errors)


@ORDERS
def test_order_of_one_step(order):
    laws.check_local_order(DPMSolver(order=order), order)


@ORDERS
def test_calls(order):
    for grid, expected in (
        (laws.GRID, order * (len(laws.GRID) - 2) + 1),
        # from pure noise the first step is of order 1 as well
        (uniform_u(PURE_COSINE, 8), order * 6 + 2),
    ):
        counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]))
        DPMSolver(order=order)(counting, torch.zeros(2, 1, dtype=D64), grid)
        assert counting.calls == expected


# ---- public code -----------------------------------------------------------------------------------------------------

GRID = karras(0.05, 20.0, 7.0, 12)


def start():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=D64)


def trajectory(order, problem, x):
    """The samples after each step, and the mixture's answer at the last."""
    xs = []
    DPMSolver(order=order)(problem, x, GRID, on_step=lambda k, logsnr, x, x0: xs.append(x))
    return xs


def assert_agree(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < tolerance * max(1.0, float(b.abs().max()))


def diffusers_trajectory(order, problem, x, solver_types):
    """diffusers' single-step scheduler, whose steps are ours and their inner levels in one list.

    It refuses to end at zero noise in noise prediction (its first order update takes log 0), so it stops at the last
    finite level; `solver_types[k]` is the solver_type of substep k.
    """
    diffusers = pytest.importorskip("diffusers")
    finite = GRID[:-1]
    inner = [finite[:-1] + k / order * finite.diff() for k in range(order)]
    levels = torch.cat([torch.stack(inner, 1).reshape(-1), finite[-1:]])
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        algorithm_type="dpmsolver",
        solver_order=order,
        prediction_type="sample",
        final_sigmas_type="sigma_min",
        lower_order_final=True,
    )
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.exp(-levels / 2)
    scheduler.order_list = list(range(1, order + 1)) * (len(finite) - 1)
    xs = []
    for k, (t, logsnr) in enumerate(zip(scheduler.timesteps, levels, strict=False)):
        scheduler.register_to_config(solver_type=solver_types[k % order])
        x = scheduler.step(problem(x, logsnr), t, x).prev_sample
        xs.append(x)
    return xs[order - 1 :: order]


@pytest.mark.parametrize(
    ("order", "solver_types"),
    [(1, ["midpoint"]), (2, ["midpoint"] * 2), (3, ["midpoint", "heun", "midpoint"])],
    ids=["1", "2", "3"],
)
def test_diffusers(order, solver_types):
    """Order 3 needs two settings: `solver_type` is one for both of its higher stages, the paper's algorithm mixes them.

    The second stage of algorithm 2 weights the change of eps by (r2 / r1) phi(r2 h), as "heun" does ("midpoint" has
    (e^{r2 h} - 1) / 2 for phi, equal to first order); the third uses the last change alone, as "midpoint" does ("heun"
    adds a second derivative). k-diffusion and the authors' code do as the paper.
    """
    vp = INTERPOLANTS["vp"]
    x = vp(GRID[0])[1] * start()
    ours = trajectory(order, mixture_4d(vp), x)
    assert_agree(ours[:-1], diffusers_trajectory(order, mixture_4d(vp), x, solver_types), 1e-9)
    assert torch.equal(ours[-1], mixture_4d(vp)(ours[-2], GRID[-2]))


def test_diffusers_with_one_setting_is_another_third_order_method():
    vp = INTERPOLANTS["vp"]
    x = vp(GRID[0])[1] * start()
    ours = trajectory(3, mixture_4d(vp), x)[:-1]
    for solver_type in ("midpoint", "heun"):
        theirs = diffusers_trajectory(3, mixture_4d(vp), x, [solver_type] * 3)
        apart = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        assert 1e-4 < apart < 0.1, (solver_type, apart)


@pytest.mark.parametrize("order", [2, 3])
def test_k_diffusion(order, sampling):
    ve = INTERPOLANTS["ve"]
    problem, x = mixture_4d(ve), torch.exp(-GRID[0] / 2) * start()
    solver = sampling.DPMSolver(lambda x, sigma: problem(x, -2 * torch.log(sigma)))
    step, theirs, y = {2: solver.dpm_solver_2_step, 3: solver.dpm_solver_3_step}[order], [], x
    # its time is half the log-SNR
    for t, t_next in zip(GRID[:-2] / 2, GRID[1:-1] / 2, strict=True):
        y, _ = step(y, t, t_next)
        theirs.append(y)
    assert_agree(trajectory(order, problem, x)[:-1], theirs, 1e-9)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="order"):
        DPMSolver(order=4)
