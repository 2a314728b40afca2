"""DPM-Solver++ (SDE): special cases, the integral it stands for, weak order in closed form, marginals, public code."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, gaussian, mixture_4d
from scipy.integrate import quad

from diffusion_lab.samplers import DDIM, DPMSolverPP2M
from diffusion_lab.samplers.dpmpp_sde import DPMSolverPPSDE
from diffusion_lab.samplers.grids import karras

VARIANTS = {
    f"{order}-{eta}-{solver_type}": DPMSolverPPSDE(order=order, eta=eta, solver_type=solver_type)
    for order, solver_type in ((1, "midpoint"), (2, "midpoint"), (2, "heun"))
    for eta in (0.0, 0.5, 1.0)
}


class Noises:
    """Stands for SampleRNG: hands out given noises in turn."""

    def __init__(self, noises):
        self.noises = iter(noises)

    def randn_like(self, x):
        return next(self.noises)


@pytest.mark.parametrize("sampler", VARIANTS.values(), ids=VARIANTS.keys())
def test_laws(sampler):
    laws.check_everything(sampler)


# ---- special cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "other"),
    [
        (DPMSolverPPSDE(order=1, eta=0.0), DDIM()),
        (DPMSolverPPSDE(order=1, eta=1.0), DDIM(eta=1.0)),
        (DPMSolverPPSDE(order=2, eta=0.0), DPMSolverPP2M()),
    ],
    ids=["ddim", "ancestral", "2m"],
)
def test_special_cases(sampler, other):
    for interpolant in INTERPOLANTS.values():
        torch.testing.assert_close(
            laws.run(sampler, interpolant), laws.run(other, interpolant), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0, 2.0])
def test_heun_integrates_the_line_through_two_outputs(eta):
    vp, (one, two) = INTERPOLANTS["vp"], (torch.full((1, 1), v, dtype=D64) for v in (0.3, -0.4))
    lam, lam1, lam2 = -1.0, -0.2, 0.5

    def denoiser(x, logsnr):
        return one if float(logsnr) == 2 * lam else two

    denoiser.interpolant = vp
    levels = [torch.tensor(2 * v, dtype=D64) for v in (lam, lam1, lam2)]
    zero, sampler = torch.zeros(1, 1, dtype=D64), DPMSolverPPSDE(eta=eta, solver_type="heun")
    _, state = sampler.step(denoiser, zero, levels[0], levels[1], None, Noises([zero]))
    x = torch.full((1, 1), 0.9, dtype=D64)
    found, _ = sampler.step(denoiser, x, levels[1], levels[2], state, Noises([zero]))
    alpha, sigma = vp(levels[2])
    integral, _ = quad(
        lambda at: (1 + eta) * math.exp((1 + eta) * (at - lam2)) * (-0.4 - 0.7 * (at - lam1) / (lam1 - lam)),
        lam1,
        lam2,
        epsabs=1e-14,
    )
    expected = (
        float(sigma / vp(levels[1])[1]) * math.exp(-eta * (lam2 - lam1)) * 0.9 + float(alpha) * integral
    )
    assert float(found) == pytest.approx(expected, abs=1e-12)


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_order_without_noise(solver_type):
    laws.check_order(DPMSolverPPSDE(eta=0.0, solver_type=solver_type), 2)
    laws.check_order(DPMSolverPPSDE(eta=0.0, order=1, solver_type=solver_type), 1)


def moments(sampler, steps, variance):
    """Factor of the mean, and variance, from log-SNR -5 to 5 on Gaussian data, where the sampler is a linear map.

    Row 0 starts at one and meets no noise; row k starts at zero and meets one unit of noise, at step k.
    """
    grid = torch.cat([torch.linspace(-5, 5, steps + 1, dtype=D64), torch.tensor([math.inf], dtype=D64)])
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
    # alpha_next / alpha is the drift without the score, of which the ODE takes one half and the SDE (1 + eta) halves
    mean = a2 / a * (torch.sqrt(end / start) * a / a2) ** (1 + sampler.eta)
    return float(factors[0] - mean), float((factors[1:] ** 2).sum() + factors[0] ** 2 * start - end)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
def test_mean_and_variance_converge_at_the_order_on_gaussian_data(order, solver_type, eta):
    sampler = DPMSolverPPSDE(order=order, eta=eta, solver_type=solver_type)
    coarse, fine = moments(sampler, 160, 0.25), moments(sampler, 320, 0.25)
    assert math.log2(coarse[1] / fine[1]) == pytest.approx(order, abs=0.05)
    if eta == 1.0:
        # E[x0 | x] is a martingale of the reversed process, so on average the line is flat and every step exact
        assert abs(coarse[0]) < 1e-14 and abs(fine[0]) < 1e-14
    else:
        assert math.log2(coarse[0] / fine[0]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(
    "sampler",
    [DPMSolverPPSDE(), DPMSolverPPSDE(eta=0.5, solver_type="heun"), DPMSolverPPSDE(order=1)],
    ids=["2-1.0-midpoint", "2-0.5-heun", "1-1.0"],
)
def test_marginals(sampler):
    laws.check_marginals(sampler)


# ---- public code -----------------------------------------------------------------------------------------------------

GRID = karras(0.05, 20.0, 7.0, 12)


def trajectory(sampler, interpolant, x, noises):
    """The samples after each step."""
    xs = []
    sampler(
        mixture_4d(interpolant), x, GRID, rng=Noises(noises), on_step=lambda k, logsnr, x, x0: xs.append(x)
    )
    return xs


def assert_agree(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < tolerance * max(1.0, float(b.abs().max()))


@pytest.fixture
def draws():
    """Start and noises."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(len(GRID), 6, 4, generator=draw, dtype=D64)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_k_diffusion(solver_type, eta, draws, sampling):
    ve, sigmas, noises = INTERPOLANTS["ve"], torch.exp(-GRID / 2), iter(draws[1:])
    problem, xs = mixture_4d(ve), []
    end = sampling.sample_dpmpp_2m_sde(
        lambda x, sigma: problem(x, -2 * torch.log(sigma)),
        sigmas[0] * draws[0],
        sigmas,
        callback=lambda of: xs.append(of["x"]),
        disable=True,
        eta=eta,
        noise_sampler=lambda sigma, sigma_next: next(noises),
        solver_type=solver_type,
    )
    ours = trajectory(
        DPMSolverPPSDE(eta=eta, solver_type=solver_type), ve, sigmas[0] * draws[0], list(draws[1:])
    )
    assert_agree(ours, [*xs[1:], end], 1e-12)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_diffusers(order, solver_type, draws):
    diffusers = pytest.importorskip("diffusers")
    vp, steps = INTERPOLANTS["vp"], len(GRID) - 1
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=order,
        solver_type=solver_type,
        prediction_type="sample",
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.exp(-GRID / 2)
    problem, x, theirs = mixture_4d(vp), vp(GRID[0])[1] * draws[0], []
    ours = trajectory(DPMSolverPPSDE(order=order, solver_type=solver_type), vp, x, list(draws[1:]))
    for t, logsnr, noise in zip(scheduler.timesteps, GRID, draws[1:], strict=False):
        x = scheduler.step(problem(x, logsnr), t, x, variance_noise=noise).prev_sample
        theirs.append(x)
    # the scheduler computes in float32
    assert_agree(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    "options", [{"order": 3}, {"eta": -0.1}, {"eta": math.inf}, {"eta": math.nan}, {"solver_type": "euler"}]
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError):
        DPMSolverPPSDE(**options)
