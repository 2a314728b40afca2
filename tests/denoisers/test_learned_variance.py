"""A denoiser with a learned variance: a network denoiser in every way, and exact where its fraction is."""

import math

import pytest
import torch

from diffusion_lab.denoisers import Eps, NetworkDenoiser, V
from diffusion_lab.denoisers.learned_variance import LearnedVarianceDenoiser, VarianceOutput
from diffusion_lab.process import Cosine, RectifiedFlow, VarianceExploding, VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.samplers.iddpm import IDDPM, LearnedVariance

D64 = torch.float64
INTERPOLANTS = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]
PURE_COSINE = Cosine(logsnr_min=-math.inf, logsnr_max=math.inf)


class Twice(torch.nn.Module):
    """F and v as two different functions of what the network is shown."""

    def forward(self, x, logsnr, cond):
        return torch.cat([torch.sin(x), 1.5 * torch.cos(x)], dim=1)


class Half(torch.nn.Module):
    def forward(self, x, logsnr, cond):
        return torch.sin(x)


@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=lambda i: type(i).__name__)
def test_it_is_the_network_denoiser_of_the_first_half(interpolant):
    g = torch.Generator().manual_seed(0)
    x, logsnr = torch.randn(4, 3, 2, 2, generator=g, dtype=D64), torch.linspace(-3, 3, 4, dtype=D64)
    both = LearnedVarianceDenoiser(network=Twice(), interpolant=interpolant, prediction=V(), sigma_data=0.7)
    plain = NetworkDenoiser(network=Half(), interpolant=interpolant, prediction=V(), sigma_data=0.7)
    output = both.predict(x, logsnr)
    assert isinstance(both, NetworkDenoiser) and isinstance(both, LearnedVariance)
    assert isinstance(output, VarianceOutput) and output.raw.shape == output.fraction.shape == x.shape
    assert torch.equal(output.x0, plain(x, logsnr)) and torch.equal(both(x, logsnr), output.x0)
    assert torch.equal(output.raw, plain.predict(x, logsnr).raw)
    # the network sees c_in x; c = (v + 1) / 2, and what a sampler is given is cut to [0, 1]
    alpha, sigma = (c[:, None, None, None] for c in interpolant(logsnr))
    v = 1.5 * torch.cos(x / torch.sqrt(0.49 * alpha**2 + sigma**2))
    torch.testing.assert_close(output.fraction, (v + 1) / 2, rtol=0, atol=1e-14)
    x0, c = both.with_variance(x, logsnr)
    assert torch.equal(x0, output.x0) and torch.equal(c, output.fraction.clamp(0, 1))
    assert float(output.fraction.max()) > 1.0 and float(output.fraction.min()) < 0.0


def test_a_network_with_too_few_channels_is_refused_by_what_to_set():
    denoiser = LearnedVarianceDenoiser(network=Half(), interpolant=VariancePreserving(), prediction=Eps())
    with pytest.raises(ValueError, match=r"model\.out_channels=6"):
        denoiser(torch.zeros(2, 3, 4, 4), torch.zeros(2))


class Exact(torch.nn.Module):
    """eps_hat of N(0, S), and the v that makes the next step of `grid` exact."""

    def __init__(self, S, grid):
        super().__init__()
        self.S, self.grid = S, grid

    def forward(self, x, logsnr, cond):
        vp, now = VariancePreserving(), logsnr[0]
        (a, s) = vp(now)
        x0 = a * self.S / (a**2 * self.S + s**2) * x
        then = self.grid[min(int((self.grid <= now + 1e-9).sum()), len(self.grid) - 2)]
        a2, s2 = vp(then)
        # the reverse step of a Gaussian, by conditioning x_next on x alone: no word of lower and upper
        cross, total = (a / a2) * (a2**2 * self.S + s2**2), a**2 * self.S + s**2
        var = (a2**2 * self.S + s2**2) - cross**2 / total
        forward = s**2 - (a / a2) ** 2 * s2**2
        c = torch.log(var / (forward * s2**2 / s**2)) / torch.log(s**2 / s2**2)
        return torch.cat([(x - a * x0) / s, (2 * c - 1).expand_as(x)], dim=1)


@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=lambda i: type(i).__name__)
def test_sampling_with_the_exact_fraction_is_exact_on_a_coarse_grid(interpolant):
    S, n, grid = 0.25, 40_000, uniform_u(PURE_COSINE, 4)[1:]
    denoiser = LearnedVarianceDenoiser(network=Exact(S, grid), interpolant=interpolant, prediction=Eps())
    rng, seen = SampleRNG(range(n // 100)), []
    alpha, sigma = interpolant(grid[0])
    x = torch.sqrt(alpha**2 * S + sigma**2) * rng.randn((100,), dtype=D64)
    IDDPM()(denoiser, x, grid, rng=rng, on_step=lambda k, l, x, x0: seen.append((l, x)))
    for logsnr, x in seen[:-1]:
        alpha, sigma = interpolant(logsnr)
        assert float(x.var() / (alpha**2 * S + sigma**2)) == pytest.approx(1, abs=4 * math.sqrt(2 / n))
