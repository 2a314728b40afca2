"""Laws inside bins: densities that integrate to one, and bounds that touch the truth where they can."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.likelihood import TruncatedNormal, Uniform, VariationalDequantisation, fit_dequantisation
from diffusion_lab.process import VariancePreserving
from diffusion_lab.rng import SampleRNG

D64 = torch.float64
GAP = 0.5


def rng(n):
    return SampleRNG(range(n))


def image(n, side=2):
    return torch.zeros(n, 1, side, side, dtype=D64)


@pytest.mark.parametrize("logsnr", [0.0, 4.0, 9.0])
def test_the_truncated_normal_is_scipys(logsnr):
    s = math.exp(-logsnr / 2)
    u, log_q = TruncatedNormal(gap=GAP, logsnr=logsnr)(image(4000), rng(4000))
    law = stats.truncnorm(-GAP / 2 / s, GAP / 2 / s, scale=s)
    np.testing.assert_allclose(log_q.numpy(), law.logpdf(u.numpy()).sum((1, 2, 3)), rtol=1e-9)
    assert stats.kstest(u.flatten().numpy(), law.cdf).pvalue > 0.01
    assert float(u.abs().max()) <= GAP / 2


def test_the_uniform():
    u, log_q = Uniform(gap=GAP)(image(4000), rng(4000))
    assert stats.kstest(u.flatten().numpy(), stats.uniform(-GAP / 2, GAP).cdf).pvalue > 0.01
    torch.testing.assert_close(log_q, torch.full((4000,), -4 * math.log(GAP), dtype=D64))


def test_noise_belongs_to_the_image():
    for law in (
        Uniform(gap=GAP),
        TruncatedNormal(gap=GAP, logsnr=4.0),
        VariationalDequantisation(gap=GAP, channels=1),
    ):
        whole, log_q = law(image(3), rng(3))
        last, last_q = law(image(1), SampleRNG([2]))
        assert torch.equal(whole[2:], last) and torch.equal(log_q[2:], last_q)


def test_the_variational_law_starts_near_the_uniform_and_integrates_to_one():
    q = VariationalDequantisation(gap=GAP, channels=1).double()
    with torch.no_grad():
        # along e from -inf to inf, u crosses the bin once: the integral of q du is that of N(e) de
        e = torch.linspace(-8, 8, 4001, dtype=D64)[:, None, None, None]
        for mean, log_std in ((0.0, None), (1.3, -0.7)):
            if log_std is not None:
                q.network[-1].bias.copy_(torch.tensor([mean, log_std]))
            u, log_q = q.noise(torch.zeros(4001, 1, 1, 1, dtype=D64), e)
            assert float(torch.trapezoid(log_q.exp(), u.flatten())) == pytest.approx(1.0, abs=1e-3)
            if log_std is None:
                # KL to the uniform law, E_q log q + log w
                kl = torch.trapezoid(log_q.exp() * (log_q + math.log(GAP)), u.flatten())
                assert 0 < float(kl) < 0.02


# two levels at -1/4 and 1/4; the model: in the bin of level k a logit-normal law of its own, with mass P_k
MASS, MEANS, STDS = torch.tensor([0.3, 0.7], dtype=D64), (-1.0, 0.6), (0.5, 0.9)


def nll_of_staircase(y, cond, _):
    """-log p(y) of independent pixels, all together."""
    upper = y > 0
    level = torch.where(upper, 0.25, -0.25)
    ratio = ((y - level) / GAP + 0.5).clamp(1e-9, 1 - 1e-9)
    h = torch.log(ratio) - torch.log1p(-ratio)
    mean, std = (torch.where(upper, values[1], values[0]).to(y.dtype) for values in (MEANS, STDS))
    log_p = -0.5 * ((h - mean) / std) ** 2 - torch.log(
        std * math.sqrt(2 * math.pi) * GAP * ratio * (1 - ratio)
    )
    return -(log_p + torch.where(upper, math.log(0.7), math.log(0.3))).flatten(1).sum(1)


def staircase_images(n):
    g = torch.Generator().manual_seed(0)
    return torch.where(torch.rand(n, 1, 2, 2, generator=g) < 0.7, 0.25, -0.25)


def nats(law, x0):
    u, log_q = law(x0, rng(len(x0)))
    return (log_q + nll_of_staircase(x0.double() + u.double(), None, None)) / 4


def test_a_learned_law_reaches_the_truth_where_it_can_and_is_repeatable():
    x0 = staircase_images(600)
    q = VariationalDequantisation(gap=GAP, channels=1)
    seen = []
    fit_dequantisation(
        q, x0, None, nll_of_staircase, images=40_000, lr=2e-2, on_step=lambda n, loss: seen.append((n, loss))
    )
    truth = torch.where(x0 > 0, -math.log(0.7), -math.log(0.3)).double().flatten(1).mean(1)
    learned, uniform = nats(q, x0) - truth, nats(Uniform(gap=GAP), x0) - truth
    assert float(learned.mean()) < 2e-3 and float(learned.mean()) > -2e-3
    # exact: not only on average, whatever the noise drawn
    assert float(learned.std()) < 0.05 < float(uniform.mean())
    assert seen[-1][0] == 40_000 and len(seen) == 313
    again = [VariationalDequantisation(gap=GAP, channels=1) for _ in range(2)]
    for other in again:
        fit_dequantisation(other, x0, None, nll_of_staircase, images=300, batch_size=100)
    states = [list(other.state_dict().values()) for other in again]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    with pytest.raises(ValueError, match="no images"):
        fit_dequantisation(q, x0[:0], None, nll_of_staircase, images=1)


def test_truncated_normal_noise_is_exact_for_a_model_of_isolated_levels():
    # a density of levels blurred by the noise of logsnr 9: s = 0.011, twenty of it to the edge of the bin
    logsnr, weights = 9.0, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=D64)
    levels = GAP * torch.arange(4, dtype=D64)
    model = GaussianMixtureDenoiser(
        means=levels[:, None],
        variances=torch.full((4,), math.exp(-logsnr), dtype=D64),
        weights=weights,
        interpolant=VariancePreserving(),
    )
    clean = torch.tensor(math.inf, dtype=D64)

    def bound(law, copies):
        x0 = levels.repeat(copies)[:, None]
        u, log_q = law(x0, rng(4 * copies))
        return (log_q - model.log_density(x0 + u, clean)).view(copies, 4)

    exact = bound(TruncatedNormal(gap=GAP, logsnr=logsnr), 50)
    torch.testing.assert_close(exact, -weights.log().expand(50, 4), rtol=0, atol=1e-9)
    assert float((bound(Uniform(gap=GAP), 50).mean(0) + weights.log()).min()) > 10


def test_a_law_learned_by_the_bound_of_a_frozen_model_is_no_worse_than_the_uniform():
    from diffusion_lab.likelihood import BoundEvaluation
    from diffusion_lab.process import LinearLogSNR

    levels = GAP * torch.arange(4) - 0.75
    model = GaussianMixtureDenoiser(
        means=levels[:, None, None, None].float(), variances=torch.full((4,), 0.05**2), weights=torch.ones(4),
        interpolant=VariancePreserving(),
    )  # fmt: skip
    bound = BoundEvaluation(schedule=LinearLogSNR(logsnr_min=-5.0, logsnr_max=8.0), levels=None, draws=4)
    x0 = levels.repeat(100)[:, None, None, None]

    def nll(y, cond, step):
        return bound(
            model, y, cond=cond, rng=SampleRNG(range(step.step * 1000, step.step * 1000 + len(y)))
        ).total

    q = fit_dequantisation(
        VariationalDequantisation(gap=GAP, channels=1), x0, None, nll, images=12_000, lr=2e-2
    )

    def value(law):
        u, log_q = law(x0, rng(400))
        return float(
            (log_q - model.log_density(x0.double() + u.double(), torch.tensor(math.inf, dtype=D64))).mean()
        )

    learned, uniform = value(q), value(Uniform(gap=GAP))
    # the model's law of the bin is within reach of q but for its shape; log 4 is the truth
    assert math.log(4) - 0.02 < learned < uniform - 0.5


def test_misuse_is_named():
    for make in (
        lambda: Uniform(gap=0.0),
        lambda: TruncatedNormal(gap=-1.0, logsnr=0.0),
        lambda: VariationalDequantisation(gap=0.0, channels=1),
    ):
        with pytest.raises(ValueError, match="distance of levels"):
            make()
    with pytest.raises(ValueError, match="finite log-SNR"):
        TruncatedNormal(gap=1.0, logsnr=math.inf)
