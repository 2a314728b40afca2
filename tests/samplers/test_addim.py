"""aDDIM: the paper's algorithm to the letter, DDIM where nothing is missing, the length it preserves, order, tables."""

import itertools
import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, gaussian, mixture_1d

from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, Heun
from diffusion_lab.samplers.addim import ADDIM, measured_x_var
from diffusion_lab.samplers.base import BoundDenoiser
from diffusion_lab.samplers.grids import uniform_u

VP = INTERPOLANTS["vp"]
TABLE = [(-6.0, 0.3), (0.0, 0.1), (5.0, 0.001)]
LEVEL, NEXT, END = (torch.tensor(level, dtype=D64) for level in (-1.0, 2.0, math.inf))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


# one coordinate, whose noise passes through zero: far from what |eps|^2 is meant for, but the laws must hold
@pytest.mark.parametrize("sampler", [ADDIM(fraction=1.0), ADDIM(table=TABLE)], ids=["fraction", "table"])
def test_laws(sampler):
    laws.check_everything(sampler)


class Wide:
    """The 1-D mixture in each coordinate of a vector, independently."""

    def __init__(self, interpolant):
        self.interpolant = interpolant

    def __call__(self, x, logsnr, cond=None):
        level = logsnr.reshape(-1)[:1].expand(x.numel())
        return mixture_1d(self.interpolant)(x.reshape(-1, 1), level).reshape(x.shape)


def test_order():
    """Order 1 in 64 dimensions: in one, the step jumps by c sqrt(x_var), first order in h, where the noise is zero."""
    starts = torch.special.ndtri((torch.arange(64, dtype=D64) + 0.5) / 64)

    def solve(sampler, interpolant, steps):
        grid = torch.cat([torch.linspace(-5, 5, steps + 1, dtype=D64), END[None]])
        alpha, sigma = interpolant(grid[0])
        x, seen = (starts * torch.sqrt(alpha**2 + sigma**2))[None], {}
        sampler(Wide(interpolant), x, grid, on_step=lambda k, logsnr, x, x0: seen.__setitem__(k, x))
        return seen[steps - 1] / interpolant(grid[steps])[0]

    exact = solve(Heun(), VP, 2000)
    for interpolant in INTERPOLANTS.values():
        for sampler in (ADDIM(), ADDIM(table=TABLE)):
            errors = [
                float((solve(sampler, interpolant, n) - exact).abs().max()) for n in (80, 160, 320, 640)
            ]
            assert abs(math.log2(errors[-2] / errors[-1]) - 1) < 0.35, errors


def algorithm_3(x, x0, x_var, t, s):
    """The paper's step, written from it: cosine schedule, variance-preserving, times t > s."""
    alpha_t, sigma_t = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    alpha_s, sigma_s = math.cos(math.pi * s / 2), math.sin(math.pi * s / 2)
    eps = (x - alpha_t * x0) / sigma_t
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    return torch.stack(
        [
            alpha_s * mean + torch.sqrt(sigma_s**2 + e.numel() / (e**2).sum() * z_var) * e
            for mean, e in zip(x0, eps, strict=True)
        ]
    )


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.75), (0.6, 0.5), (0.2, 0.0)])
def test_agrees_with_the_papers_algorithm(t, s):
    x, x0 = 2 * noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    x[1] *= 3  # lengths are each sample's own
    now, then = (PURE_COSINE(torch.tensor(u, dtype=D64)) for u in (t, s))
    snr = float(torch.exp(now))
    for interpolant in INTERPOLANTS.values():
        # pure noise is infinite where alpha is always 1
        if not math.isfinite(float(interpolant(now)[1])):
            continue
        scale, scale_next = (torch.sqrt(sum(c**2 for c in interpolant(level))) for level in (now, then))

        def denoiser(x, logsnr):
            return x0

        denoiser.interpolant = interpolant
        for sampler, x_var in (
            (ADDIM(adjust_last=True), 0.1 / (2 + snr)),
            (ADDIM(table=[(-3.0, 0.07)], adjust_last=True), 0.07),
        ):
            found, _ = sampler.step(denoiser, scale * x, now, then, None, None)
            torch.testing.assert_close(
                found / scale_next, algorithm_3(x, x0, x_var, t, s), rtol=0, atol=1e-13
            )


def test_nothing_missing_is_ddim_to_the_bit():
    for interpolant in INTERPOLANTS.values():
        for sampler in (ADDIM(fraction=0.0), ADDIM(table=[(0.0, 0.0)])):
            for dtype in (torch.float32, D64):
                assert torch.equal(
                    laws.run(sampler, interpolant, dtype=dtype), laws.run(DDIM(), interpolant, dtype=dtype)
                )


