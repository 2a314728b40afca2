"""Every weighting of conf/weighting, whichever prediction it is stated in, and as a mixture of bounds."""

import math
from itertools import pairwise

import hydra
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion_lab.app.session import conf_folder
from diffusion_lab.denoisers import X0, Eps, NetworkDenoiser, V, Velocity
from diffusion_lab.losses import (
    ELBO,
    P2,
    VMSE,
    DenoisingLoss,
    EDMWeighting,
    EpsMSE,
    MinSNR,
    SigmoidWeighting,
    TruncatedSNR,
    VelocityMSE,
)
from diffusion_lab.losses.weightings import EDMMonotonic
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.rng import StepRNG

D64 = torch.float64
NAMES = sorted(path.stem for path in (conf_folder() / "weighting").glob("*.yaml"))
WIDE = Cosine(logsnr_min=-math.inf, logsnr_max=math.inf)


def of_config(name):
    """The weighting of a file, and the schedule that it is composed with."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("train", overrides=[f"weighting={name}", "schedule=cosine_10"])
    return [
        hydra.utils.instantiate(OmegaConf.to_container(config[key], resolve=True))
        for key in ("weighting", "schedule")
    ]


def answer(x, logsnr):
    """Some denoiser's x0."""
    return torch.tanh(0.7 * x + 0.1 * logsnr[:, None])


