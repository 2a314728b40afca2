"""DPM-Solver++ (3M): the integral it stands for, its order and what limits it, public code and where that is wrong."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, exact_ends, mixture_1d, mixture_4d, solve
from scipy.integrate import quad

from diffusion_lab.samplers import DPMSolverPP2M
from diffusion_lab.samplers.counting import CountingDenoiser
from diffusion_lab.samplers.dpmpp_3m import DPMSolverPP3M
from diffusion_lab.samplers.dpmpp_sde import DPMSolverPPSDE
from diffusion_lab.samplers.grids import karras, uniform_u

VARIANTS = {
    f"{start}{'-half' * half}": DPMSolverPP3M(start=start, half_curvature=half)
    for start in ("ladder", "midpoint")
    for half in (False, True)
}


@pytest.mark.parametrize("sampler", VARIANTS.values(), ids=VARIANTS.keys())
def test_laws(sampler):
    laws.check_everything(sampler)


# ---- the integral ----------------------------------------------------------------------------------------------------

LAMS = [-1.3, -0.6, 0.1, 0.5]


def parabola(lam):
    return 0.3 - 0.8 * lam + 0.5 * lam**2


class Parabola:
    """A denoiser that answers a polynomial of half the log-SNR, whatever x is."""

    interpolant = INTERPOLANTS["vp"]

    def __call__(self, x, logsnr, cond=None):
        return torch.full_like(x, parabola(0.5 * float(logsnr.reshape(-1)[0])))


def exact(x, lam, lam_next):
    """The ODE's solution for `Parabola`."""
    (_, sigma), (alpha_next, sigma_next) = (
        Parabola.interpolant(torch.tensor(2 * at, dtype=D64)) for at in (lam, lam_next)
    )
    integral, _ = quad(lambda at: math.exp(at - lam_next) * parabola(at), lam, lam_next, epsabs=1e-15)
    return float(sigma_next / sigma) * x + float(alpha_next) * integral


def third_step(sampler):
    """x before and after the third step, the first with two remembered outputs."""
    grid, xs = torch.tensor([*(2 * v for v in LAMS), math.inf], dtype=D64), []
    sampler(
        Parabola(),
        torch.full((1, 1), 0.7, dtype=D64),
        grid,
        on_step=lambda k, logsnr, x, x0: xs.append(float(x)),
    )
    return xs[1], xs[2]


def test_a_quadratic_is_integrated_exactly():
    before, after = third_step(DPMSolverPP3M(lower_order_final=False))
    assert after == pytest.approx(exact(before, LAMS[2], LAMS[3]), abs=1e-14)
    # so is every later step of the other start, whose second step has two outputs already
    xs = []
    DPMSolverPP3M(lower_order_final=False, start="midpoint")(
        Parabola(),
        torch.full((1, 1), 0.7, dtype=D64),
        torch.tensor([*(2 * v for v in LAMS), math.inf], dtype=D64),
        on_step=lambda k, logsnr, x, x0: xs.append(float(x)),
    )
    for k in (1, 2):
        assert xs[k] == pytest.approx(exact(xs[k - 1], LAMS[k], LAMS[k + 1]), abs=1e-14)


def test_half_curvature_misses_half_of_the_quadratic_term():
    before, after = third_step(DPMSolverPP3M(lower_order_final=False, half_curvature=True))
    alpha_next, _ = Parabola.interpolant(torch.tensor(2 * LAMS[3], dtype=D64))
    square, _ = quad(
        lambda at: math.exp(at - LAMS[3]) * 0.5 * (at - LAMS[2]) ** 2, LAMS[2], LAMS[3], epsabs=1e-15
    )
    assert exact(before, LAMS[2], LAMS[3]) - after == pytest.approx(float(alpha_next) * square / 2, abs=1e-14)


def test_lower_order_final_is_of_second_order_on_the_last_step_but_one():
    # the first two steps climb, the third may be of order 3, and leads to the last finite level
    before, after = third_step(DPMSolverPP3M())
    second = DPMSolverPPSDE(eta=0.0, solver_type="heun")
    levels = [torch.tensor(2 * v, dtype=D64) for v in LAMS]
    x = torch.full((1, 1), before, dtype=D64)
    state = (torch.full((1, 1), parabola(LAMS[1]), dtype=D64), levels[2] / 2 - levels[1] / 2)
    expected, _ = second.step(Parabola(), x, levels[2], levels[3], state, None)
    assert after == pytest.approx(float(expected), abs=1e-14)
    assert after != pytest.approx(third_step(DPMSolverPP3M(lower_order_final=False))[1], abs=1e-4)
    # of 15 steps and more none is lowered
    vp, plain = INTERPOLANTS["vp"], DPMSolverPP3M(lower_order_final=False)
    for steps, same in ((14, False), (15, True)):
        grid = uniform_u(PURE_COSINE, steps)
        assert torch.equal(laws.run(DPMSolverPP3M(), vp, grid=grid), laws.run(plain, vp, grid=grid)) is same


# ---- order -----------------------------------------------------------------------------------------------------------


def test_order_with_a_start_of_sufficient_order():
    laws.check_order(DPMSolverPP3M(start="midpoint"), 3)


def test_order_of_one_step_from_exact_history():
    laws.check_local_order(DPMSolverPP3M(), 3)
    laws.check_local_order(DPMSolverPP3M(half_curvature=True), 2)