def test_the_last_step_is_the_denoisers_output_unless_asked():
    bound, x = BoundDenoiser(gaussian(VP, 0.5, dim=6), None), noise(2, 6)
    found, _ = ADDIM().step(bound, x, LEVEL, END, None, None)
    assert torch.equal(found, bound.last)
    found, _ = ADDIM(adjust_last=True).step(bound, x, LEVEL, END, None, None)
    # c = 1 and sigma_next = 0: x0 plus noise of mean square x_var
    added = (found - bound.last).square().mean(1)
    torch.testing.assert_close(added, (0.1 / (2 + torch.exp(LEVEL))).expand(2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [2, 4, 16])
def test_preserves_the_length_at_the_share_derived_for_white_data(steps):
    """x0 ~ N(0, I), cosine, x_var = share V with V = sigma^2: |x|^2 = d stays so at

    share = (alpha_next - alpha)^2 / sin^2(theta - theta_next),

    since x0 = alpha x and eps = sigma x make the step multiply x by alpha_next alpha + sigma sqrt(sigma_next^2 + c^2
    share), c = sin(theta - theta_next) / sigma, and (1 - alpha alpha_next)^2 = sigma^2 sigma_next^2 + (alpha -
    alpha_next)^2. DDIM shortens x, and all of V makes it too long, except out of pure noise.
    """
    d, grid = 32, uniform_u(PURE_COSINE, steps)
    denoiser = BoundDenoiser(gaussian(VP, 1.0, dim=d), None)
    x = noise(3, d)
    x *= math.sqrt(d) / x.norm(dim=1, keepdim=True)
    lengths = []
    for now, then in itertools.pairwise(grid[:-1]):
        (alpha, sigma), (alpha_next, _) = VP(now), VP(then)
        share = float((alpha_next - alpha) ** 2) / math.sin(math.pi / 2 / steps) ** 2
        table = [(0.0, share * float(sigma**2))]
        moved, _ = ADDIM(table=table).step(denoiser, x, now, then, None, None)
        torch.testing.assert_close(
            moved.norm(dim=1) ** 2, torch.full((3,), float(d), dtype=D64), rtol=1e-12, atol=0
        )
        full = ADDIM(table=[(0.0, float(sigma**2))]).step(denoiser, x, now, then, None, None)[0]
        ddim = ADDIM(fraction=0.0).step(denoiser, x, now, then, None, None)[0]
        lengths.append((float(ddim.norm()), float(moved.norm()), float(full.norm())))
        x = moved
    assert all(ddim < kept for ddim, kept, _ in lengths), lengths
    # out of pure noise x0 is independent of eps, and the share is 1
    assert all(kept < full for _, kept, full in lengths[1:]), lengths


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_short_steps_preserve_the_length_at_the_share_sigma_squared_and_come_to_ddim(t):
    """That share is the limit of the one above: length is lost at third order in h then, by DDIM at second."""
    denoiser = BoundDenoiser(gaussian(VP, 1.0, dim=32), None)
    x = noise(1, 32)
    x *= math.sqrt(32) / x.norm()
    now = PURE_COSINE(torch.tensor(t, dtype=D64))
    sigma = float(VP(now)[1])
    lost = []
    for h in (0.02, 0.01, 0.005):
        then = PURE_COSINE(torch.tensor(t - h, dtype=D64))
        ends = [
            ADDIM(table=[(0.0, x_var)]).step(denoiser, x, now, then, None, None)[0]
            for x_var in (sigma**4, 0.0)
        ]
        lengths = [float(end.square().mean()) - 1 for end in ends]
        lost.append([*map(abs, lengths), float((ends[0] - ends[1]).norm())])
    adjusted, plain, apart = (
        [math.log2(a / b) for a, b in itertools.pairwise(column)] for column in zip(*lost, strict=True)
    )
    assert adjusted == pytest.approx([3, 3], abs=0.1)
    assert plain == pytest.approx([2, 2], abs=0.1) and apart == pytest.approx([2, 2], abs=0.1)


def test_table_is_linear_between_rows_and_constant_outside():
    levels = torch.tensor([-math.inf, -9.0, -6.0, -3.0, 0.0, 1.0, 9.0], dtype=D64)
    expected = torch.tensor([0.3, 0.3, 0.3, 0.2, 0.1, 0.0802, 0.001], dtype=D64)
    sampler = ADDIM(table=TABLE)
    torch.testing.assert_close(sampler.x_var(levels), expected, rtol=1e-12, atol=0)
    assert sampler.x_var(levels[3]).shape == () and float(sampler.x_var(levels[3])) == pytest.approx(0.2)


def test_measured_table_is_a_share_of_the_posterior_variance():
    x0, levels, n = math.sqrt(0.8) * noise(500, 40), torch.tensor([-4.0, 0.0, 3.0], dtype=D64), 500 * 40
    for interpolant in INTERPOLANTS.values():
        table = measured_x_var(gaussian(interpolant, 0.8, dim=40), x0, levels, rng=SampleRNG(range(500)))
        assert [level for level, _ in table] == levels.tolist()
        for level, value in table:
            assert abs(value / (0.75 / (1 / 0.8 + math.exp(level))) - 1) < 4 * math.sqrt(2 / n)
        ADDIM(table=table)


def test_a_sample_without_noise_stays_finite():
    bound = BoundDenoiser(gaussian(VP, 0.5, dim=3), None)
    x = torch.stack([torch.zeros(3, dtype=D64), torch.ones(3, dtype=D64)])
    found, _ = ADDIM().step(bound, x, LEVEL, NEXT, None, None)
    assert bool(torch.isfinite(found).all()) and not found[0].any()


@pytest.mark.parametrize(
    "options",
    [
        {"fraction": -0.1},
        {"prior_variance": 0.0},
        {"table": []},
        {"table": [(0.0, 0.1), (0.0, 0.2)]},
        {"table": [(0.0, -0.1)]},
        {"table": [(-math.inf, 0.1)]},
    ],
    ids=["fraction", "prior", "empty", "order", "negative", "infinite"],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        ADDIM(**options)
