"""The loss in every form is the same number, and -ELBO is the entropy."""

import math

import pytest
import torch

from diffusion_lab.denoisers import EDM, X0, Eps, GaussianDenoiser, NetworkDenoiser, Score, V, Velocity
from diffusion_lab.losses import ELBO, DenoisingLoss, NoiseLevels, SigmoidWeighting, drop_labels, eps_error
from diffusion_lab.process import Cosine, LinearLogSNR, RectifiedFlow, VarianceExploding, VariancePreserving
from diffusion_lab.rng import StepRNG

PREDICTIONS = [X0(), Eps(), V(), Velocity(), Score(), EDM(sigma_data=0.7)]
INTERPOLANTS = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]
D64 = torch.float64


def rng(total, step=0, positions=slice(None)):
    return StepRNG(seed=0, step=step, positions=positions, total=total)


class Nonlinear(torch.nn.Module):
    def forward(self, x, logsnr, cond):
        return torch.sin(1.3 * x) + 0.1 * logsnr[:, None]


class FromX0:
    """A network denoiser known by its x0 alone."""

    def __init__(self, denoiser):
        self.denoiser, self.interpolant = denoiser, denoiser.interpolant

    def __call__(self, x, logsnr, cond=None):
        return self.denoiser(x, logsnr, cond)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=lambda i: type(i).__name__)
def test_raw_x0_and_eps_forms_agree_per_example(prediction, interpolant):
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 5, generator=g, dtype=D64) for _ in range(2))
    logsnr = torch.linspace(-6, 6, 6, dtype=D64)
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=interpolant, prediction=prediction)
    by_raw = eps_error(denoiser, x0, eps, logsnr)
    by_x0 = eps_error(FromX0(denoiser), x0, eps, logsnr)
    alpha, sigma = (c[:, None] for c in interpolant(logsnr))
    x = alpha * x0 + sigma * eps
    by_eps = ((x - alpha * denoiser(x, logsnr)) / sigma - eps).square().mean(1)
    torch.testing.assert_close(by_raw, by_x0, rtol=1e-7, atol=0)
    torch.testing.assert_close(by_raw, by_eps, rtol=1e-7, atol=0)


class Quadrature:
    """Stands in for StepRNG: midpoint levels, and noise at the two Gauss-Hermite nodes, exact for squared errors."""

    def __init__(self, levels):
        u = (torch.arange(levels, dtype=D64) + 0.5) / levels
        self.u = u.repeat_interleave(4)
        self.signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=D64).repeat(
            levels, 1
        )

    def stratified(self, tag):
        return self.u

    def randn(self, tag, shape, dtype=D64):
        return self.signs[:, 1:].expand(-1, *shape)

    def data(self, c):
        return math.sqrt(c) * self.signs[:, :1]


@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=lambda i: type(i).__name__)
@pytest.mark.parametrize(
    "schedule", [Cosine(), LinearLogSNR(logsnr_min=-5, logsnr_max=13.3)], ids=["cosine", "vdm"]
)
@pytest.mark.parametrize("c", [0.3, 2.0])
def test_minus_elbo_is_the_entropy(interpolant, schedule, c):
    denoiser = GaussianDenoiser(
        mean=torch.zeros(1, dtype=D64), covariance=torch.tensor([c], dtype=D64), interpolant=interpolant
    )
    nodes = Quadrature(400_000)  # the cosine is steep at its ends, where 1 / p is large
    loss = DenoisingLoss(schedule=schedule, weighting=ELBO())
    diffusion = float(loss(denoiser, nodes.data(c), None, nodes).total)
    low, high = (float(schedule(torch.tensor(u, dtype=D64))) for u in (1.0, 0.0))
    # the ends in closed form: KL(q(x_1 | x0) || p(x_1)) and -log p(x0 | x_0), each with the exact Gaussian marginal
    prior = 0.5 * math.log1p(c * math.exp(low))
    reconstruction = 0.5 * math.log(2 * math.pi * math.e * c / (1 + c * math.exp(high)))
    entropy = 0.5 * math.log(2 * math.pi * math.e * c)
    assert prior + diffusion + reconstruction == pytest.approx(entropy, abs=1e-5)


