"""Closed-form denoisers against brute-force posterior means, scores and densities."""

import math

import pytest
import torch

from diffusion_lab.denoisers import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lab.process import RectifiedFlow, VarianceExploding, VariancePreserving, marginal

INTERPOLANTS = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]
every = pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=lambda i: type(i).__name__)
D64 = torch.float64


def t(*values):
    return torch.tensor(values, dtype=D64)


def brute_force(means, stds, weights, x, alpha, sigma):
    """E[x0 | x] and log q(x) in one dimension by quadrature over x0."""
    grid = torch.linspace(-12, 12, 400_001, dtype=D64)
    prior = sum(
        w * torch.exp(-0.5 * ((grid - m) / s) ** 2) / s for m, s, w in zip(means, stds, weights, strict=True)
    )
    prior = prior / math.sqrt(2 * math.pi)
    likelihood = torch.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    joint = prior * likelihood
    evidence = torch.trapezoid(joint, grid)
    return torch.trapezoid(joint * grid, grid) / evidence, torch.log(evidence)


@every
@pytest.mark.parametrize("logsnr", [-4.0, 0.0, 3.0])
def test_mixture_against_quadrature(interpolant, logsnr):
    means, stds, weights = [-1.0, 0.8], [0.2, 0.35], [0.3, 0.7]
    denoiser = GaussianMixtureDenoiser(
        means=t(*means)[:, None], variances=t(*stds) ** 2, weights=t(*weights), interpolant=interpolant
    )
    alpha, sigma = interpolant(t(logsnr))
    for value in (-1.7, 0.1, 1.2):
        mean, log_density = brute_force(means, stds, weights, value, alpha, sigma)
        x = t(value)[:, None]
        assert float(denoiser(x, t(logsnr))) == pytest.approx(float(mean), abs=1e-9)
        assert float(denoiser.log_density(x, t(logsnr))) == pytest.approx(float(log_density), abs=1e-9)


def mixture(interpolant, labels=True):
    g = torch.Generator().manual_seed(3)
    return GaussianMixtureDenoiser(
        means=torch.randn(4, 2, 3, generator=g, dtype=D64),
        variances=0.1 + torch.rand(4, 2, 3, generator=g, dtype=D64),
        weights=t(0.1, 0.2, 0.3, 0.4),
        labels=torch.tensor([0, 1, 1, 2]) if labels else None,
        interpolant=interpolant,
    )


@every
def test_score_is_the_gradient_of_the_log_density(interpolant):
    denoiser = mixture(interpolant)
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=D64).requires_grad_()
    logsnr, cond = torch.linspace(-3, 4, 5, dtype=D64), {"label": torch.tensor([0, 1, 2, -1, 1])}
    (gradient,) = torch.autograd.grad(denoiser.log_density(x, logsnr, cond).sum(), x)
    torch.testing.assert_close(denoiser.score(x.detach(), logsnr, cond), gradient, rtol=1e-9, atol=1e-9)


def test_labels_choose_components():
    denoiser = mixture(VariancePreserving())
    x, logsnr = torch.zeros(2, 2, 3, dtype=D64), t(0.0).expand(2)
    assert torch.equal(denoiser(x, logsnr), denoiser(x, logsnr, {"label": torch.tensor([-1, -1])}))
    only = GaussianDenoiser(
        mean=denoiser.means[3].reshape(2, 3),
        covariance=denoiser.variances[3].reshape(2, 3),
        interpolant=VariancePreserving(),
    )
    torch.testing.assert_close(
        denoiser(x, logsnr, {"label": torch.tensor([2, 2])}), only(x, logsnr), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(ValueError, match="label"):
        denoiser(x, logsnr, {"label": torch.tensor([7, 0])})


def test_conditional_densities_sum_to_the_joint():
    denoiser = mixture(RectifiedFlow())
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=D64)
    prior = t(0.1, 0.5, 0.4)
    parts = [
        prior[k].log() + denoiser.log_density(x, t(1.0).expand(4), {"label": torch.full((4,), k)})
        for k in range(3)
    ]
    torch.testing.assert_close(
        torch.logsumexp(torch.stack(parts), 0),
        denoiser.log_density(x, t(1.0).expand(4)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_samples_have_the_mixtures_moments():
    denoiser = mixture(VariancePreserving())
    x0, labels = denoiser.sample(200_000, torch.Generator().manual_seed(0))
    expected = (t(0.1, 0.2, 0.3, 0.4)[:, None] * denoiser.means).sum(0)
    assert float((x0.flatten(1).mean(0) - expected).abs().max()) < 0.02
    assert float((labels == 1).double().mean()) == pytest.approx(0.5, abs=0.01)


@every
def test_gaussian_full_covariance_is_linear_regression(interpolant):
    g = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=g, dtype=D64)
    covariance, mean = root @ root.T, torch.randn(2, 3, generator=g, dtype=D64)
    denoiser = GaussianDenoiser(mean=mean, covariance=covariance, interpolant=interpolant)
    x, logsnr = torch.randn(1, 2, 3, generator=g, dtype=D64), t(0.7)
    alpha, sigma = interpolant(logsnr)
    gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(6, dtype=D64))
    expected = mean.flatten() + gain @ (x.flatten() - alpha * mean.flatten())
    torch.testing.assert_close(denoiser(x, logsnr).flatten(), expected, rtol=1e-10, atol=1e-10)