class Raw(torch.nn.Module):
    """A network whose output says `answer` in the words of a prediction type."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, x, logsnr, cond):
        alpha, sigma = VariancePreserving()(logsnr)
        a, b = (c[:, None] for c in self.prediction.coefficients(alpha, sigma))
        x0 = answer(x, logsnr)
        return a * x0 + b * (x - alpha[:, None] * x0) / sigma[:, None]


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_every_weighting_is_the_same_loss(name):
    weighting, schedule = of_config(name)
    loss = DenoisingLoss(schedule=schedule, weighting=weighting)
    n = 2048
    x0 = torch.randn(n, 5, generator=torch.Generator().manual_seed(0), dtype=D64)

    def rng():
        return StepRNG(seed=0, step=0, positions=slice(None), total=n)

    def stated_in(prediction):
        denoiser = NetworkDenoiser(
            network=Raw(prediction), interpolant=VariancePreserving(), prediction=prediction
        )
        return loss(denoiser, x0, None, rng())

    terms = stated_in(Eps())
    for prediction in (X0(), V(), Velocity()):
        torch.testing.assert_close(stated_in(prediction).per_example, terms.per_example, rtol=1e-8, atol=0)

    # written out in each unit, s = SNR
    logsnr, eps = terms.logsnr, rng().randn("noise", (5,), dtype=D64)
    assert float(logsnr.min()) < -9 and float(logsnr.max()) > 9
    s = torch.exp(logsnr)
    alpha, sigma = torch.sqrt(s / (1 + s))[:, None], torch.sqrt(1 / (1 + s))[:, None]
    x = alpha * x0 + sigma * eps
    x0_hat = answer(x, logsnr)
    eps_hat = (x - alpha * x0_hat) / sigma
    v, v_hat = alpha * eps - sigma * x0, alpha * eps_hat - sigma * x0_hat
    factor = 0.5 * weighting(logsnr) / torch.exp(schedule.log_density(logsnr))
    for unit, error in (
        (1.0, eps - eps_hat),
        (s, x0 - x0_hat),
        (1 / (1 + 1 / s), v - v_hat),
        (1 / (1 + 1 / torch.sqrt(s)) ** 2, (eps - x0) - (eps_hat - x0_hat)),
    ):
        written = factor * unit * error.square().mean(1)
        torch.testing.assert_close(terms.per_example, written, rtol=1e-8, atol=0)
    assert bool((terms.per_example > 0).all())


# whether w never rises with log-SNR, as the papers' table has it for the cosine schedule
TABLE = {
    "elbo": (ELBO(), True),
    "eps_mse": (EpsMSE(schedule=WIDE), False),
    "v_mse": (VMSE(schedule=WIDE), True),
    "edm": (EDMWeighting(), False),
    "edm_monotonic": (EDMMonotonic(), True),
    "sigmoid": (SigmoidWeighting(bias=2.0), True),
    "p2": (P2(schedule=WIDE), False),
    "min_snr": (MinSNR(schedule=WIDE), False),
    "velocity_mse": (VelocityMSE(schedule=WIDE), True),
    "truncated_snr": (TruncatedSNR(schedule=WIDE), True),
}
table = pytest.mark.parametrize(("weighting", "falls"), TABLE.values(), ids=TABLE.keys())


@table
def test_which_weightings_never_rise(weighting, falls):
    w = weighting(torch.linspace(-12, 12, 24_001, dtype=D64))
    assert bool((w.diff() <= 1e-15 * w[:-1]).all()) == falls


def integral(f, low, high, kinks, cells=200, nodes=12):
    """Gauss-Legendre on cells that no kink is inside of."""
    ends = [low, *sorted(k for k in kinks if low < k < high), high]
    points, weights = np.polynomial.legendre.leggauss(nodes)
    total = 0.0
    for a, b in pairwise(ends):
        edges = np.linspace(a, b, cells + 1)
        half = 0.5 * (edges[1:] - edges[:-1])
        x = torch.tensor(0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * points)
        total += float((f(x.flatten()).view(x.shape) * torch.tensor(half[:, None] * weights)).sum())
    return total


@table
@pytest.mark.parametrize("c", [0.3, 2.0])
def test_a_weighted_loss_is_a_mixture_of_bounds(weighting, falls, c):
    # Gaussian data, one dimension: L(l) = KL(q(z_l.. | x) || p(z_l..)) = prior + ½ ∫_min^l error; then
    #   loss_w + w(min) prior = ∫ -w'(l) L(l) dl + w(max) L(max)
    low, high = -10.0, 10.0
    kinks = [math.log(5.0), 0.0, EDMMonotonic().peak]

    def error(logsnr):
        return torch.sigmoid(logsnr + math.log(c))

    def w(value):
        return float(weighting(torch.tensor(value, dtype=D64)))

    def minus_slope(logsnr):
        logsnr = logsnr.clone().requires_grad_()
        value = weighting(logsnr).sum()
        return -torch.autograd.grad(value, logsnr)[0] if value.requires_grad else torch.zeros_like(logsnr)

    sigma2 = 1 / (1 + math.exp(low))
    prior = 0.5 * ((1 - sigma2) * c + sigma2 - math.log(sigma2) - 1)

    def bound(logsnr):
        return prior + 0.5 * torch.log((1 + c * torch.exp(logsnr)) / (1 + c * math.exp(low)))

    loss = 0.5 * integral(lambda logsnr: weighting(logsnr) * error(logsnr), low, high, kinks)
    mixture = integral(lambda logsnr: minus_slope(logsnr) * bound(logsnr), low, high, kinks)
    top = w(high) * float(bound(torch.tensor(high, dtype=D64)))
    assert loss + w(low) * prior == pytest.approx(mixture + top, rel=1e-9)
    # the weights of the mixture sum to w(min), and none is negative where w never rises
    assert integral(minus_slope, low, high, kinks) + w(high) == pytest.approx(w(low), rel=1e-9)
    grid = torch.linspace(low, high, 2001, dtype=D64)
    assert bool((minus_slope(grid) >= -1e-15).all()) == falls


def test_edm_monotonic_is_held_at_the_peak():
    # papers: the peak of the defaults is at -3.308
    assert EDMMonotonic().peak == pytest.approx(-3.308, abs=5e-4)
    logsnr = torch.linspace(-60, 30, 900_001, dtype=D64)
    for settings in (
        {},
        {"p_mean": -0.4, "p_std": 1.0, "sigma_data": 0.5},
        {"p_mean": -1.2, "p_std": 1.2, "sigma_data": 0.75},
        {"p_mean": 0.5, "p_std": 0.6, "sigma_data": 1.0},
        # two peaks, of which the right one (far from noise) or the left one is higher
        {"p_mean": -5.0, "p_std": 1.8, "sigma_data": 0.9},
        {"p_mean": -3.5, "p_std": 1.8, "sigma_data": 0.9},
    ):
        edm = EDMWeighting(**settings)(logsnr)
        monotonic = EDMMonotonic(**settings)
        best = int(edm.argmax())
        assert monotonic.peak == pytest.approx(float(logsnr[best]), abs=2e-4)
        expected = torch.where(torch.arange(len(edm)) < best, edm[best], edm)
        torch.testing.assert_close(monotonic(logsnr), expected, rtol=1e-7, atol=0)
