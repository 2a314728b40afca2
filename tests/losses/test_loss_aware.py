"""Loss-aware sampling: the same mean by enumeration, the smallest variance, and a state that adds up."""

import math

import pytest
import torch

from diffusion_lab.denoisers import Eps, GaussianDenoiser
from diffusion_lab.denoisers.learned_variance import LearnedVarianceDenoiser
from diffusion_lab.losses import ELBO, DenoisingLoss, EpsMSE
from diffusion_lab.losses.hybrid import HybridLoss
from diffusion_lab.losses.loss_aware import LossAware, LossAwareTerms
from diffusion_lab.process import LinearLogSNR, VariancePreserving
from diffusion_lab.rng import StepRNG

D64 = torch.float64
SCHEDULE = LinearLogSNR(logsnr_min=-6.0, logsnr_max=9.0)
DENOISER = GaussianDenoiser(
    mean=torch.zeros(3, dtype=D64),
    covariance=torch.full((3,), 0.4, dtype=D64),
    interpolant=VariancePreserving(),
)


def rng(total, step=0, positions=slice(None)):
    return StepRNG(seed=0, step=step, positions=positions, total=total)


def aware(bins=5, history=3, share=0.01, loss=None):
    loss = loss or DenoisingLoss(schedule=SCHEDULE, weighting=ELBO())
    return LossAware(loss=loss, bins=bins, history=history, uniform_share=share)


def fill(loss, moments):
    """Give every bin a full history of the given mean squared losses."""
    moments = torch.as_tensor(moments, dtype=D64)
    for _ in range(loss.history.shape[1]):
        loss.adapt(torch.stack([moments, torch.ones_like(moments)], dim=1))
    return loss


def test_uniform_until_every_bin_is_full():
    loss, uniform = aware(bins=4, history=2), torch.full((4,), 0.25, dtype=D64)
    step = torch.tensor([[4.0, 1], [16.0, 1], [36.0, 1], [0.0, 0]], dtype=D64)
    for _ in range(5):
        loss.adapt(step)
        assert torch.equal(loss.probabilities(), uniform)
    last = torch.tensor([[0.0, 0], [0.0, 0], [0.0, 0], [8.0, 2]], dtype=D64)
    loss.adapt(last)
    assert torch.equal(loss.probabilities(), uniform)
    loss.adapt(last)
    roots = torch.tensor([2.0, 4.0, 6.0, 2.0], dtype=D64)
    torch.testing.assert_close(loss.probabilities(), 0.99 * roots / 14 + 0.01 / 4, rtol=1e-12, atol=0)


def test_the_history_forgets_the_oldest():
    loss = aware(bins=1, history=3)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        loss.adapt(torch.tensor([[value, 1.0]], dtype=D64))
    assert sorted(loss.history[0].tolist()) == [3.0, 4.0, 5.0] and int(loss.count) == 5


def test_the_expected_loss_is_that_of_uniform_draws_by_enumeration():
    loss = fill(aware(), [1.0, 4.0, 0.0, 100.0, 9.0])
    p = loss.probabilities()
    # a draw at the middle of each bin's share of [0, 1), which happens with probability p
    u, bins, weights = loss.draw(p.cumsum(0) - p / 2)
    assert bins.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(u, (torch.arange(5, dtype=D64) + 0.5) / 5, rtol=1e-12, atol=0)
    values = torch.tensor([3.0, -1.0, 7.0, 0.5, 2.0], dtype=D64)
    assert float((p * weights * values).sum()) == pytest.approx(float(values.mean()), rel=1e-12)


def test_draws_have_the_density_and_stay_stratified():
    loss = fill(aware(), [1.0, 4.0, 0.0, 100.0, 9.0])
    n = 1_000_000
    u, bins, weights = loss.draw((torch.arange(n, dtype=D64) + 0.5) / n)
    assert bool((u.diff() > 0).all()) and bool((bins == (u * 5).floor()).all())
    counts = bins.bincount(minlength=5).double() / n
    torch.testing.assert_close(counts, loss.probabilities(), rtol=0, atol=1.5 / n)
    # the expectation of any function of u; a rising one errs by at most one draw in each bin, of the bin's weight
    bound = float((1 / (5 * loss.probabilities())).sum()) / n
    for f, exact in ((lambda u: u**2, 1 / 3), (torch.exp, math.e - 1)):
        assert float((weights * f(u)).mean()) == pytest.approx(exact, abs=bound * float(f(torch.ones(()))))


