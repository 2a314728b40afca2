"""The learned uncertainty: its optimum, what it does to the network's gradient, and what is reported."""

import math

import pytest
import torch

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.losses import DenoisingLoss, LossAware, SigmoidWeighting
from diffusion_lab.losses.uncertainty import LogUncertainty, UncertaintyLoss
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.rng import StepRNG

D64 = torch.float64


def rng(total, step=0):
    return StepRNG(seed=0, step=step, positions=slice(None), total=total)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(
            0.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=D64)
        )

    def forward(self, x, logsnr, cond):
        return x @ self.weight


def problem():
    denoiser = NetworkDenoiser(network=Linear(), interpolant=VariancePreserving(), prediction=V())
    plain = DenoisingLoss(
        schedule=Cosine(logsnr_min=-10, logsnr_max=10), weighting=SigmoidWeighting(bias=1.0)
    )
    x0 = torch.randn(96, 4, generator=torch.Generator().manual_seed(1), dtype=D64)
    return denoiser, plain, x0


def test_at_first_it_is_the_loss_itself():
    denoiser, plain, x0 = problem()
    terms, bare = UncertaintyLoss(loss=plain)(denoiser, x0, None, rng(96)), plain(denoiser, x0, None, rng(96))
    assert torch.equal(terms.per_example, bare.per_example) and torch.equal(terms.total, bare.total)
    assert torch.equal(terms.logsnr, bare.logsnr)


def test_the_networks_gradient_is_the_losss_over_exp_u_and_the_report_stays():
    denoiser, plain, x0 = problem()
    loss = UncertaintyLoss(loss=plain, features=8).double()
    g = torch.Generator().manual_seed(2)
    loss.uncertainty.weight.data = torch.randn(8, generator=g, dtype=D64)
    loss.uncertainty.bias.data.fill_(0.3)
    terms = loss(denoiser, x0, None, rng(96))
    (gradient,) = torch.autograd.grad(terms.total, denoiser.network.weight, retain_graph=True)
    bare = plain(denoiser, x0, None, rng(96))
    u = loss.uncertainty(bare.logsnr).detach()
    (expected,) = torch.autograd.grad((bare.per_example / torch.exp(u)).mean(), denoiser.network.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(terms.per_example, bare.per_example)
    torch.testing.assert_close(terms.total, (bare.per_example / torch.exp(u) + u).mean(), rtol=1e-12, atol=0)


def test_the_best_uncertainty_is_the_logarithm_of_the_expected_loss_at_each_level():
    denoiser, plain, x0 = problem()
    # twelve levels, eight examples at each: the expectation is that of the eight
    levels = torch.linspace(-6, 6, 12, dtype=D64)
    loss = UncertaintyLoss(loss=plain, features=64).double()
    given = levels.repeat_interleave(8)
    expected = plain(denoiser, x0, None, rng(96), logsnr=given).per_example.detach().reshape(12, 8).mean(1)
    assert float(expected.max() / expected.min()) > 10
    parameters = list(loss.uncertainty.parameters())
    search = torch.optim.LBFGS(
        parameters, max_iter=400, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        search.zero_grad()
        total = loss(denoiser, x0, None, rng(96), logsnr=given).total
        total.backward(inputs=parameters)
        return total

    search.step(closure)
    u = loss.uncertainty(levels).detach()
    torch.testing.assert_close(u, torch.log(expected), rtol=0, atol=1e-6)
    # there every level weighs alike: the mean of loss / exp(u) is one
    balanced = (expected / torch.exp(u)).mean()
    assert float(balanced) == pytest.approx(1.0, abs=1e-6)


def test_its_features_are_the_quantiles_of_edm2s_law():
    u = LogUncertainty(features=2000)
    assert u.frequencies.shape == (1000,) and bool((u.frequencies.diff() > 0).all())
    # second moment of N(0, (2 pi / 8)^2)
    assert float(u.frequencies.square().mean().sqrt()) == pytest.approx(2 * math.pi / 8, rel=5e-3)
    u.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    assert u(torch.zeros(3, 5)).shape == (3, 5)
    # sqrt(2) makes each feature's mean square one: over long ranges u has the variance of sum w^2
    values = u(torch.linspace(-4000, 4000, 4001))
    assert float(values.detach().square().mean() / u.weight.detach().square().sum()) == pytest.approx(
        1, rel=0.15
    )
    for features in (0, 3):
        with pytest.raises(ValueError, match="positive even"):
            LogUncertainty(features=features)


def test_autocast_leaves_it_its_digits():
    u = LogUncertainty(features=16)
    u.weight.data.fill_(0.37)
    logsnr = torch.linspace(-5, 5, 11)
    plain = u(logsnr)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(u(logsnr), plain)


def test_its_parameters_are_the_losss_and_its_frequencies_are_not_stored():
    loss = UncertaintyLoss(loss=problem()[1], features=8)
    assert set(loss.state_dict()) == {"uncertainty.weight", "uncertainty.bias"}
    assert sum(p.numel() for p in loss.parameters()) == 9


def test_importance_weights_inside_are_refused():
    with pytest.raises(ValueError, match="LossAware"):
        UncertaintyLoss(loss=LossAware(loss=problem()[1], bins=4))
