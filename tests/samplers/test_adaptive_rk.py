"""Adaptive Runge-Kutta: the error follows the tolerance, samples do not see each other, and calls are counted truly."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, exact_ends, gaussian, mixture_1d, solve

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.samplers import CountingDenoiser
from diffusion_lab.samplers.adaptive_rk import AdaptiveRK
from diffusion_lab.samplers.grids import karras, uniform_u

pytest.importorskip("torchode")

VP = INTERPOLANTS["vp"]


def tight(tolerance, method="dopri5"):
    return AdaptiveRK(rtol=tolerance, atol=tolerance, method=method)


def mixture(interpolant=VP, dim=24, dtype=D64):
    draw = torch.Generator().manual_seed(5)
    return GaussianMixtureDenoiser(
        means=0.5 * torch.randn(8, dim, generator=draw, dtype=D64).to(dtype),
        variances=torch.full((8,), 0.2**2, dtype=dtype),
        weights=torch.ones(8, dtype=dtype),
        interpolant=interpolant,
    )


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "heun"])
def test_laws(method):
    """All but two, which the next tests put in its own terms.

    check_last_step_is_the_denoisers_output wants a report of every level, but the steps are not the grid's.
    check_batch_of_eight_is_three_and_five wants equal bits, but torchode's sums over stages are matrix products.
    """
    for law in laws.LAWS:
        if law not in (
            laws.check_last_step_is_the_denoisers_output,
            laws.check_batch_of_eight_is_three_and_five,
        ):
            law(AdaptiveRK(method=method))


def test_the_last_two_levels_are_reported_and_the_last_is_the_denoisers_output():
    for name, interpolant in INTERPOLANTS.items():
        seen = []
        end = laws.run(AdaptiveRK(), interpolant, on_step=lambda *step, seen=seen: seen.append(step))
        last = len(laws.GRID) - 2
        (k, level, x, before), (j, clean, sample, x0) = seen
        assert (k, j) == (last - 1, last) and level == laws.GRID[-2] and clean == math.inf
        assert torch.equal(end, x0) and torch.equal(end, sample)
        assert torch.equal(end, mixture_1d(interpolant)(x, laws.GRID[-2]))
        # both methods of order 5 end a step with a call at its end, so the output before is of the same point
        torch.testing.assert_close(before, x0, rtol=0, atol=1e-10)
        if name != "ve":
            seen.clear()
            laws.run(
                AdaptiveRK(),
                interpolant,
                grid=uniform_u(PURE_COSINE, 1),
                on_step=lambda *step, seen=seen: seen.append(step),
            )
            assert [step[0] for step in seen] == [0]


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "heun"])
def test_error_follows_the_tolerance(method):
    """Against SciPy's DOP853 at 1e-12 in another coordinate.

    A pair of orders p and p - 1 keeps h^p, the size of its error estimate, at the tolerance. The result, of order p,
    then has an error of h^p too, proportional to the tolerance, and the work grows as tolerance^(-1 / p). Order 5 is
    near that law only where steps are short against the features of the flow: the exponent grows from 0.12 to 0.18.
    """
    exact = exact_ends()
    order = 2 if method == "heun" else 5
    tolerances = [10.0**-k for k in ((3, 4, 5, 6) if order == 2 else (3, 6, 9, 12, 13))]
    errors, calls = [], []
    for tolerance in tolerances:
        errors.append(float((solve(tight(tolerance, method), VP, 1) - exact).abs().max()))
        counting = CountingDenoiser(mixture_1d(VP))
        tight(tolerance, method)(counting, torch.linspace(-2, 2, 9, dtype=D64)[:, None], laws.GRID)
        calls.append(counting.calls)
    slope = math.log(errors[0] / errors[-1]) / math.log(tolerances[0] / tolerances[-1])
    assert slope == pytest.approx(1, abs=0.35), errors
    growth = math.log(calls[-1] / calls[-2]) / math.log(tolerances[-2] / tolerances[-1])
    assert growth == pytest.approx(1 / order, rel=0.35), calls


def test_it_agrees_with_scipy_in_every_interpolant():
    for interpolant in INTERPOLANTS.values():
        assert float((solve(tight(1e-11), interpolant, 1) - exact_ends()).abs().max()) < 1e-9


def test_gaussian_data_are_scaled_as_the_closed_form_says():
    c, grid = 0.3, karras(0.01, 80.0, 7.0, 5)
    for interpolant in INTERPOLANTS.values():
        (alpha, sigma), (alpha_1, sigma_1) = interpolant(grid[0]), interpolant(grid[-2])
        x = torch.linspace(-2, 2, 8, dtype=D64)[:, None] * torch.sqrt(alpha**2 * c + sigma**2)
        seen = []
        tight(1e-10)(gaussian(interpolant, c), x, grid, on_step=lambda k, level, x, x0, s=seen: s.append(x))
        exact = x * torch.sqrt((alpha_1**2 * c + sigma_1**2) / (alpha**2 * c + sigma**2))
        torch.testing.assert_close(seen[0], exact, rtol=0, atol=1e-8)


def test_only_the_ends_of_the_grid_matter():
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(0), dtype=D64)
    fine, coarse = karras(0.01, 80.0, 7.0, 60), karras(0.01, 80.0, 7.0, 2)
    coarse[0], coarse[1] = fine[0], fine[-2]
    assert torch.equal(AdaptiveRK()(mixture(), x, fine), AdaptiveRK()(mixture(), x, coarse))


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("shape", [(24,), (3, 8, 1), (1,)])
def test_samples_do_not_see_their_neighbours(shape, dtype):
    dim, grid = math.prod(shape), karras(0.01, 80.0, 7.0, 10)
    base = mixture(dim=dim, dtype=dtype)

    class Shaped:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return base(x.flatten(1), logsnr).reshape(x.shape)

    x = torch.randn(17, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    # one sample that is hard: other steps than its neighbours need
    x[3] *= 30
    whole = AdaptiveRK()(Shaped(), x, grid)
    parts = torch.cat([AdaptiveRK()(Shaped(), part, grid) for part in x.split([1, 2, 1, 5, 8])])
    assert whole.dtype == dtype and whole.shape == x.shape
    # rounding; a shared step size would show at the size of the tolerance, 1e-5
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12 if dtype == D64 else 1e-6)


def test_float32_is_close_to_float64():
    x, grid = (
        torch.randn(8, 24, generator=torch.Generator().manual_seed(0), dtype=D64),
        karras(0.01, 80.0, 7.0, 10),
    )
    exact = tight(1e-9)(mixture(), x, grid)
    got = AdaptiveRK()(mixture(dtype=torch.float32), x.float(), grid)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-3)


def test_calls_are_counted_truly():
    grid, x = (
        karras(0.01, 80.0, 7.0, 40),
        torch.randn(8, 24, dtype=D64, generator=torch.Generator().manual_seed(0)),
    )
    asked = []

    class Logging:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            asked.append(len(x))
            return mixture()(x, logsnr, cond)

    counting = CountingDenoiser(Logging())
    tight(1e-4)(counting, x, grid)
    # two calls choose the first step, six make a step of order 5, one is the last denoising
    assert counting.calls == len(asked) and set(asked) == {8} and (counting.calls - 3) % 6 == 0


def test_failures_are_errors():
    grid, x = karras(0.01, 80.0, 7.0, 10), torch.ones(3, 24, dtype=D64)
    with pytest.raises(RuntimeError, match="REACHED_MAX_STEPS"):
        AdaptiveRK(max_steps=3)(mixture(), x, grid)

    class Broken:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return torch.full_like(x, math.nan)

    with pytest.raises(RuntimeError, match="gave up on sample 0"):
        AdaptiveRK()(Broken(), x, grid)
    for bad in (dict(rtol=-1.0), dict(rtol=0.0, atol=0.0), dict(max_steps=0), dict(method="euler")):
        with pytest.raises(ValueError, match="AdaptiveRK"):
            AdaptiveRK(**bad)
    with pytest.raises(ValueError, match="grid"):
        AdaptiveRK()(mixture(), x, torch.tensor([1.0, 0.0]))