def test_gaussian_limits():
    denoiser = GaussianDenoiser(mean=t(1.0, 2.0), covariance=t(0.0, 4.0), interpolant=VariancePreserving())
    x = t(5.0, 6.0)[None]
    # no noise: what has variance is read off, what has none is known
    assert denoiser(x, t(math.inf)).tolist() == [[1.0, 6.0]]
    assert denoiser(x, t(-math.inf)).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, D64], ids=str)
@pytest.mark.parametrize("scale", [1e-13, 1.0, 1e6])
def test_a_singular_covariance_is_one_in_any_units(scale, dtype):
    # rank 2 of 8: in rounding, eigh's six zeros are negative half of the time, in proportion to the largest
    g = torch.Generator().manual_seed(0)
    root = torch.randn(8, 2, generator=g, dtype=D64)
    x = torch.randn(3, 8, generator=g, dtype=D64)
    covariance = (root @ root.T).to(dtype)
    unit = GaussianDenoiser(
        mean=torch.zeros(8, dtype=dtype), covariance=covariance, interpolant=VariancePreserving()
    )
    scaled = GaussianDenoiser(
        mean=torch.zeros(8, dtype=dtype), covariance=scale * covariance, interpolant=VariancePreserving()
    )
    # data c times as long at a log-SNR 2 ln c lower, in EDM's coordinate x / alpha, are the same problem
    c, level = math.sqrt(scale), t(1.0).to(dtype)
    ends = []
    for denoiser, length, logsnr in ((unit, 1.0, level), (scaled, c, level - 2 * math.log(c))):
        alpha, _ = denoiser.interpolant(logsnr)
        ends.append(denoiser((alpha * length * x).to(dtype), logsnr) / length)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5 if dtype is torch.float32 else 1e-9)
    # and what has no variance is known
    normal = torch.linalg.svd(root.T).Vh[2:].to(dtype)
    assert float((ends[1] @ normal.T).abs().max()) < 1e-5


def test_a_covariance_below_zero_is_refused_in_any_units():
    indefinite = torch.diag(t(1.0, -1e-9))
    for scale in (1e-12, 1.0, 1e12):
        with pytest.raises(ValueError, match="negative"):
            GaussianDenoiser(mean=t(0, 0), covariance=scale * indefinite, interpolant=VariancePreserving())


def test_gaussian_covariance_forms_agree():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=D64)
    forms = [torch.tensor(0.3, dtype=D64), torch.full((4,), 0.3, dtype=D64), 0.3 * torch.eye(4, dtype=D64)]
    a, b, c = (
        GaussianDenoiser(mean=torch.zeros(4, dtype=D64), covariance=f, interpolant=VariancePreserving())(
            x, t(0.3)
        )
        for f in forms
    )
    assert torch.equal(a, b)
    torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


@every
def test_empirical_is_a_mixture_of_points(interpolant):
    g = torch.Generator().manual_seed(0)
    data, labels = torch.randn(7, 2, 2, generator=g, dtype=D64), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    empirical = EmpiricalDenoiser(data=data, labels=labels, interpolant=interpolant)
    points = GaussianMixtureDenoiser(
        means=data,
        variances=torch.zeros(7, dtype=D64),
        weights=torch.ones(7, dtype=D64),
        labels=labels,
        interpolant=interpolant,
    )
    logsnr = t(-5.0, 0.0, 2.0)
    x = marginal(interpolant, data[:3], torch.randn(3, 2, 2, generator=g, dtype=D64), logsnr)
    for cond in (None, {"label": torch.tensor([0, -1, 1])}):
        torch.testing.assert_close(
            empirical(x, logsnr, cond), points(x, logsnr, cond), rtol=1e-10, atol=1e-10
        )
    assert list(empirical.classes) == [0, 1, 2]


def test_empirical_returns_the_example_when_there_is_no_noise_to_speak_of():
    data = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=D64)
    denoiser = EmpiricalDenoiser(data=data, interpolant=VariancePreserving())
    torch.testing.assert_close(denoiser(data, t(14.0).expand(5)), data, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: GaussianDenoiser(mean=t(0, 0), covariance=torch.eye(3, dtype=D64), interpolant=i),
        lambda i: GaussianDenoiser(mean=t(0, 0), covariance=t(1, -1), interpolant=i),
        lambda i: GaussianMixtureDenoiser(
            means=t(0)[:, None], variances=t(1, 1), weights=t(1), interpolant=i
        ),
        lambda i: GaussianMixtureDenoiser(means=t(0)[:, None], variances=t(1), weights=t(0), interpolant=i),
        lambda i: EmpiricalDenoiser(data=torch.zeros(0, 2), interpolant=i),
    ],
)
def test_bad_problems_are_refused(make):
    with pytest.raises(ValueError):
        make(VariancePreserving())
