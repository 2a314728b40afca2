"""iDDPM's hybrid loss: each term in closed form, the bound of a coarse chain tight, gradients where they belong."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_lab.denoisers import Eps, NetworkDenoiser
from diffusion_lab.denoisers.learned_variance import LearnedVarianceDenoiser
from diffusion_lab.losses import DenoisingLoss, EpsMSE
from diffusion_lab.losses.hybrid import HybridLoss, bin_nll, step_kl
from diffusion_lab.process import (
    Cosine,
    LinearLogSNR,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    marginal,
)
from diffusion_lab.process.gaussian import posterior
from diffusion_lab.rng import StepRNG

D64 = torch.float64
INTERPOLANTS = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]
SCHEDULE = LinearLogSNR(logsnr_min=-6.0, logsnr_max=9.0)
every = pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=lambda i: type(i).__name__)


@every
def test_a_step_is_the_kl_divergence_of_its_two_gaussians(interpolant):
    g = torch.Generator().manual_seed(0)
    x0, eps, guess = (torch.randn(4, 6, generator=g, dtype=D64) for _ in range(3))
    c = torch.linspace(-0.2, 1.2, 24, dtype=D64).reshape(4, 6)
    now = torch.tensor([-4.0, 0.0, 1.0, 5.0], dtype=D64)
    then = now + torch.tensor([0.5, 0.1, 3.0, 1e-3], dtype=D64)
    x = marginal(interpolant, x0, eps, now)
    alpha, sigma = (a[:, None] for a in interpolant(now))
    true, lower, _ = posterior(interpolant, x, x0, now, then)
    mean, _, _ = posterior(interpolant, x, guess, now, then)
    # upper over lower is the forward kernel's variance over the posterior's, both of the variance-preserving process
    (va, vs), (va2, vs2) = VariancePreserving()(now), VariancePreserving()(then)
    forward = vs**2 - (va / va2) ** 2 * vs2**2
    var = lower * (forward / (forward * vs2**2 / vs**2))[:, None] ** c
    exact = kl_divergence(Normal(true, lower.sqrt().expand_as(x)), Normal(mean, var.sqrt()))
    squared_error = ((x - alpha * guess) / sigma - eps) ** 2
    torch.testing.assert_close(step_kl(c, squared_error, now, then), exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("grey_levels", [2, 17, 256])
def test_the_bins_share_out_all_probability(grey_levels):
    values = torch.linspace(-1, 1, grey_levels, dtype=D64)
    for mean, log_var in ((0.3, -1.0), (-0.99, 0.5), (1.4, -2.0)):
        nll = bin_nll(values, torch.full_like(values, mean), torch.full_like(values, log_var), grey_levels)
        # what is below 1e-12 counts as 1e-12
        assert float(torch.exp(-nll).sum()) == pytest.approx(1.0, abs=grey_levels * 1e-12)


def test_a_bin_is_the_integral_of_the_density_and_floors_at_1e_12():
    x0, mean, log_var = (torch.tensor([v], dtype=D64) for v in (2 * 140 / 255 - 1, 0.08, -5.0))
    grid = torch.linspace(float(x0) - 1 / 255, float(x0) + 1 / 255, 10_001, dtype=D64)
    density = torch.exp(Normal(mean, torch.exp(0.5 * log_var)).log_prob(grid))
    exact = -math.log(float(torch.trapezoid(density, grid)))
    assert float(bin_nll(x0, mean, log_var, 256)) == pytest.approx(exact, abs=1e-8)
    far = bin_nll(x0, mean - 0.9, log_var - 4.0, 256)
    assert float(far) == pytest.approx(-math.log(1e-12), rel=1e-12)
    # mirrored, the answer is the same to the last digits, also far out where one end of the bin is at probability 1
    x, m, lv = (torch.tensor([v], dtype=D64) for v in (0.6, 0.0, math.log(0.01)))
    assert float(bin_nll(x, m, lv, 256)) == pytest.approx(float(bin_nll(-x, -m, lv, 256)), rel=1e-12)
    single = bin_nll(x.float(), m.float(), lv.float(), 256)
    assert float(single) == pytest.approx(float(bin_nll(x, m, lv, 256)), rel=1e-5)


class Exact(torch.nn.Module):
    """eps_hat of N(0, S), and for each step t_i -> t_(i-1) the exact fraction, in any interpolant."""

    def __init__(self, S, T):
        super().__init__()
        self.S, self.T = S, T

    def forward(self, x, logsnr, cond):
        vp, S = VariancePreserving(), self.S
        alpha, sigma = vp(logsnr)
        i = (SCHEDULE.inverse(logsnr) * self.T).round()
        eps_hat = (sigma / (alpha**2 * S + sigma**2))[:, None] * x
        a2, s2 = vp(SCHEDULE((i - 1) / self.T))
        total = a2**2 * S + s2**2
        var = total - (alpha / a2 * total) ** 2 / (alpha**2 * S + sigma**2)
        forward = sigma**2 - (alpha / a2) ** 2 * s2**2
        c = torch.log(var / (forward * s2**2 / sigma**2)) / torch.log(sigma**2 / s2**2)
        # the last: variance of x0 given x_1, between that of the second step and sigma_1^2
        a3, s3 = vp(SCHEDULE(2 / self.T * torch.ones_like(i)))
        lower = (s3**2 - (a3 / alpha) ** 2 * sigma**2) * sigma**2 / s3**2
        end = S * sigma**2 / (alpha**2 * S + sigma**2)
        last = torch.log(end / lower) / torch.log(sigma**2 / lower)
        v = 2 * torch.where(i == 1, last, c) - 1
        return torch.cat([eps_hat, v[:, None].expand_as(x)], dim=1)


class Nodes:
    """Stands in for StepRNG: every step once, data and noise at the two Gauss-Hermite nodes, exact for squares."""

    def __init__(self, T):
        self.u = ((torch.arange(T, dtype=D64) + 0.5) / T).repeat_interleave(4)
        self.signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=D64).repeat(
            T, 1
        )

    def stratified(self, tag):
        return self.u

    def randn(self, tag, shape, dtype=D64):
        return self.signs[:, 1:].expand(-1, *shape)


class Nothing:
    def __call__(self, logsnr):
        return torch.zeros_like(logsnr)


def hybrid(**changes):
    settings = {
        "schedule": SCHEDULE,
        "weighting": Nothing(),
        "steps": 10,
        "lambda_vlb": 1.0,
        "grey_levels": 256,
    }
    return HybridLoss(**{**settings, **changes})


@every
@pytest.mark.parametrize("T", [3, 10, 50])
@pytest.mark.parametrize("S", [0.1, 0.9])
def test_with_the_exact_variance_the_bound_is_tight_for_any_number_of_steps(interpolant, S, T):
    denoiser = LearnedVarianceDenoiser(network=Exact(S, T), interpolant=interpolant, prediction=Eps())
    # c_in x is x of the variance-preserving process; bins so fine that the decoder is a density
    nodes, grey = Nodes(T), 2**16
    loss = hybrid(steps=T, grey_levels=grey)
    terms = loss(denoiser, math.sqrt(S) * nodes.signs[:, :1], None, nodes)
    levels = SCHEDULE(torch.arange(1, T + 1, dtype=D64) / T)
    first, final = (float(torch.exp(levels[k])) for k in (0, -1))
    of_steps = terms.per_example.reshape(T, 4).mean(1) / T
    # the KL terms telescope: ½ ln (1 + S SNR_1) / (1 + S SNR_T), whatever T
    kl = 0.5 * math.log((1 + S * first) / (1 + S * final))
    assert float(of_steps[1:].sum()) == pytest.approx(kl, rel=1e-7)
    # and with the ends the bound is the entropy of the data in bins
    prior = 0.5 * math.log1p(S * final)
    entropy = 0.5 * math.log(2 * math.pi * math.e * S) - math.log(2 / (grey - 1))
    assert float(terms.total) + prior == pytest.approx(entropy, abs=2e-6)


class Learned(torch.nn.Module):
    """A network with one set of parameters for each half of its output."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.mean = torch.nn.Parameter(torch.randn(3, 3, generator=g, dtype=D64))
        self.width = torch.nn.Parameter(0.3 * torch.randn(3, 3, generator=g, dtype=D64))

    def forward(self, x, logsnr, cond):
        return torch.cat([x @ self.mean, x @ self.width], dim=1)


