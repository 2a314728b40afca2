"""Euler-Maruyama: SiT's formula, its identities, weak order in closed form, marginals for every coefficient."""

import math
from dataclasses import dataclass

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, gaussian, mixture_1d
from scipy import stats

from diffusion_lab.process import Cosine, LinearBeta, RectifiedFlow
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import Euler
from diffusion_lab.samplers.dpmpp_sde import DPMSolverPPSDE
from diffusion_lab.samplers.euler_maruyama import KL, Constant, EulerMaruyama, Sigma, SinSquared
from diffusion_lab.samplers.grids import uniform_time, uniform_u

CHOICES = {
    "sigma": Sigma(),
    "sigma_2": Sigma(scale=2.0),
    "sin2": SinSquared(scale=3.0),
    "constant": Constant(scale=0.5),
    "kl": KL(),
    "kl_half": KL(scale=0.5),
}
every = pytest.mark.parametrize("diffusion", CHOICES.values(), ids=CHOICES.keys())


class Noises:
    """Stands for SampleRNG: hands out given noises in turn."""

    def __init__(self, noises):
        self.noises = iter(noises)

    def randn_like(self, x):
        return next(self.noises)


def tensor(*values):
    return torch.tensor(values, dtype=D64)


def logsnr_of(t):
    return 2 * torch.log((1 - t) / t)


@every
@pytest.mark.parametrize("end", [0.0, 0.04])
def test_laws(diffusion, end):
    laws.check_everything(EulerMaruyama(diffusion=diffusion, end=end))


# ---- the formula -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """x = alpha(r) x0 + sigma(r) eps in a time r of its own, with derivatives by autograd."""

    interpolant: object
    schedule: object

    def __call__(self, r):
        """Return alpha, sigma, alpha', sigma' and log-SNR at r (0-d)."""
        r = r.clone().requires_grad_()
        logsnr = self.schedule(r)
        alpha, sigma = self.interpolant(logsnr)
        slopes = [torch.autograd.grad(value, r, retain_graph=True)[0] for value in (alpha, sigma)]
        return tuple(value.detach() for value in (alpha, sigma, *slopes, logsnr))


@dataclass(frozen=True)
class UniformFlow:
    def __call__(self, u):
        return logsnr_of(u)

    def log_density(self, logsnr):
        alpha, sigma = RectifiedFlow()(logsnr)
        return torch.log(alpha * sigma / 2)


# s_min is no time of the process, so that r is the SDE's s up to a factor
VP_BETA = LinearBeta(beta_min=0.1, beta_max=20.0, s_min=1e-3)
PATHS = {
    "linear": Path(INTERPOLANTS["rf"], UniformFlow()),
    "gvp": Path(INTERPOLANTS["vp"], PURE_COSINE),
    "vp": Path(INTERPOLANTS["vp"], VP_BETA),
}


def w_kl(alpha, sigma, alpha_slope, sigma_slope):
    return 2 * (sigma_slope * sigma - alpha_slope * sigma**2 / alpha)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("r", [0.1, 0.35, 0.5, 0.8, 0.97])
