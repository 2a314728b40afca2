"""Input perturbation: gamma = 0 is the denoising loss; on Gaussian data the best answer is known."""

import pytest
import torch

from diffusion_lab.denoisers import X0, Eps, GaussianDenoiser, NetworkDenoiser, V
from diffusion_lab.losses import DenoisingLoss, SigmoidWeighting
from diffusion_lab.losses.input_perturbation import InputPerturbationLoss
from diffusion_lab.process import Cosine, RectifiedFlow, VarianceExploding, VariancePreserving
from diffusion_lab.rng import StepRNG

D64 = torch.float64
INTERPOLANTS = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]
every = pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=lambda i: type(i).__name__)
each = pytest.mark.parametrize("prediction", [X0(), Eps(), V()], ids=lambda p: type(p).__name__)
UNIT = {"schedule": Cosine(), "weighting": SigmoidWeighting()}
S, GAMMA, LEVEL = 0.6, 0.3, 0.8


def rng(total):
    return StepRNG(seed=0, step=0, positions=slice(None), total=total)


class Nonlinear(torch.nn.Module):
    def forward(self, x, logsnr, cond):
        return torch.sin(1.3 * x) + 0.1 * logsnr[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, D64], ids=str)
@each
@every
def test_no_perturbation_is_the_denoising_loss_bit_for_bit(interpolant, prediction, dtype):
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=interpolant, prediction=prediction)
    x0 = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    plain = DenoisingLoss(**UNIT, label_dropout=0.3)(denoiser, x0, None, rng(16))
    none = InputPerturbationLoss(**UNIT, label_dropout=0.3, gamma=0.0)(denoiser, x0, None, rng(16))
    some = InputPerturbationLoss(**UNIT, label_dropout=0.3, gamma=0.1)(denoiser, x0, None, rng(16))
    assert torch.equal(none.per_example, plain.per_example) and torch.equal(none.total, plain.total)
    assert not bool((some.per_example == plain.per_example).any())


class Nodes:
    """Stands in for StepRNG: data, noise and perturbation at all eight sign patterns, exact for squares."""

    def __init__(self):
        self.signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=D64)] * 3)

    def randn(self, tag, shape, dtype=D64):
        return self.signs[:, {"noise": 1, "input_perturbation": 2}[tag]][:, None]


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros((), dtype=D64))

    def forward(self, x, logsnr, cond):
        return self.gain * x


def best_gain(interpolant, prediction, gamma):
    """The minimiser of the loss, a parabola in the gain, and the loss there."""
    network, nodes = Linear(), Nodes()
    alpha, sigma = interpolant(torch.tensor(LEVEL, dtype=D64))
    denoiser = NetworkDenoiser(network=network, interpolant=interpolant, prediction=prediction)
    loss = InputPerturbationLoss(**UNIT, gamma=gamma)
    x0, level = S**0.5 * nodes.signs[:, :1], torch.full((8,), LEVEL, dtype=D64)
    at = []
    for gain in (0.0, 1.0):
        network.gain.data.fill_(gain)
        total = loss(denoiser, x0, None, nodes, logsnr=level).total
        at.append((float(total), float(torch.autograd.grad(total, network.gain)[0])))
    curvature = at[1][1] - at[0][1]
    return -at[0][1] / curvature, at[0][0] - 0.5 * at[0][1] ** 2 / curvature, alpha, sigma


@each
@every
def test_the_best_linear_answer_on_gaussian_data_is_regression_on_the_perturbed_input(
    interpolant, prediction
):
    gain, _, alpha, sigma = best_gain(interpolant, prediction, GAMMA)
    a, b = (float(c) for c in prediction.coefficients(alpha, sigma))
    alpha, sigma = float(alpha), float(sigma)
    shown = (alpha**2 + sigma**2) ** -0.5
    # E[F x] / E[x^2] with x = alpha x0 + sigma (eps + gamma xi), F = a x0 + b eps
    exact = (a * alpha * S + b * sigma) / (alpha**2 * S + (1 + GAMMA**2) * sigma**2)
    assert gain * shown == pytest.approx(exact, rel=1e-10)


@every
def test_the_best_eps_and_its_loss_are_the_docstrings(interpolant):
    gain, least, alpha, sigma = best_gain(interpolant, Eps(), GAMMA)
    alpha, sigma = float(alpha), float(sigma)
    total = alpha**2 * S + (1 + GAMMA**2) * sigma**2
    assert gain / (alpha**2 + sigma**2) ** 0.5 == pytest.approx(sigma / total, rel=1e-10)
    factor = (
        0.5
        * SigmoidWeighting()(torch.tensor(LEVEL, dtype=D64))
        / torch.exp(Cosine().log_density(torch.tensor(LEVEL, dtype=D64)))
    )
    assert least == pytest.approx(float(factor) * (1 - sigma**2 / total), rel=1e-10)


def test_a_denoiser_that_is_no_network_is_judged_by_its_x0():
    interpolant, nodes = VariancePreserving(), Nodes()
    level = torch.full((8,), LEVEL, dtype=D64)
    denoiser = GaussianDenoiser(
        mean=torch.zeros(1, dtype=D64), covariance=torch.tensor([S], dtype=D64), interpolant=interpolant
    )
    value = float(
        InputPerturbationLoss(**UNIT, gamma=GAMMA)(
            denoiser, S**0.5 * nodes.signs[:, :1], None, nodes, logsnr=level
        ).total
    )
    alpha, sigma = (float(c) for c in interpolant(level[0]))
    k = alpha * S / (alpha**2 * S + sigma**2)
    # E (x0 - k x)^2 with the perturbed x
    error = (1 - k * alpha) ** 2 * S + k**2 * sigma**2 * (1 + GAMMA**2)
    factor = 0.5 * SigmoidWeighting()(level[0]) / torch.exp(Cosine().log_density(level[0]))
    assert value == pytest.approx(float(factor) * (alpha / sigma) ** 2 * error, rel=1e-12)


def test_a_negative_perturbation_is_refused():
    with pytest.raises(ValueError, match="gamma >= 0"):
        InputPerturbationLoss(**UNIT, gamma=-0.1)
