"""Rewards: their values by hand, one number a sample, and one clear error for what is missing."""

import math

import pytest
import torch

from diffusion_lab.measurements import Inpaint, Linear
from diffusion_lab.rewards import Brightness, ClassLogProbability, MeasurementLikelihood, Reward
from diffusion_lab.typing import MEASUREMENT, NO_LABEL

D64 = torch.float64
X = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=D64)


def test_brightness_is_the_mean_pixel():
    torch.testing.assert_close(Brightness()(X), X.mean((1, 2, 3)), rtol=0, atol=1e-15)
    assert isinstance(Brightness(), Reward)


def test_class_log_probability():
    def classifier(x):
        return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 1], torch.zeros(len(x), dtype=D64)], dim=1)

    a, b = X[:, 0, 0, 0], X[:, 0, 0, 1]
    z = torch.log(a.exp() + b.exp() + 1)
    torch.testing.assert_close(
        ClassLogProbability(classifier=classifier, label=1)(X), b - z, rtol=0, atol=1e-14
    )
    own = ClassLogProbability(classifier=classifier)(X, {"label": torch.tensor([0, 1, 2, NO_LABEL])})
    expected = torch.stack([(a - z)[0], (b - z)[1], -z[2], z[3] * 0])
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="needs a class"):
        ClassLogProbability(classifier=classifier)(X)
    with pytest.raises(ValueError, match=r"classes 0 \.\. 2, got \[3, 3, 3, 3\]"):
        ClassLogProbability(classifier=classifier, label=3)(X)


def test_measurement_likelihood_is_the_log_density_up_to_its_constant():
    matrix = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 1.0]], dtype=D64)
    x, y = X[:, 0, 0], X.flatten(1)[:, :3]
    reward = MeasurementLikelihood(operator=Linear(matrix), noise=0.3)
    exact = torch.distributions.Normal(x @ matrix.T, 0.3).log_prob(y).sum(1)
    constant = 3 * math.log(0.3 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(reward(x, {MEASUREMENT: y}), exact + constant, rtol=0, atol=1e-12)


def test_what_a_mask_hides_does_not_count():
    operator = Inpaint(mask="half", side="right")
    y = torch.full_like(X, 7.0)
    expected = -((X - 7)[..., :1] ** 2).sum((1, 2, 3)) / (2 * 0.25)
    reward = MeasurementLikelihood(operator=operator, noise=0.5)
    torch.testing.assert_close(reward(X, {MEASUREMENT: y}), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_what_stands_for_a_missing_pixel_does_not_matter(missing):
    operator = Inpaint(mask="half", side="right")
    reward = MeasurementLikelihood(operator=operator, noise=0.5)
    y = torch.where(operator.known(X) > 0, 7.0, missing).to(D64).expand_as(X)
    x0 = X.clone().requires_grad_()
    r = reward(x0, {MEASUREMENT: y})
    assert torch.equal(r, reward(X, {MEASUREMENT: torch.full_like(X, 7.0)}))
    (g,) = torch.autograd.grad(r.sum(), x0)
    assert bool(g.isfinite().all())


def test_mistakes_are_one_clear_line():
    reward = MeasurementLikelihood(operator=Linear(torch.ones(1, 2)), noise=0.3)
    with pytest.raises(ValueError, match="measurement"):
        reward(torch.zeros(3, 2), {})
    with pytest.raises(ValueError, match=r"has shape \(3, 2\), but Linear makes \(3, 1\)"):
        reward(torch.zeros(3, 2), {MEASUREMENT: torch.zeros(3, 2)})
    for operator, noise in ((None, 1.0), (Linear(torch.ones(1, 2)), 0.0)):
        with pytest.raises(ValueError, match="operator and noise > 0"):
            MeasurementLikelihood(operator=operator, noise=noise)(
                torch.zeros(3, 2), {MEASUREMENT: torch.zeros(3, 1)}
            )