def test_score_from_velocity_and_the_reverse_diffusion_from_the_density(path, r):
    alpha, sigma, alpha_slope, sigma_slope, logsnr = path(torch.tensor(r, dtype=D64))
    problem = mixture_1d(path.interpolant)
    x = torch.linspace(-2, 2, 9, dtype=D64)[:, None].requires_grad_()
    (score,) = torch.autograd.grad(problem.log_density(x, logsnr.expand(9)).sum(), x)
    x = x.detach()
    x0 = problem(x, logsnr.expand(9))
    v = alpha_slope * x0 + sigma_slope * (x - alpha * x0) / sigma
    by_velocity = (alpha * v - alpha_slope * x) / (sigma * (alpha_slope * sigma - alpha * sigma_slope))
    torch.testing.assert_close(by_velocity, score, rtol=1e-9, atol=1e-9)
    kl = w_kl(alpha, sigma, alpha_slope, sigma_slope)
    torch.testing.assert_close(
        sigma**2 * torch.exp(-path.schedule.log_density(logsnr)), kl, rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("s", [0.002, 0.1, 0.4, 1.0])
def test_the_reverse_diffusion_of_the_variance_preserving_process_is_beta(s):
    schedule = VP_BETA
    r = torch.tensor((s - schedule.s_min) / (1 - schedule.s_min), dtype=D64)
    beta = schedule.beta_min + s * (schedule.beta_max - schedule.beta_min)
    alpha, sigma, alpha_slope, sigma_slope, logsnr = PATHS["vp"](r)
    # per unit of s, of which r has 1 / (1 - s_min)
    assert float(w_kl(alpha, sigma, alpha_slope, sigma_slope)) / (1 - schedule.s_min) == pytest.approx(beta)
    # and KL is that coefficient: carried over from the flow by dx^2 = (n dx_flow)^2 and dt
    one_minus_t, t = RectifiedFlow()(logsnr)
    t_slope = torch.exp(UniformFlow().log_density(logsnr) - schedule.log_density(logsnr))
    n = alpha + sigma
    w = KL()(one_minus_t, t) * n**2 * t_slope / (1 - schedule.s_min)
    assert float(w) == pytest.approx(beta, rel=1e-9)


@every
def test_a_step_is_sits_formula(diffusion):
    rf, problem = INTERPOLANTS["rf"], mixture_1d(INTERPOLANTS["rf"])
    t, t_next = tensor(0.6)[0], tensor(0.45)[0]
    x, z = torch.linspace(-2, 2, 9, dtype=D64)[:, None], torch.linspace(1, -1, 9, dtype=D64)[:, None]

    def denoiser(x, logsnr):
        return problem(x, logsnr.expand(len(x)))

    denoiser.interpolant = rf
    sampler = EulerMaruyama(diffusion=diffusion)
    found, _ = sampler.step(denoiser, x, logsnr_of(t), logsnr_of(t_next), None, Noises([z]))
    x0 = denoiser(x, logsnr_of(t))
    v = (x - x0) / t
    # alpha = 1 - t, sigma = t
    s = ((1 - t) * v + x) / (t * (-t - (1 - t)))
    w = {
        "Sigma": t,
        "SinSquared": math.sin(math.pi * 0.6) ** 2,
        "Constant": 1.0,
        "KL": 2 * (t + t**2 / (1 - t)),
    }[type(diffusion).__name__] * diffusion.scale
    expected = x + (v - 0.5 * w * s) * (t_next - t) + torch.sqrt(w * (t - t_next)) * z
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "sampler",
    [EulerMaruyama(diffusion=make(scale=0.0)) for make in (Sigma, SinSquared, Constant, KL)]
    + [EulerMaruyama(diffusion=Sigma(), end=1.0)],
    ids=["sigma", "sin2", "constant", "kl", "end"],
)
def test_no_diffusion_is_euler_to_the_bit(sampler):
    for interpolant in INTERPOLANTS.values():
        assert torch.equal(laws.run(sampler, interpolant), laws.run(Euler(), interpolant))


def test_noise_ends_at_the_end():
    class Counted:
        drawn = 0

        def randn_like(self, x):
            self.drawn += 1
            return torch.zeros_like(x)

    rf, rng = INTERPOLANTS["rf"], Counted()
    sampler = EulerMaruyama(diffusion=Sigma(), end=0.25)
    sampler(mixture_1d(rf), torch.zeros(1, 1, dtype=D64), uniform_time(16), rng=rng)
    # from t = 1 down to t = 4 / 16
    assert rng.drawn == 12
    rng.drawn = 0
    EulerMaruyama(diffusion=KL(), end=0.0)(
        mixture_1d(rf), torch.zeros(1, 1, dtype=D64), uniform_time(16), rng=rng
    )
    # not at pure noise, where w_KL is infinite, nor at the last step
    assert rng.drawn == 14


def test_levels_of_each_sample():
    vp, levels = INTERPOLANTS["vp"], tensor(-3.0, 0.5, 4.0)
    problem, nexts = mixture_1d(vp), tensor(-2.0, 1.0, math.inf)
    x, z = tensor(0.3, -0.8, 1.2)[:, None], tensor(1.0, -0.5, 0.7)[:, None]

    def denoiser(x, logsnr):
        return problem(x, logsnr.expand(len(x)))

    denoiser.interpolant = vp
    sampler = EulerMaruyama(diffusion=Sigma())
    whole, _ = sampler.step(denoiser, x, levels, nexts, None, Noises([z]))
    for i in range(3):
        part, _ = sampler.step(denoiser, x[i : i + 1], levels[i], nexts[i], None, Noises([z[i : i + 1]]))
        torch.testing.assert_close(whole[i : i + 1], part, rtol=0, atol=1e-14)


# ---- weak order, on Gaussian data, where the sampler is an affine map ------------------------------------------------

MEAN, VARIANCE = 0.7, 0.25


def end_moments(sampler, levels, spread=1.0, offset=0.0):
    """Errors of mean and variance at the last level, from the exact law at the first, or one beside it.

    Row 0 starts at the mean and meets no noise; row 1 adds a unit to the start; each other row meets one unit of noise.
    """
    grid, steps = torch.cat([levels, tensor(math.inf)]), len(levels) - 1
    rf = INTERPOLANTS["rf"]
    alpha, sigma = rf(grid[0])
    start = (alpha * MEAN + offset).expand(steps + 2, 1).clone()
    start[1] += spread * torch.sqrt(alpha**2 * VARIANCE + sigma**2)
    noises = torch.cat([torch.zeros(steps, 2, 1, dtype=D64), torch.eye(steps, dtype=D64)[:, :, None]], 1)
    seen = {}
    sampler(
        gaussian(rf, VARIANCE, mean=MEAN),
        start,
        grid,
        rng=Noises(noises),
        on_step=lambda k, logsnr, x, x0: seen.__setitem__(k, x.ravel()),
    )
    end = seen[steps - 1]
    alpha, sigma = rf(grid[steps])
    exact = alpha**2 * VARIANCE + sigma**2
    return float(end[0] - alpha * MEAN), float(((end[1:] - end[0]) ** 2).sum() - exact)


