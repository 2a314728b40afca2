"""Restart sampling: marginals kept, errors contracted at the rate of the closed form, the authors' counts of calls."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, gaussian, mixture_1d

from diffusion_lab.process import Cosine
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, CountingDenoiser, DPMSolverPP2M, Heun
from diffusion_lab.samplers.edm import ChurnedHeun
from diffusion_lab.samplers.grids import from_sigmas, karras, uniform_u
from diffusion_lab.samplers.restart import Restart

CIFAR = [(3, 2, 0.06, 0.30)]
IMAGENET = [
    (4, 1, 19.35, 40.79),
    (4, 1, 1.09, 1.92),
    (4, 5, 0.59, 1.09),
    (4, 5, 0.30, 0.59),
    (6, 6, 0.06, 0.30),
]
LARGE = [(12, 2, 0.5, 2.0)]
FAR = [(20, 2, 0.02, 1.0), (20, 1, 1.0, 20.0)]
EDM_GRID = karras(0.002, 80.0, 7.0, 18)
VE = INTERPOLANTS["ve"]


class Given:
    """The noise of a linear probe: row k of the batch gets its one at draw k - 1; row 0 gets none."""

    def __init__(self):
        self.drawn = 0

    def randn_like(self, x):
        self.drawn += 1
        z = torch.zeros_like(x)
        if self.drawn < len(x):
            z[self.drawn] = 1.0
        return z


def moments(sampler, interpolant, c, grid, mean=0.0, variance=1.0, draws=32):
    """Exact mean and variance after the last finite level, for x ~ N(mean, variance) at `grid[0]`.

    On N(0, c) a sampler is linear, x_out = a x + sum_k b_k z_k: one batch of unit probes reads off every coefficient.
    """
    x, seen, rng = torch.zeros(draws + 1, 1, dtype=D64), [], Given()
    x[0] = 1.0
    sampler(gaussian(interpolant, c), x, grid, rng=rng, on_step=lambda k, logsnr, x, x0: seen.append(x))
    assert rng.drawn <= draws
    a, b = float(seen[-2][0]), seen[-2][1:]
    return a * mean, a**2 * variance + float((b**2).sum())


@pytest.mark.parametrize(
    "sampler",
    [
        Restart(inner=Heun(), segments=CIFAR),
        Restart(inner=Heun(), segments=FAR),
        Restart(inner=DDIM(), segments=[*LARGE, (5, 1, 0.5, 1.5)]),
        Restart(inner=DPMSolverPP2M(), segments=LARGE, exponent=3.0, noise_scale=1.003),
        Restart(inner=ChurnedHeun(gamma=0.05), segments=LARGE),
        Restart(inner=Heun(), segments=[]),
    ],
    ids=str,
)
def test_laws(sampler):
    laws.check_everything(sampler)


def test_without_restarts_it_is_the_inner_solver():
    for segments in ([], [(3, 0, 0.06, 0.3)]):
        sampler = Restart(inner=Heun(), segments=segments)
        assert not sampler.stochastic
        assert torch.equal(laws.run(sampler, VE), laws.run(Heun(), VE))
    laws.check_order(sampler, 2)


@pytest.mark.parametrize("inner", [pytest.param(Heun(), marks=pytest.mark.slow), DPMSolverPP2M()], ids=str)
def test_marginals(inner):
    # half-way the grid of the law is at rho = 1, where the second segment has just acted
    laws.check_marginals(Restart(inner=inner, segments=[(20, 2, 0.05, 1.0), (20, 2, 1.0, 6.0)]))


def test_exact_score_leaves_the_marginal_invariant():
    c, rho_m, rho_max = 0.3, 0.2, 1.5
    grid = from_sigmas([0.2001, rho_m])
    sampler = Restart(inner=Heun(), segments=[(400, 3, rho_m, rho_max)])
    for interpolant in INTERPOLANTS.values():
        (alpha, sigma), (alpha_m, sigma_m) = interpolant(grid[0]), interpolant(grid[1])
        right, wanted = alpha**2 * c + sigma**2, alpha_m**2 * c + sigma_m**2
        mean, variance = moments(sampler, interpolant, c, grid, mean=0.0, variance=float(right))
        assert mean == 0.0
        assert variance == pytest.approx(float(wanted), rel=1e-5)


def test_a_biased_start_contracts_geometrically():
    """On N(0, c): mean times sqrt(q) and variance error times q each time, q = (c + rho_m^2) / (c + rho_max^2)."""
    c, rho_m, rho_max = 0.3, 0.2, 1.5
    grid, true = from_sigmas([0.2 * (1 + 1e-9), rho_m]), c + rho_m**2
    q = (c + rho_m**2) / (c + rho_max**2)
    previous = math.inf
    for K in range(5):
        sampler = Restart(inner=Heun(), segments=[(400, K, rho_m, rho_max)])
        mean, variance = moments(sampler, VE, c, grid, mean=0.7, variance=2.0 * true)
        assert mean == pytest.approx(0.7 * q ** (K / 2), rel=1e-4)
        assert variance - true == pytest.approx(true * q**K, rel=1e-3, abs=1e-5)
        # W2 between Gaussians in one dimension
        w2 = math.hypot(mean, math.sqrt(variance) - math.sqrt(true))
        assert w2 < 0.55 * previous
        previous = w2


def test_it_is_the_authors_algorithm():
    """The main loop of the authors' edm/generate.py, written out again in EDM's coordinates, with the same noise."""
    denoiser, noise = (
        mixture_1d(VE),
        torch.randn(40, 6, 1, generator=torch.Generator().manual_seed(1), dtype=D64),
    )

    def steps(low, high, n, rho=7.0):
        i = torch.arange(n, dtype=D64)
        return (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho

    def heun(x, t, t_next):
        def slope(x, t):
            return (x - denoiser(x, -2 * torch.log(t))) / t

        d = slope(x, t)
        x_next = x + (t_next - t) * d
        return x + (t_next - t) * (0.5 * d + 0.5 * slope(x_next, t_next)) if t_next > 0 else x_next

    t_steps = torch.cat([steps(0.002, 80.0, 36), torch.zeros(1, dtype=D64)])
    at = {int((t_steps - low).abs().argmin()): (n, k, high) for n, k, low, high in IMAGENET}
    assert len(at) == len(IMAGENET)
    x = 80 * torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=D64)
    y, theirs, used = x, [], 0
    for i in range(36):
        y = heun(y, t_steps[i], t_steps[i + 1])
        if i + 1 in at:
            n, k, high = at[i + 1]
            for _ in range(k):
                inner = steps(float(t_steps[i + 1]), high, n)
                y = y + 1.003 * torch.sqrt(inner[0] ** 2 - inner[-1] ** 2) * noise[used]
                used += 1
                for j in range(n - 1):
                    y = heun(y, inner[j], inner[j + 1])
        theirs.append(y)

    class Tape:
        taken = 0

        def randn_like(self, x):
            self.taken += 1
            return noise[self.taken - 1]

    ours, tape = [], Tape()
    sampler = Restart(inner=Heun(), segments=IMAGENET, noise_scale=1.003)
    sampler(
        denoiser,
        x,
        karras(0.002, 80.0, 7.0, 36),
        rng=tape,
        on_step=lambda k, logsnr, x, x0: ours.append((k, x)),
    )
    assert tape.taken == used == 18 and [k for k, _ in ours] == list(range(36))
    for (_, a), b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("segments", "steps", "calls"), [(CIFAR, 18, 43), (IMAGENET, 36, 203)])
def test_the_authors_counts_of_calls(segments, steps, calls):
    counting = CountingDenoiser(mixture_1d(VE))
    Restart(inner=Heun(), segments=segments)(
        counting, torch.zeros(2, 1, dtype=D64), karras(0.002, 80.0, 7.0, steps), rng=SampleRNG([0, 1])
    )
    assert counting.calls == calls


def test_a_return_ends_at_the_grids_own_level():
    returns = Restart(inner=Heun(), segments=CIFAR)._returns(EDM_GRID)
    ((m, (levels, again)),) = returns.items()
    rho = torch.exp(-0.5 * EDM_GRID)
    assert m == int((rho - 0.06).abs().argmin()) and torch.equal(levels[-1], EDM_GRID[m]) and again == levels
    assert len(levels) == 3 and float(torch.exp(-0.5 * levels[0])) == pytest.approx(0.30)


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="draws noise"):
        Restart(inner=Heun(), segments=CIFAR)(mixture_1d(VE), torch.zeros(1, 1, dtype=D64), EDM_GRID)
    with pytest.raises(ValueError, match="take more steps"):
        laws.run(
            Restart(inner=Heun(), segments=CIFAR), VE, grid=uniform_u(Cosine(logsnr_min=-9, logsnr_max=9), 3)
        )
    for bad in ((1, 1, 0.1, 0.3), (3, -1, 0.1, 0.3), (3, 1, 0.3, 0.1), (3, 1, 0.0, 0.1)):
        with pytest.raises(ValueError, match="restart segment"):
            Restart(inner=Heun(), segments=[bad])
    with pytest.raises(ValueError, match="exponent"):
        Restart(inner=Heun(), segments=CIFAR, exponent=0.0)
    # no level to restart from: the plain solver, as documented
    one = uniform_u(PURE_COSINE, 1)
    vp = INTERPOLANTS["vp"]
    assert torch.equal(
        laws.run(Restart(inner=Heun(), segments=CIFAR), vp, grid=one), laws.run(Heun(), vp, grid=one)
    )