def test_loss_estimates_the_closed_form_on_random_batches():
    c, bias = 0.7, 2.0
    k = bias + math.log(c)
    denoiser = GaussianDenoiser(
        mean=torch.zeros(64, dtype=D64),
        covariance=torch.full((64,), c, dtype=D64),
        interpolant=VariancePreserving(),
    )
    loss = DenoisingLoss(schedule=Cosine(), weighting=SigmoidWeighting(bias=bias))
    g = torch.Generator().manual_seed(1)
    values = [
        float(
            loss(
                denoiser, math.sqrt(c) * torch.randn(2000, 64, generator=g, dtype=D64), None, rng(2000, step)
            ).total
        )
        for step in range(5)
    ]
    assert sum(values) / 5 == pytest.approx(0.5 * k / -math.expm1(-k), rel=0.01)


def test_given_levels_are_used():
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=VariancePreserving(), prediction=V())
    loss = DenoisingLoss(schedule=Cosine(logsnr_min=-15, logsnr_max=15), weighting=SigmoidWeighting(bias=0.5))
    logsnr = torch.tensor([1.0, 2.0, 3.0], dtype=D64)
    x0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=D64)
    terms = loss(denoiser, x0, None, rng(3), logsnr=logsnr)
    assert torch.equal(terms.logsnr, logsnr) and terms.per_example.shape == (3,)
    torch.testing.assert_close(terms.total, terms.per_example.mean())
    # half w / p, written out: p of the clipped cosine is sech(l / 2) over four times its range of angles
    angles = math.atan(math.exp(7.5)) - math.atan(math.exp(-7.5))
    ratio = 1 / (1 + torch.exp(logsnr - 0.5)) * torch.cosh(logsnr / 2) * 4 * angles
    error = eps_error(denoiser, x0, rng(3).randn("noise", (4,), dtype=D64), logsnr)
    torch.testing.assert_close(terms.per_example, 0.5 * ratio * error, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, D64], ids=str)
def test_given_levels_are_weighted_as_the_drawn_ones(dtype):
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=VariancePreserving(), prediction=V())
    loss = DenoisingLoss(schedule=Cosine(), weighting=ELBO())
    x0 = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    drawn = loss(denoiser, x0, None, rng(8))
    given = loss(denoiser, x0, None, rng(8), logsnr=drawn.logsnr)
    assert torch.equal(given.per_example, drawn.per_example) and torch.equal(given.total, drawn.total)


def test_processes_together_see_one_batch():
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=VariancePreserving(), prediction=V())
    loss = DenoisingLoss(schedule=Cosine(), weighting=ELBO(), label_dropout=0.5)
    x0 = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    whole = loss(denoiser, x0, None, rng(8)).per_example
    for rank in range(2):
        part = loss(denoiser, x0[rank::2], None, rng(8, positions=slice(rank, None, 2))).per_example
        assert torch.equal(part, whole[rank::2])


def test_every_parameter_of_a_network_learns():
    network = torch.nn.Linear(4, 4)
    wrapped = type("N", (torch.nn.Module,), {"forward": lambda self, x, logsnr, cond: self.net(x)})()
    wrapped.net = network
    denoiser = NetworkDenoiser(network=wrapped, interpolant=VariancePreserving(), prediction=V())
    loss = DenoisingLoss(schedule=Cosine(), weighting=SigmoidWeighting())
    loss(denoiser, torch.ones(4, 4), None, rng(4)).total.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters())


def test_labels_are_dropped_at_the_rate_asked_for_and_repeatably():
    cond = {"label": torch.arange(10_000) % 10, "text": torch.zeros(10_000, 1)}
    dropped = drop_labels(cond, 0.1, rng(10_000))
    assert float((dropped["label"] == -1).float().mean()) == pytest.approx(0.1, abs=0.01)
    kept = dropped["label"] != -1
    assert torch.equal(dropped["label"][kept], cond["label"][kept]) and dropped["text"] is cond["text"]
    assert torch.equal(drop_labels(cond, 0.1, rng(10_000))["label"], dropped["label"])
    assert not torch.equal(drop_labels(cond, 0.1, rng(10_000, step=1))["label"], dropped["label"])
    assert drop_labels(cond, 0.0, rng(10_000)) is cond and drop_labels(None, 0.5, rng(1)) is None
    with pytest.raises(ValueError, match="label_dropout"):
        DenoisingLoss(schedule=Cosine(), weighting=ELBO(), label_dropout=1.5)


def test_infinite_schedules_are_never_asked_for_their_ends():
    logsnr, log_density = NoiseLevels(schedule=Cosine(logsnr_min=-math.inf, logsnr_max=math.inf))(
        type("R", (), {"stratified": lambda self, tag: torch.tensor([0.0, 0.5, 1.0], dtype=D64)})()
    )
    assert bool(torch.isfinite(logsnr).all()) and bool(torch.isfinite(log_density).all())