@pytest.mark.parametrize(
    "sampler",
    [
        DPMSolverPP3M(),
        DPMSolverPP3M(half_curvature=True),
        DPMSolverPP3M(start="midpoint", half_curvature=True),
    ],
    ids=["ladder", "ladder-half", "midpoint-half"],
)
def test_order_is_two_where_a_first_order_step_or_half_the_curvature_limits_it(sampler):
    # both leave errors of order h^2 in all; between 40 and 320 steps their constants hide it (ratios up to 4)
    errors = [float((solve(sampler, INTERPOLANTS["vp"], n) - exact_ends()).abs().max()) for n in (1280, 2560)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.35)


def test_the_ladder_beats_second_order():
    errors = {
        sampler: float((solve(sampler, INTERPOLANTS["vp"], 320) - exact_ends()).abs().max())
        for sampler in (DPMSolverPP3M(), DPMSolverPP3M(half_curvature=True), DPMSolverPP2M())
    }
    right, half, second = errors.values()
    assert right < half / 4 and half < second, errors


@pytest.mark.parametrize(("start", "calls"), [("ladder", 8), ("midpoint", 9)])
def test_calls(start, calls):
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]))
    DPMSolverPP3M(start=start)(counting, torch.zeros(2, 1, dtype=D64), uniform_u(PURE_COSINE, 8))
    assert counting.calls == calls


# ---- public code -----------------------------------------------------------------------------------------------------


def start():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=D64)


def trajectory(sampler, problem, x, grid):
    """The samples after each step."""
    xs = []
    sampler(problem, x, grid, on_step=lambda k, logsnr, x, x0: xs.append(x))
    return xs


def assert_agree(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < tolerance * max(1.0, float(b.abs().max()))


def diffusers_trajectory(problem, x, grid):
    diffusers = pytest.importorskip("diffusers")
    # solver_type is that of the second-order steps, and "heun" our weight of the line
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, solver_type="heun", prediction_type="sample"
    )
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas, xs = torch.exp(-grid / 2), []
    for t, logsnr in zip(scheduler.timesteps, grid, strict=False):
        x = scheduler.step(problem(x, logsnr), t, x).prev_sample
        xs.append(x)
    return xs


@pytest.mark.parametrize("steps", [12, 20])
def test_diffusers_with_half_the_curvature(steps):
    vp, grid = INTERPOLANTS["vp"], karras(0.05, 20.0, 7.0, steps)
    x = vp(grid[0])[1] * start()
    theirs = diffusers_trajectory(mixture_4d(vp), x, grid)
    assert_agree(
        trajectory(DPMSolverPP3M(half_curvature=True), mixture_4d(vp), x, grid),
        theirs,
        1e-5,  # the scheduler computes in float32
    )
    # and with its whole, the two part
    right = trajectory(DPMSolverPP3M(), mixture_4d(vp), x, grid)
    assert max(float((a - b).abs().max()) for a, b in zip(right, theirs, strict=True)) > 1e-3


def test_diffusers_does_not_integrate_a_quadratic():
    """It is not third order: the polynomial through its three outputs is the quadratic, yet its step is not exact.

    Newton's polynomial has the coefficient D2 = (D1_0 - D1_1) / (r0 + r1) of s^2, half the second derivative;
    the step's weight alpha (psi - 1/2), psi = (e^-h - 1 + h) / h^2, is that of s^2 / 2. In the single-step scheduler of
    the same library D2 has the factor 2 that is missing here.
    """
    grid = torch.tensor([*(2 * v for v in [-2.0, *LAMS]), *range(2, 14), math.inf], dtype=D64)
    assert len(grid) > 15, "fewer steps are not all of third order"
    theirs = diffusers_trajectory(Parabola(), torch.full((1, 1), 0.7, dtype=D64), grid)
    # three outputs are known from the third step on; the step from LAMS[2] to LAMS[3] is the fourth
    before, after = float(theirs[2]), float(theirs[3])
    alpha_next, _ = Parabola.interpolant(torch.tensor(2 * LAMS[3], dtype=D64))
    square, _ = quad(
        lambda at: math.exp(at - LAMS[3]) * 0.5 * (at - LAMS[2]) ** 2, LAMS[2], LAMS[3], epsabs=1e-15
    )
    missing = exact(before, LAMS[2], LAMS[3]) - after
    assert missing == pytest.approx(float(alpha_next) * square / 2, abs=1e-6) and missing > 1e-3


def test_k_diffusion_with_half_the_curvature(sampling):
    ve, grid = INTERPOLANTS["ve"], karras(0.05, 20.0, 7.0, 12)
    sigmas, problem, xs = torch.exp(-grid / 2), mixture_4d(ve), []
    end = sampling.sample_dpmpp_3m_sde(
        lambda x, sigma: problem(x, -2 * torch.log(sigma)),
        sigmas[0] * start(),
        sigmas,
        callback=lambda of: xs.append(of["x"]),
        disable=True,
        eta=0.0,
        noise_sampler=lambda sigma, sigma_next: 0.0,
    )
    ours = trajectory(
        DPMSolverPP3M(half_curvature=True, lower_order_final=False), problem, sigmas[0] * start(), grid
    )
    assert_agree(ours, [*xs[1:], end], 1e-12)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="start"):
        DPMSolverPP3M(start="euler")