def test_a_real_loss_keeps_its_expectation_and_loses_its_variance():
    # the eps error of a Gaussian's best answer hardly depends on the draw: most variance is the levels'
    wide = GaussianDenoiser(
        mean=torch.zeros(3000, dtype=D64),
        covariance=torch.full((3000,), 0.4, dtype=D64),
        interpolant=VariancePreserving(),
    )
    loss, n = aware(bins=50, history=1, share=1e-4), 400
    independent = [rng(n, step) for step in range(8)]
    for source in independent:
        source.stratified = source.rand
    g = torch.Generator().manual_seed(0)
    data = [math.sqrt(0.4) * torch.randn(n, 3000, generator=g, dtype=D64) for _ in independent]
    plain = torch.cat([loss(wide, x0, None, r).per_example for x0, r in zip(data, independent, strict=True)])
    middle = SCHEDULE((torch.arange(50, dtype=D64) + 0.5) / 50)
    fill(loss, (0.5 * 15 * torch.sigmoid(middle + math.log(0.4))) ** 2)
    better = torch.cat([loss(wide, x0, None, r).per_example for x0, r in zip(data, independent, strict=True)])
    a, b = torch.tensor(0.4, dtype=D64).log() + 9.0, torch.tensor(0.4, dtype=D64).log() - 6.0
    exact = float(0.5 * (torch.nn.functional.softplus(a) - torch.nn.functional.softplus(b)))
    for values in (plain, better):
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - exact) < 4 * error
    assert float(better.var() / plain.var()) < 0.02


def test_before_it_has_learned_it_is_the_loss_inside():
    x0 = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=D64)
    inner = DenoisingLoss(schedule=SCHEDULE, weighting=ELBO(), label_dropout=0.5)
    cond = {"text": torch.zeros(40, 1)}
    mine, plain = aware(loss=inner)(DENOISER, x0, cond, rng(40)), inner(DENOISER, x0, cond, rng(40))
    torch.testing.assert_close(mine.logsnr, plain.logsnr, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.per_example, plain.per_example, rtol=1e-10, atol=0)
    given = aware(loss=inner)(DENOISER, x0, cond, rng(40), logsnr=plain.logsnr)
    assert torch.equal(given.per_example, plain.per_example)


def test_statistics_add_up_over_micro_batches_and_processes():
    x0 = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=D64)
    loss = fill(aware(), [1.0, 4.0, 2.0, 100.0, 9.0])
    whole = loss(DENOISER, x0, None, rng(40))
    assert isinstance(whole, LossAwareTerms)
    parts = [
        loss.statistics(loss(DENOISER, x0[rows], None, rng(40, positions=rows)))
        for rows in (slice(0, 20, 2), slice(1, 20, 2), slice(20, 40))
    ]
    expected = loss.statistics(whole)
    torch.testing.assert_close(sum(parts), expected, rtol=1e-12, atol=0)
    assert float(expected[:, 1].sum()) == 40
    # of the losses before the weights, each in the bin of its level
    bins = (SCHEDULE.inverse(whole.logsnr) * 5).floor().long()
    p = loss.probabilities()
    square = (whole.per_example * 5 * p[bins]).square()
    for k in range(5):
        assert float(expected[k, 0]) == pytest.approx(float(square[bins == k].sum()), rel=1e-10)
    with pytest.raises(ValueError, match="drew itself"):
        loss.statistics(loss(DENOISER, x0, None, rng(40), logsnr=whole.logsnr))


def test_with_a_discrete_bound_each_bin_is_one_step():
    class Network(torch.nn.Module):
        def forward(self, x, logsnr, cond):
            return torch.cat([0.5 * x, 0.0 * x], dim=1)

    inner = HybridLoss(schedule=SCHEDULE, weighting=EpsMSE(schedule=SCHEDULE), steps=5)
    denoiser = LearnedVarianceDenoiser(network=Network(), interpolant=VariancePreserving(), prediction=Eps())
    loss = fill(aware(loss=inner), [1.0, 4.0, 2.0, 100.0, 9.0])
    terms = loss(denoiser, torch.zeros(200, 3, dtype=D64), None, rng(200))
    step = SCHEDULE.inverse(terms.logsnr) * 5
    torch.testing.assert_close(step, (terms.bins + 1).double(), rtol=0, atol=1e-10)
    assert set(terms.bins.tolist()) == set(range(5))


def test_the_state_is_stored_and_drives_the_draws():
    loss = fill(aware(), [1.0, 4.0, 2.0, 100.0, 9.0])
    assert set(loss.state_dict()) == {"history", "count"} and not list(loss.parameters())
    other = aware()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.probabilities(), loss.probabilities())


def test_losses_that_are_all_zero_leave_it_uniform():
    assert torch.equal(fill(aware(bins=4), [0.0] * 4).probabilities(), torch.full((4,), 0.25, dtype=D64))


def test_bad_settings_are_refused():
    for changes in ({"bins": 0}, {"history": 0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(ValueError, match="LossAware needs"):
            aware(**changes)