@every
def test_weak_order_and_the_same_law_for_every_coefficient(diffusion):
    errors = []
    for steps in (320, 640):
        levels = logsnr_of(torch.linspace(0.95, 0.05, steps + 1, dtype=D64))
        errors.append(end_moments(EulerMaruyama(diffusion=diffusion, end=0.0), levels))
    # started at its own mean, a Gaussian keeps it
    assert max(abs(mean) for mean, _ in errors) < 1e-14
    (_, middle), (_, fine) = errors
    assert math.log2(middle / fine) == pytest.approx(1, abs=0.05)
    # extrapolated to no step at all nothing is left: the law is the flow's whatever w is
    assert abs(2 * fine - middle) < 1e-5


def test_with_a_constant_ratio_it_converges_to_what_dpm_solver_solves():
    # from a start of no spread, so that the variance, too, is that of this one SDE and not every SDE's
    gaps = []
    for steps in (400, 800):
        levels = logsnr_of(torch.linspace(0.9, 0.1, steps + 1, dtype=D64))
        both = (EulerMaruyama(diffusion=KL(scale=0.5), end=0.0), DPMSolverPPSDE(order=2, eta=0.5))
        ours, theirs = (end_moments(sampler, levels, spread=0.0, offset=1.0) for sampler in both)
        gaps.append((ours[0] - theirs[0], ours[1] - theirs[1]))
    for coarse, fine in zip(*gaps, strict=True):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.05)
        assert abs(2 * fine - coarse) < 3e-5 and abs(fine) > 1e-4


# ---- marginals on the mixture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "diffusion",
    [
        pytest.param(diffusion, id=name, marks=pytest.mark.slow if name in ("sigma_2", "kl_half") else [])
        for name, diffusion in CHOICES.items()
    ],
)
def test_marginals(diffusion):
    laws.check_marginals(EulerMaruyama(diffusion=diffusion))


@pytest.mark.parametrize("name", ["ve", "rf"])
@pytest.mark.parametrize("diffusion", [Sigma(), KL()], ids=["sigma", "kl"])
def test_marginals_of_the_other_interpolants(diffusion, name):
    interpolant, n, steps = INTERPOLANTS[name], 20_000, 250
    problem, grid = mixture_1d(interpolant), uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), steps)
    draw, rng, seen = torch.Generator().manual_seed(3), SampleRNG(range(n // 100)), {}

    class Wide:
        """100 samples in each row, so that a stream of noise serves them all."""

        def __init__(self):
            self.interpolant = interpolant

        def __call__(self, x, logsnr, cond=None):
            return problem(x.reshape(-1, 1), logsnr[:1].expand(x.numel())).reshape(x.shape)

    def clean():
        first = torch.rand(n, generator=draw) < 0.3
        centre, spread = torch.where(first, -1.0, 0.8).to(D64), torch.where(first, 0.2, 0.35).to(D64)
        return centre + spread * torch.randn(n, generator=draw, dtype=D64)

    def exact(logsnr):
        return marginal(interpolant, clean(), torch.randn(n, generator=draw, dtype=D64), logsnr)

    x = exact(grid[0]).reshape(n // 100, 100)
    sampler = EulerMaruyama(diffusion=diffusion)
    sampler(
        Wide(), x, grid, rng=rng, on_step=lambda k, logsnr, x, x0: seen.update({k: (logsnr, x.reshape(-1))})
    )
    mean, variance = 0.26, 0.3 * 1.04 + 0.7 * (0.35**2 + 0.64) - 0.26**2
    for k in (steps // 2, steps - 1):
        logsnr, got = seen[k]
        alpha, sigma = interpolant(logsnr)
        m, v = float(alpha) * mean, float(alpha**2 * variance + sigma**2)
        assert abs(float(got.mean()) - m) < 4 * math.sqrt(v / n) + 0.01 * math.sqrt(v)
        assert abs(float(got.var()) / v - 1) < 4 * math.sqrt(2 / n) + 0.01
        assert stats.ks_2samp(got.numpy(), exact(logsnr).numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sigma(scale=-1.0),
        lambda: KL(scale=math.inf),
        lambda: Constant(scale=math.nan),
        lambda: EulerMaruyama(diffusion=Sigma(), end=-0.1),
        lambda: EulerMaruyama(diffusion=Sigma(), end=1.1),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError):
        make()
