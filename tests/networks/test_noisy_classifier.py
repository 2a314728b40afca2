"""The classifier of noisy images: network, input scaling, loss."""

import math

import pytest
import torch

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.denoisers.classifier import NetworkClassifier
from diffusion_lab.losses.classification import ClassificationLoss
from diffusion_lab.networks.classifier import NoisyClassifier
from diffusion_lab.process import Cosine, RectifiedFlow, VarianceExploding, VariancePreserving
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import NO_LABEL


def network(**more):
    settings = {
        "in_channels": 1, "size": 8, "num_classes": 3, "channels": 8, "multipliers": (1, 2), "blocks": 1,
        "attention": (4,), "head_channels": 8, **more,
    }  # fmt: skip
    return NoisyClassifier(**settings)


def stirred(**more):
    """A network that is not at its zero initialisation."""
    made, rng = network(**more), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return made.eval()


def rng(n, step=0):
    return StepRNG(seed=0, step=step, positions=slice(0, n), total=n)


def test_all_classes_are_alike_at_first_and_everything_learns():
    made = network()
    x, logsnr = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.linspace(-5, 5, 5)
    assert torch.equal(made(x, logsnr), torch.zeros(5, 3))
    out = stirred()(x, logsnr)
    assert out.shape == (5, 3) and not torch.allclose(out, stirred()(x, logsnr + 1), atol=1e-4)
    trained = stirred().train()
    trained(x, logsnr).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained.parameters())
    for level in (-math.inf, math.inf):
        assert bool(stirred()(x, torch.full((5,), level)).isfinite().all())


def test_an_image_is_classified_by_itself():
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    logsnr, made = torch.linspace(-5, 5, 6), stirred()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(made(x, logsnr)[order], made(x[order], logsnr[order]), atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_classes": 0}, "num_classes >= 2, got 0"),
        ({"size": 9}, "side 9 cannot be halved 1 times"),
        ({"attention": (2,)}, r"attention at sides \[2\]"),
    ],
)
def test_impossible_networks_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        network(**more)


def test_the_network_sees_the_same_in_every_process():
    """x / sqrt(alpha^2 + sigma^2) is one process in all interpolants, and c_in makes it so (data of unit variance)."""
    made, level = stirred(), torch.tensor([-3.0, 0.0, 3.0])
    y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    found = []
    for interpolant in (VariancePreserving(), VarianceExploding(), RectifiedFlow()):
        alpha, sigma = interpolant(level)
        x = y * torch.sqrt(alpha**2 + sigma**2)[:, None, None, None]
        found.append(NetworkClassifier(network=made, interpolant=interpolant)(x, level))
    assert torch.allclose(found[0], found[1], atol=1e-4) and torch.allclose(found[0], found[2], atol=1e-4)
    half = NetworkClassifier(network=made, interpolant=VariancePreserving(), sigma_data=0.5)
    assert not torch.allclose(half(y, level), found[0], atol=1e-3)
    with pytest.raises(ValueError, match="sigma_data > 0"):
        NetworkClassifier(network=made, interpolant=VariancePreserving(), sigma_data=0.0)


class Exact:
    """Bayes' classifier of two Gaussian classes, and something a little different for any other `tilt`."""

    def __init__(self, tilt=0.0):
        self.interpolant, self.tilt = VariancePreserving(), tilt
        self.mixture = GaussianMixtureDenoiser(
            means=torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
            variances=torch.tensor([0.25, 0.25], dtype=torch.float64),
            weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
            labels=torch.tensor([0, 1]),
            interpolant=self.interpolant,
        )

    def __call__(self, x, logsnr):
        each = [self.mixture.log_density(x, logsnr, {"label": torch.full((len(x),), k)}) for k in (0, 1)]
        return torch.stack([each[0], each[1] + self.tilt * x[:, 0]], dim=1)


def test_the_loss_is_the_mean_negative_log_posterior_and_bayes_minimises_it():
    loss = ClassificationLoss(schedule=Cosine(logsnr_min=-10.0, logsnr_max=10.0))
    x0, label = Exact().mixture.sample(20_000, torch.Generator().manual_seed(0))
    cond, best = {"label": label}, Exact()
    terms = loss(best, x0, cond, rng(20_000))
    assert torch.equal(terms.total, terms.per_example.mean()) and terms.logsnr.shape == (20_000,)
    # the same numbers from the definition
    eps = rng(20_000).randn("noise", (1,), dtype=torch.float64)
    alpha, sigma = best.interpolant(terms.logsnr)
    log_p = torch.log_softmax(best(alpha[:, None] * x0 + sigma[:, None] * eps, terms.logsnr), dim=1)
    assert torch.allclose(terms.per_example, -log_p[torch.arange(20_000), label], atol=1e-12)
    for tilt in (-0.3, 0.3):
        assert float(loss(Exact(tilt), x0, cond, rng(20_000)).total) > float(terms.total) + 0.003
    # one bit of noise at the bottom, certainty at the top
    low = loss(best, x0, cond, rng(20_000), logsnr=torch.full((20_000,), -20.0, dtype=torch.float64))
    assert abs(float(low.total) - math.log(2)) < 1e-3
    for nothing in (None, {"text": x0}):
        with pytest.raises(ValueError, match="learns from labels"):
            loss(best, x0, nothing, rng(20_000))


def test_an_example_without_a_label_is_one_clear_error():
    schedule = Cosine(logsnr_min=-10, logsnr_max=10)
    loss = ClassificationLoss(schedule=schedule)
    judged = NetworkClassifier(network=stirred(), interpolant=VariancePreserving())
    with pytest.raises(ValueError, match="some examples have none"):
        loss(judged, torch.zeros(3, 1, 8, 8), {"label": torch.tensor([0, NO_LABEL, 2])}, rng(3))
    with pytest.raises(ValueError, match="this data set has none"):
        loss(judged, torch.zeros(3, 1, 8, 8), None, rng(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_float32_at_least(dtype):
    class Network(torch.nn.Module):
        def forward(self, x, logsnr):
            return x.flatten(1)[:, :2]

    judged = NetworkClassifier(network=Network(), interpolant=VariancePreserving())
    logits = judged(torch.ones(3, 1, 2, 2, dtype=dtype), torch.zeros(3))
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
