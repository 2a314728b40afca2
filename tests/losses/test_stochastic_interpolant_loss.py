"""The bridge's losses: least at the closed form, sources where they come from, and ours where it is our process."""

import math

import pytest
import torch
from bridges import INTERPOLANTS, ExactField, Law
from problems import D64

from diffusion_lab.denoisers import NetworkDenoiser, Velocity
from diffusion_lab.losses import DenoisingLoss, VelocityMSE
from diffusion_lab.losses.stochastic_interpolant import StochasticInterpolantLoss
from diffusion_lab.process import LogitNormal, RectifiedFlow
from diffusion_lab.process.stochastic_interpolant import LinearPath, StochasticInterpolant
from diffusion_lab.rng import StepRNG

SOURCE, DATA = Law(means=(0.4,), stds=(0.8,)), Law(means=(-1.1,), stds=(1.7,))


def rng(total, step=0, positions=slice(None)):
    return StepRNG(seed=0, step=step, positions=positions, total=total)


def pairs(n):
    draw = torch.Generator().manual_seed(0)
    return SOURCE.draw(n, draw)[:, None], DATA.draw(n, draw)[:, None]


@pytest.mark.parametrize("name", ["linear", "trigonometric"])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.8])
def test_the_loss_is_least_at_the_closed_form(name, at):
    exact, n = ExactField(INTERPOLANTS[name], SOURCE, DATA), 40_000
    loss = StochasticInterpolantLoss(interpolant=exact.interpolant)
    source, data = pairs(n)
    # a line added to each exact answer: the gradient at none of it is zero, within what n examples tell
    lines = torch.zeros(2, 2, dtype=D64, requires_grad=True)
    seen = []

    def field(x, tau, cond):
        seen.append(x)
        v, xi = exact(x, tau)
        return v + lines[0, 0] + lines[0, 1] * x, xi + lines[1, 0] + lines[1, 1] * x

    terms = loss(field, data, {"image": source}, rng(n), tau=torch.full((n,), at, dtype=D64))
    (gradients,) = torch.autograd.grad(terms.total, lines)
    for gradient, each in zip(gradients, (terms.velocity, terms.xi), strict=True):
        # an example's gradient is its error times (1, x), and the error independent of x
        error = math.sqrt(2 * float(each.mean()))
        sizes = error * torch.stack([torch.ones((), dtype=D64), seen[0].square().mean().sqrt()])
        assert bool((gradient.abs() < 4 * sizes / math.sqrt(n)).all()), gradient
        # so that an answer wrong by a tenth would show
        assert 4 * error / math.sqrt(n) < 0.1


def test_the_least_losses_are_the_conditional_variances():
    exact, n, at = ExactField(INTERPOLANTS["linear"], SOURCE, DATA), 40_000, 0.3
    source, data = pairs(n)
    terms = StochasticInterpolantLoss(interpolant=exact.interpolant)(
        exact, data, {"image": source}, rng(n), tau=torch.full((n,), at, dtype=D64)
    )
    tau = torch.tensor(at, dtype=D64)
    _, variance, _, slope = exact.moments(tau)
    g, dg = exact.interpolant.latent(tau)
    of_v = 0.8**2 + 1.7**2 + dg**2 - (0.5 * slope) ** 2 / variance
    of_xi = 1 - g**2 / variance
    # the mean of n squared normals has a relative standard error of sqrt(2 / n)
    assert float(terms.velocity.mean()) == pytest.approx(0.5 * float(of_v), rel=4 * math.sqrt(2 / n))
    assert float(terms.xi.mean()) == pytest.approx(0.5 * float(of_xi), rel=4 * math.sqrt(2 / n))
    torch.testing.assert_close(terms.per_example, terms.velocity + terms.xi)
    assert float(terms.total) == pytest.approx(float(terms.per_example.mean()))


class Nonlinear(torch.nn.Module):
    def forward(self, x, logsnr, cond):
        return torch.sin(1.3 * x) + 0.1 * logsnr[:, None]


def test_from_gaussian_noise_it_is_the_loss_of_rectified_flow():
    # the same noise is drawn, so example by example
    interpolant = StochasticInterpolant(path=LinearPath(), noise=0.0)
    schedule, x0 = LogitNormal(), torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=D64)
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=RectifiedFlow(), prediction=Velocity())
    tau = torch.linspace(0.1, 0.9, 6, dtype=D64)

    def field(x, tau, cond):
        return -denoiser.predict(x, interpolant.logsnr(tau), cond).raw, None

    ours = StochasticInterpolantLoss(interpolant=interpolant, margin=0.0)(field, x0, None, rng(6), tau=tau)
    theirs = DenoisingLoss(schedule=schedule, weighting=VelocityMSE(schedule=schedule))(
        denoiser, x0, None, rng(6), logsnr=interpolant.logsnr(tau)
    )
    torch.testing.assert_close(ours.per_example, theirs.per_example, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.logsnr, theirs.logsnr, rtol=0, atol=0)
    assert bool((ours.xi == 0).all())


def test_a_process_sees_its_rows_and_times_keep_the_margin():
    seen = []

    def field(x, tau, cond):
        seen.append((x, tau, cond))
        return torch.zeros_like(x), torch.zeros_like(x)

    loss = StochasticInterpolantLoss(interpolant=INTERPOLANTS["linear"], margin=0.1, label_dropout=0.5)
    source, data = pairs(64)
    cond = {"image": source, "label": torch.arange(64)}
    whole = loss(field, data, cond, rng(64)).per_example
    part = {key: value[1::2] for key, value in cond.items()}
    half = loss(field, data[1::2], part, rng(64, positions=slice(1, None, 2))).per_example
    assert torch.equal(whole[1::2], half)
    tau = seen[0][1]
    assert float(tau.min()) >= 0.1 and float(tau.max()) <= 0.9 and float(tau.max() - tau.min()) > 0.75
    dropped = seen[0][2]["label"] == -1
    assert 0 < int(dropped.sum()) < 64 and torch.equal(seen[0][2]["image"], source)


def test_xi_weight():
    exact = ExactField(INTERPOLANTS["linear"], SOURCE, DATA)
    source, data = pairs(8)
    terms = StochasticInterpolantLoss(interpolant=exact.interpolant, xi_weight=0.25)(
        lambda x, tau, cond: (torch.zeros_like(x), torch.zeros_like(x)), data, {"image": source}, rng(8)
    )
    torch.testing.assert_close(terms.per_example, terms.velocity + 0.25 * terms.xi)


@pytest.mark.parametrize(
    "options",
    [{"margin": -0.1}, {"margin": 0.5}, {"margin": 0.0}, {"xi_weight": -1.0}, {"label_dropout": 2.0}],
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError):
        StochasticInterpolantLoss(interpolant=INTERPOLANTS["linear"], **options)


def test_a_source_of_another_shape_is_refused():
    loss = StochasticInterpolantLoss(interpolant=INTERPOLANTS["linear"])
    with pytest.raises(ValueError, match="shape"):
        loss(lambda x, tau, cond: (x, x), torch.zeros(4, 2), {"image": torch.zeros(4, 1)}, rng(4))