def gradients(loss):
    network = Learned()
    denoiser = LearnedVarianceDenoiser(network=network, interpolant=VariancePreserving(), prediction=Eps())
    x0 = torch.tanh(torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=D64))
    rng = StepRNG(seed=0, step=0, positions=slice(None), total=64)
    terms = loss(denoiser, x0, None, rng)
    terms.total.backward()
    return terms, network.mean.grad, network.width.grad


def test_the_mean_learns_from_one_term_and_the_variance_from_the_other():
    weighting = EpsMSE(schedule=SCHEDULE)
    both, mean, width = gradients(hybrid(weighting=weighting, lambda_vlb=0.5))
    simple, simple_mean, simple_width = gradients(hybrid(weighting=weighting, lambda_vlb=0.0))
    bound, bound_mean, bound_width = gradients(hybrid(lambda_vlb=0.5))
    assert torch.equal(mean, simple_mean) and torch.equal(width, bound_width)
    assert not bool(simple_width.any()) and not bool(bound_mean.any())
    assert bool(simple_mean.any()) and bool(bound_width.all())
    torch.testing.assert_close(both.per_example, simple.per_example + bound.per_example)


def test_the_simple_term_is_the_denoising_loss_at_the_steps():
    weighting = EpsMSE(schedule=SCHEDULE)
    loss = hybrid(weighting=weighting, lambda_vlb=0.0)
    terms, _, _ = gradients(loss)
    network = Learned()
    denoiser = LearnedVarianceDenoiser(network=network, interpolant=VariancePreserving(), prediction=Eps())
    x0 = torch.tanh(torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=D64))
    plain = DenoisingLoss(schedule=SCHEDULE, weighting=weighting)(
        denoiser, x0, None, StepRNG(seed=0, step=0, positions=slice(None), total=64), logsnr=terms.logsnr
    )
    assert torch.equal(plain.per_example, terms.per_example)
    # the levels are the ten steps, six or seven times each of 64 stratified draws
    t = SCHEDULE.inverse(terms.logsnr) * 10
    # (the schedule's ends are approached to 1e-12 of u, ten times that of t)
    torch.testing.assert_close(t, t.round(), rtol=0, atol=1.1e-11)
    assert t.round().long().bincount(minlength=11).tolist()[0] == 0
    assert set(t.round().long().bincount().tolist()[1:]) <= {6, 7}


