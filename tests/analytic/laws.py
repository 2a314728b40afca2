"""What must hold for every sampler. Each law takes a sampler and asserts; test_samplers.py has those of conf/sampler.

check_everything(sampler)     all laws below that need no more than the sampler
check_order(sampler, order)   deterministic ones: the order of convergence, in every interpolant
check_marginals(sampler)      stochastic ones: mean, variance and a two-sample test, at the end and on the way
"""

import math

import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, exact_ends, exact_trajectory, mixture_1d, observed_order
from scipy import stats

from diffusion_lab.process import Cosine
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import Sampler
from diffusion_lab.samplers.base import BoundDenoiser
from diffusion_lab.samplers.grids import uniform_u

GRID = uniform_u(Cosine(logsnr_min=-18, logsnr_max=12), 15)


def run(sampler, interpolant, seeds=range(6), grid=GRID, dtype=D64, cond=None, on_step=None):
    """Sample the 1-D mixture."""
    rng = SampleRNG(seeds)
    x = interpolant(grid[0])[1] * rng.randn((1,), dtype=dtype)
    return sampler(mixture_1d(interpolant), x, grid, cond=cond, rng=rng, on_step=on_step)


def check_same_in_every_interpolant(sampler, atol=1e-12):
    ends = [run(sampler, interpolant) for interpolant in INTERPOLANTS.values()]
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=atol)


def check_batch_of_eight_is_three_and_five(sampler):
    vp = INTERPOLANTS["vp"]
    for dtype in (torch.float32, D64):
        whole = run(sampler, vp, range(8), dtype=dtype)
        parts = [run(sampler, vp, seeds, dtype=dtype) for seeds in (range(3), range(3, 8))]
        assert torch.equal(whole, torch.cat(parts)) and whole.dtype == dtype


def check_last_step_is_the_denoisers_output(sampler):
    seen = []
    end = run(
        sampler, INTERPOLANTS["ve"], on_step=lambda k, logsnr, x, x0: seen.append((k, float(logsnr), x0))
    )
    assert [k for k, _, _ in seen] == list(range(len(GRID) - 1)) and seen[-1][1] == math.inf
    assert torch.equal(end, seen[-1][2])


def check_pure_noise_is_a_legal_start(sampler):
    for name in ("vp", "rf"):
        end = run(sampler, INTERPOLANTS[name], grid=uniform_u(PURE_COSINE, 8))
        assert bool(torch.isfinite(end).all())


def check_one_step_is_legal(sampler):
    for name in ("vp", "rf"):
        assert bool(torch.isfinite(run(sampler, INTERPOLANTS[name], grid=uniform_u(PURE_COSINE, 1))).all())


def check_conditions_reach_the_denoiser(sampler):
    ends = [
        run(sampler, INTERPOLANTS["vp"], cond={"label": torch.full((6,), k)}, grid=uniform_u(PURE_COSINE, 60))
        for k in (0, 1)
    ]
    # class 0 is N(-1, .2^2), class 1 N(.8, .35^2)
    assert bool((ends[0] < -0.2).all()) and bool((ends[1] > -0.5).all())


def check_keeps_nothing(sampler):
    assert isinstance(sampler, Sampler)
    assert torch.equal(run(sampler, INTERPOLANTS["vp"]), run(sampler, INTERPOLANTS["vp"]))


LAWS = (
    check_same_in_every_interpolant,
    check_batch_of_eight_is_three_and_five,
    check_last_step_is_the_denoisers_output,
    check_pure_noise_is_a_legal_start,
    check_one_step_is_legal,
    check_conditions_reach_the_denoiser,
    check_keeps_nothing,
)


def check_everything(sampler):
    for law in LAWS:
        law(sampler)


def check_order(sampler, order, within=0.35, steps=(160, 320), warp=0.0, uneven=0.0):
    """The order test protocol: 1-D mixture, log-SNR -5 to 5, `steps` equal steps, worst of nine starts.

    `warp` and `uneven` make the steps unequal (`problems.order_levels`).
    """
    for name, interpolant in INTERPOLANTS.items():
        observed, errors = observed_order(sampler, interpolant, exact_ends(), steps, warp, uneven)
        assert abs(observed - order) <= within, (name, observed, errors)


def check_local_order(sampler, order, within=0.35, end=1.0, size=0.2):
    """The error of one step from exact points falls as h^(order + 1).

    The low-order steps a multistep method starts with cap its global order (each counts once, at its own order), so a
    method of order 3 shows itself here: its history is made on the exact solution, and one step is measured.
    """
    for name, interpolant in INTERPOLANTS.items():
        errors = []
        for h in (size, size / 2, size / 4):
            levels = [end - k * h for k in reversed(range(order + 1))]
            exact, state = exact_trajectory(interpolant, levels), None
            bound = BoundDenoiser(mixture_1d(interpolant), None)
            for k in range(order):
                now, then = (torch.tensor(level, dtype=D64) for level in levels[k : k + 2])
                x, state = sampler.step(bound, exact[k], now, then, state, None)
            errors.append(float((x - exact[order]).abs().max()))
        observed = math.log2(errors[-2] / errors[-1]) - 1
        assert abs(observed - order) <= within, (name, observed, errors)


def check_marginals(sampler, steps=400, n=20_000, bias=0.01):
    """Samples of the mixture at the end, and half-way of the marginal there, against exact ones.

    Mean and variance within four standard errors plus `bias` for the steps; the two-sample Kolmogorov-Smirnov
    distance below its critical value at p = 1e-4.
    """
    vp, grid = INTERPOLANTS["vp"], uniform_u(PURE_COSINE, steps)
    rng, half = SampleRNG(range(n // 100)), {}

    class Wide:
        """The 1-D problem for 100 coordinates at a time, so that a stream of noise serves 100 samples."""

        interpolant = vp

        def __call__(self, x, logsnr, cond=None):
            level = logsnr.reshape(-1)[:1].expand(x.numel())
            return mixture_1d(vp)(x.reshape(-1, 1), level).reshape(x.shape)

    def keep(k, logsnr, x, x0):
        if k == steps // 2:
            half["x"], half["logsnr"] = x, logsnr

    end = sampler(Wide(), rng.randn((100,), dtype=D64), grid, rng=rng, on_step=keep)
    draw = torch.Generator().manual_seed(1)
    first = torch.rand(n, generator=draw) < 0.3
    clean = torch.where(first, torch.tensor(-1.0), torch.tensor(0.8)).to(D64)
    clean = clean + torch.where(first, 0.2, 0.35) * torch.randn(n, generator=draw, dtype=D64)
    alpha, sigma = vp(half["logsnr"])
    noisy = alpha * clean + sigma * torch.randn(n, generator=draw, dtype=D64)
    mean = 0.3 * -1.0 + 0.7 * 0.8
    variance = 0.3 * (0.2**2 + 1.0) + 0.7 * (0.35**2 + 0.8**2) - mean**2
    cases = (
        ("end", end, clean, mean, variance),
        ("half-way", half["x"], noisy, float(alpha) * mean, float(alpha**2 * variance + sigma**2)),
    )
    for where, got, real, m, v in cases:
        got = got.reshape(-1)
        assert abs(float(got.mean()) - m) < 4 * math.sqrt(v / n) + bias, (where, float(got.mean()), m)
        # the fourth central moment of these is below 3 v^2, so 2 v^2 / n bounds the variance's own variance
        assert abs(float(got.var()) / v - 1) < 4 * math.sqrt(2 / n) + bias, (where, float(got.var()), v)
        test = stats.ks_2samp(got.numpy(), real.numpy())
        assert test.pvalue > 1e-4, (where, test)
