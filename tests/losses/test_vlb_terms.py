"""The terms of the bound against closed forms: the entropy of discrete data, Gaussian data, one pixel by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion_lab.denoisers import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lab.images import to_float
from diffusion_lab.losses import vlb_terms
from diffusion_lab.losses.vlb_terms import (
    Levels,
    bits,
    continuous_diffusion,
    discrete_diffusion,
    prior_kl,
    reconstruction,
)
from diffusion_lab.process import VariancePreserving

D64 = torch.float64
LOW, HIGH = -5.0, 13.3
VDM_LEVELS = Levels(count=256, low=-255 / 256, high=255 / 256)
# the trapezoid rule of a normal density converges faster than any power
EPS = torch.linspace(-8.5, 8.5, 103, dtype=D64)
MASS = torch.exp(-0.5 * EPS**2) / torch.exp(-0.5 * EPS**2).sum()


def tensor(*values):
    return torch.tensor(values, dtype=D64)


def pairs(x, weights):
    """Every value with every node of the noise: `(x0, eps, weight)`, of one dimension."""
    return (
        x.repeat_interleave(len(EPS))[:, None],
        EPS.repeat(len(x))[:, None],
        (weights[:, None] * MASS).flatten(),
    )


def diffusion_by_quadrature(denoiser, x, weights, low, high, nodes=40):
    x0, eps, mass = pairs(x, weights)
    total = 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        logsnr = torch.full((len(x0),), 0.5 * (low + high) + 0.5 * (high - low) * node, dtype=D64)
        slope = torch.full_like(logsnr, low - high)
        total += 0.5 * weight * float((mass * continuous_diffusion(denoiser, x0, eps, logsnr, slope)).sum())
    return total


def parts(levels, x, weights, denoiser, low, high):
    """Prior, reconstruction and diffusion term in nats, of data that take the values `x` of `levels`."""
    x0, eps, mass = pairs(x, weights)
    prior = float((weights * prior_kl(x[:, None], tensor(low)[0])).sum())
    rebuilt = float((mass * reconstruction(x0, eps, tensor(high)[0], levels)).sum())
    return prior, rebuilt, diffusion_by_quadrature(denoiser, x, weights, low, high)


def kl_of_marginal(x, weights, low):
    """KL(q(x_1) || N(0, 1)) of the mixture that discrete data become at logsnr `low`."""
    alpha, sigma = math.sqrt(1 / (1 + math.exp(-low))), math.sqrt(1 / (1 + math.exp(low)))
    z = torch.linspace(-10, 10, 4001, dtype=D64)
    density = (
        weights[:, None]
        * torch.exp(-0.5 * ((z - alpha * x[:, None]) / sigma) ** 2)
        / (sigma * math.sqrt(2 * math.pi))
    ).sum(0)
    normal = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return float((density * torch.log(density / normal)).sum() * (z[1] - z[0]))


@pytest.mark.parametrize("levels", [VDM_LEVELS, Levels()], ids=["vdm", "house"])
def test_eight_bits(levels):
    x = levels.positions(tensor(0.0))
    weights = torch.full_like(x, 1 / 256)
    denoiser = EmpiricalDenoiser(data=x[:, None], interpolant=VariancePreserving())
    half = slice(128)  # the other half is its mirror image
    nats = parts(levels, x[half], 2 * weights[half], denoiser, LOW, HIGH)
    prior, rebuilt, diffusion = (v / math.log(2) for v in nats)
    excess = kl_of_marginal(x, weights, LOW) / math.log(2)
    assert prior + rebuilt + diffusion == pytest.approx(8 + excess, abs=1e-7)
    if levels is VDM_LEVELS:
        # papers, VDM's figures to the digits given
        assert (diffusion, prior, rebuilt) == pytest.approx((7.98797, 0.00163, 0.01041), abs=6e-6)


def test_of_unequal_levels_the_bound_exceeds_the_entropy_by_the_decoder_s_ignorance():
    # the decoder is told no frequencies: its part of the gap is E KL(q(x | x_0) || p(x | x_0))
    levels, weights, low, high = Levels(count=4), tensor(0.1, 0.2, 0.3, 0.4), -3.0, 2.5
    x = levels.positions(tensor(0.0))
    denoiser = GaussianMixtureDenoiser(
        means=x[:, None], variances=torch.zeros_like(x), weights=weights, interpolant=VariancePreserving()
    )
    total = sum(parts(levels, x, weights, denoiser, low, high))
    y = torch.linspace(-6, 6, 4001, dtype=D64)
    likelihood = torch.exp(-0.5 * math.exp(high) * (y - x[:, None]) ** 2) * math.sqrt(
        math.exp(high) / (2 * math.pi)
    )
    joint = weights[:, None] * likelihood
    ignorance = joint * torch.log(joint / joint.sum(0) / (likelihood / likelihood.sum(0)))
    gap = float(ignorance.sum() * (y[1] - y[0]))
    entropy = -float((weights * weights.log()).sum())
    assert gap > 0.01
    assert total == pytest.approx(entropy + kl_of_marginal(x, weights, low) + gap, abs=1e-8)


@pytest.mark.parametrize("c", [0.7, 3.0])
def test_gaussian_data(c):
    a = math.log(c)
    denoiser = GaussianDenoiser(mean=tensor(0.0), covariance=tensor(c), interpolant=VariancePreserving())
    # errors are quadratic in data and noise: two nodes each are exact
    x0 = math.sqrt(c) * tensor(1, 1, -1, -1)[:, None]
    eps = tensor(1, -1, 1, -1)[:, None]

    def softplus(v):
        return math.log1p(math.exp(v))

    exact = 0.5 * (softplus(HIGH + a) - softplus(LOW + a))
    assert exact == pytest.approx(
        0.5 * math.log((1 + c * math.exp(HIGH)) / (1 + c * math.exp(LOW))), rel=1e-12
    )

    def bound(steps):
        logsnr = HIGH + (LOW - HIGH) * torch.arange(steps + 1, dtype=D64) / steps
        t, s = logsnr[1:].repeat_interleave(4), logsnr[:-1].repeat_interleave(4)
        x, e = x0.repeat(steps, 1), eps.repeat(steps, 1)
        value = float(discrete_diffusion(denoiser, x, e, t, s, steps).mean())
        snr = torch.exp(logsnr)
        written = 0.5 * float(((snr[:-1] - snr[1:]) * c / (1 + c * snr[1:])).sum())
        assert value == pytest.approx(written, rel=1e-10)
        return value

    excess = [bound(100 * 2**k) - exact for k in range(5)]
    assert all(later <= earlier for earlier, later in pairwise(excess)) and excess[-1] > 0
    scaled = [100 * 2**k * value for k, value in enumerate(excess)]
    # T (L_T - L_inf) approaches its limit as 1 / T
    changes = [b - a for a, b in pairwise(scaled)]
    assert abs(changes[-1]) < 0.01 * scaled[-1]
    assert changes[-1] / changes[-2] == pytest.approx(0.5, abs=0.02)
    if c == 0.7:
        assert exact == pytest.approx(6.4693, abs=5e-5)
        assert excess[:4] == pytest.approx([0.580, 0.281, 0.139, 0.069], abs=1e-3)


def test_prior_written_out_and_against_torch():
    x0 = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=D64)
    for logsnr in (-8.0, -1.0, 2.0):
        alpha, sigma = VariancePreserving()(tensor(logsnr)[0])
        q = torch.distributions.Normal(alpha * x0, sigma.expand_as(x0))
        expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0 * x0, 1 + 0 * x0)).mean(
            1
        )
        torch.testing.assert_close(prior_kl(x0, tensor(logsnr)[0]), expected, rtol=1e-12, atol=1e-15)
    exact = prior_kl(x0, tensor(-13.0)[0])
    torch.testing.assert_close(prior_kl(x0.float(), torch.tensor(-13.0)).double(), exact, rtol=0, atol=1e-9)


def some_pixels(levels, shape=(6, 3, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, levels.count, shape, generator=g)
    return levels.positions(tensor(0.0))[index], torch.randn(shape, generator=g, dtype=D64), index


@pytest.mark.parametrize("logsnr", [-2.0, 4.0, 13.3])
def test_reconstruction_written_out(logsnr):
    x0, eps, index = some_pixels(Levels())
    y = x0 + math.exp(-logsnr / 2) * eps
    logits = -0.5 * math.exp(logsnr) * (y[..., None] - Levels().positions(y)) ** 2
    expected = -torch.log_softmax(logits, -1).gather(-1, index[..., None])[..., 0].flatten(1).mean(1)
    value = reconstruction(x0, eps, tensor(logsnr)[0], Levels())
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    # and in float32, where the formula as it stands would lose its digits
    single = reconstruction(x0.float(), eps.float(), torch.tensor(logsnr), Levels())
    torch.testing.assert_close(single.double(), value, rtol=2e-5, atol=1e-6)


def test_reconstruction_piece_by_piece_is_the_same(monkeypatch):
    x0, eps, _ = some_pixels(Levels())
    results = []
    for table in (2**25, 2 * 12 * 256):
        monkeypatch.setattr(vlb_terms, "TABLE", table)
        logsnr = tensor(8.0)[0].requires_grad_()
        value = reconstruction(x0, eps, logsnr, Levels())
        results.append((value, torch.autograd.grad(value.sum(), logsnr)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)
    assert float(results[0][1]) < 0


def test_levels_are_those_of_the_house_s_images():
    levels = Levels()
    every = to_float(torch.arange(256, dtype=torch.uint8))
    assert torch.equal(levels.indices(every), torch.arange(256))
    torch.testing.assert_close(levels.positions(every), every, rtol=0, atol=2e-7)
    k = torch.arange(256, dtype=D64)
    torch.testing.assert_close(VDM_LEVELS.positions(k), 2 * (k + 0.5) / 256 - 1, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="not among the 256 levels"):
        VDM_LEVELS.indices(every)
    with pytest.raises(ValueError, match="not among"):
        levels.indices(torch.tensor([1.01]))
    with pytest.raises(ValueError, match="Levels needs"):
        Levels(count=1)


def test_bits():
    assert float(bits(tensor(math.log(256)))) == pytest.approx(8.0, rel=1e-15)