def test_given_levels_count_as_the_drawn_ones():
    loss = hybrid(weighting=EpsMSE(schedule=SCHEDULE))
    drawn, _, _ = gradients(loss)

    class Given(torch.nn.Module):
        def forward(self, *args):
            return loss(*args, logsnr=drawn.logsnr)

    given, _, _ = gradients(Given())
    assert torch.equal(given.per_example, drawn.per_example)


@pytest.mark.parametrize("schedule", [Cosine(), Cosine(logsnr_min=-math.inf, logsnr_max=math.inf)], ids=str)
def test_single_precision_at_a_thousand_steps_is_finite_and_close(schedule):
    network = Learned()
    x0 = torch.tanh(torch.randn(1000, 3, generator=torch.Generator().manual_seed(1)))
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    values = []
    for dtype in (torch.float32, D64):
        denoiser = LearnedVarianceDenoiser(
            network=network.to(dtype), interpolant=VariancePreserving(), prediction=Eps()
        )
        loss = hybrid(schedule=schedule, steps=1000)
        rng = StepRNG(seed=0, step=0, positions=slice(None), total=1000)
        noise = rng.randn("noise", (3,))
        rng.randn = lambda tag, shape, dtype, noise=noise: noise.to(dtype)
        network.zero_grad()
        terms = loss(denoiser, x0.to(dtype), None, rng)
        terms.total.backward()
        assert bool(network.width.grad.isfinite().all()) and network.mean.grad.abs().max() == 0
        values.append((terms.per_example.double().detach(), network.width.grad.double().clone()))
    torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-3, atol=1e-3)


def test_bad_settings_and_denoisers_are_refused():
    for changes in ({"steps": 1}, {"lambda_vlb": -1.0}, {"grey_levels": 1}):
        with pytest.raises(ValueError, match="HybridLoss needs"):
            hybrid(**changes)
    plain = NetworkDenoiser(network=Learned(), interpolant=VariancePreserving(), prediction=Eps())
    with pytest.raises(ValueError, match="LearnedVarianceDenoiser"):
        hybrid()(plain, torch.zeros(4, 3), None, StepRNG(seed=0, step=0, positions=slice(None), total=4))
