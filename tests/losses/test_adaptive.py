"""The adaptive schedule: a schedule at any time, with the same mean as others and the least variance."""

import math

import pytest
import torch

from diffusion_lab.denoisers import GaussianDenoiser
from diffusion_lab.losses import ELBO, DenoisingLoss, EpsMSE, LossTerms, SigmoidWeighting
from diffusion_lab.losses.adaptive import Adaptive, AdaptiveDenoisingLoss
from diffusion_lab.losses.loss_aware import LossAware
from diffusion_lab.losses.uncertainty import UncertaintyLoss
from diffusion_lab.process import Cosine, LinearLogSNR, Schedule, VariancePreserving
from diffusion_lab.process.schedules import AdaptiveSchedule
from diffusion_lab.process.schedules.learned import LearnedLinear
from diffusion_lab.rng import StepRNG
from diffusion_lab.samplers.grids import uniform_u

D64 = torch.float64
U = torch.linspace(0, 1, 1001, dtype=D64)
# the papers' problem: Gaussian data of variance C in D dimensions, w = sigmoid(BIAS - logsnr) on [-10, 10]
C, BIAS, D, LOW, HIGH = 0.7, 2.0, 64, -10.0, 10.0
DENOISER = GaussianDenoiser(
    mean=torch.zeros(D, dtype=D64),
    covariance=torch.full((D,), C, dtype=D64),
    interpolant=VariancePreserving(),
)


def rng(total, step=0, positions=slice(None)):
    return StepRNG(seed=0, step=step, positions=positions, total=total)


def data(n, step=0):
    g = torch.Generator().manual_seed(100 + step)
    return math.sqrt(C) * torch.randn(n, D, generator=g, dtype=D64)


def adaptive(**settings):
    schedule = AdaptiveSchedule(logsnr_min=LOW, logsnr_max=HIGH, **settings)
    return AdaptiveDenoisingLoss(schedule=schedule, weighting=SigmoidWeighting(bias=BIAS))


def weighted_error(logsnr):
    """w times the expected squared error of eps, in one dimension."""
    return torch.sigmoid(BIAS - logsnr) * torch.sigmoid(logsnr + math.log(C))


def exact_mean_and_std(schedule, nodes=400_000):
    """Of a single example's loss, summed over D dimensions, by quadrature: the error is s chi²_D."""
    logsnr = LOW + (HIGH - LOW) * (torch.arange(nodes, dtype=D64) + 0.5) / nodes
    p = torch.exp(schedule.log_density(logsnr))
    mean = 0.5 * D * float(weighted_error(logsnr).mean()) * (HIGH - LOW)
    square = 0.25 * (D**2 + 2 * D) * float((weighted_error(logsnr) ** 2 / p).mean()) * (HIGH - LOW)
    return mean, math.sqrt(square - mean**2)


def trained(steps=60, n=4096, **settings):
    loss = adaptive(halflife_images=20_000, **settings)
    with torch.no_grad():
        for step in range(steps):
            loss.adapt(loss.statistics(loss(DENOISER, data(n, step), None, rng(n, step))))
    return loss


TRAINED = trained()


@pytest.mark.parametrize("schedule", [adaptive().schedule, TRAINED.schedule], ids=["fresh", "trained"])
def test_is_a_schedule(schedule):
    assert isinstance(schedule, Schedule)
    logsnr = schedule(U)
    assert bool((logsnr.diff() < 0).all())
    assert (float(logsnr[0]), float(logsnr[-1])) == (HIGH, LOW)
    torch.testing.assert_close(schedule.inverse(logsnr), U, rtol=0, atol=1e-12)
    assert schedule(U.float()).dtype == torch.float32
    # inside a bin the density is |du / dlogsnr|, and constant
    width = (HIGH - LOW) / schedule.bins
    edges = torch.linspace(LOW, HIGH, schedule.bins + 1, dtype=D64)
    a, b = edges[:-1] + 0.1 * width, edges[1:] - 0.1 * width
    density = (schedule.inverse(a) - schedule.inverse(b)) / (b - a)
    for place in (a, b):
        torch.testing.assert_close(torch.exp(schedule.log_density(place)), density, rtol=1e-9, atol=0)
    assert float(density.sum() * width) == pytest.approx(1.0, rel=1e-9)


def test_fresh_is_uniform():
    line = LinearLogSNR(logsnr_min=LOW, logsnr_max=HIGH)
    schedule = adaptive().schedule
    torch.testing.assert_close(schedule(U), line(U), rtol=0, atol=1e-12)
    inside = line(U[1:-1])
    torch.testing.assert_close(schedule.log_density(inside), line.log_density(inside), rtol=1e-12, atol=0)


def test_same_mean_and_the_least_variance():
    k = BIAS + math.log(C)
    schedules = {
        "uniform": LinearLogSNR(logsnr_min=LOW, logsnr_max=HIGH),
        "cosine": Cosine(logsnr_min=LOW, logsnr_max=HIGH),
        "adaptive": TRAINED.schedule,
    }
    stds = {}
    for name, schedule in schedules.items():
        mean, stds[name] = exact_mean_and_std(schedule)
        # the closed form is that of the whole axis; the papers' figure is that of the interval
        assert mean == pytest.approx(0.5 * D * k / -math.expm1(-k), rel=1e-3)
        assert mean == pytest.approx(65.18, abs=0.005)
        n = 256
        kind = AdaptiveDenoisingLoss if isinstance(schedule, AdaptiveSchedule) else DenoisingLoss
        loss = kind(schedule=schedule, weighting=SigmoidWeighting(bias=BIAS))
        with torch.no_grad():
            values = torch.cat(
                [
                    D * loss(DENOISER, data(n, step), None, rng(n, step=1000 + step)).per_example
                    for step in range(100)
                ]
            )
        # levels are stratified, so the mean is better than this error says
        error = stds[name] / math.sqrt(len(values))
        assert abs(float(values.mean()) - mean) < 4 * error
        assert float(values.std()) == pytest.approx(stds[name], rel=0.03)
    # the papers' figures, 98, 43.6 and 12.1, are themselves estimates from samples
    assert stds["uniform"] == pytest.approx(98, rel=0.01)
    assert stds["cosine"] == pytest.approx(43.6, rel=0.01)
    # nothing is below the spread of chi², 65.18 sqrt(2 / 64) = 11.52
    assert 11.52 < stds["adaptive"] < 12.1


def test_the_fixed_point_is_flat():
    # fed with what it draws, the schedule settles where w error / p is the same in all bins above the floor
    schedule = TRAINED.schedule
    edges = torch.linspace(LOW, HIGH, schedule.bins + 1, dtype=D64)
    inside = edges[:-1, None] + (edges[1] - edges[0]) * (torch.arange(200, dtype=D64) + 0.5) / 200
    by_bin = weighted_error(inside).mean(1)
    ratio = by_bin / schedule.probabilities()
    heavy = by_bin.argsort(descending=True)
    heavy = heavy[: int((by_bin[heavy].cumsum(0) / by_bin.sum() < 0.98).sum()) + 1]
    assert len(heavy) > 30
    flatness = ratio[heavy] / ratio[heavy].median()
    assert 0.9 < float(flatness.min()) and float(flatness.max()) < 1.1
    # the uniform density it started from is nothing like it
    assert float(by_bin[heavy].max() / by_bin[heavy].min()) > 5
    # the rest sits on the floor
    floor = schedule.floor / (1 + schedule.floor) / schedule.bins
    assert float(schedule.probabilities().min()) >= floor * (1 - 1e-12)


@pytest.mark.parametrize("kind", [torch.float32, D64], ids=str)
def test_statistics_are_the_weighted_errors_without_the_density(kind):
    loss = trained(steps=3)
    x0 = data(200).to(kind)
    terms = loss(DENOISER, x0, None, rng(200))
    plain = DenoisingLoss(schedule=Uniform(), weighting=SigmoidWeighting(bias=BIAS))
    error = 2 * plain(DENOISER, x0, None, rng(200), logsnr=terms.logsnr).per_example.double()
    sums, counts = loss.statistics(terms)
    bins = ((terms.logsnr - LOW) / (HIGH - LOW) * 100).long()
    for b in range(100):
        assert int(counts[b]) == int((bins == b).sum())
        assert float(sums[b]) == pytest.approx(float(error[bins == b].sum()), rel=1e-5, abs=1e-12)
    assert counts.sum() == 200


class Uniform:
    """A density of 1: the loss is half the weighted error."""

    def log_density(self, logsnr):
        return torch.zeros_like(logsnr)


def test_a_bin_moves_towards_its_mean_and_an_empty_one_stays():
    schedule = AdaptiveSchedule(bins=4, halflife_images=6.0)
    schedule.update(torch.tensor([3.0, 0.0, 8.0, 0.0]), torch.tensor([1.0, 0.0, 4.0, 1.0]))
    # six images are one half-life
    assert schedule.means.tolist() == pytest.approx([2.0, 1.0, 1.5, 0.5], rel=1e-15)
    p = schedule.probabilities()
    raised = schedule.means + 1e-3 * 5 / 4
    torch.testing.assert_close(p, raised / raised.sum(), rtol=1e-12, atol=0)


def test_neither_micro_batches_nor_processes_matter():
    whole, parts = trained(steps=2), trained(steps=2)
    x0 = data(64)
    whole.adapt(whole.statistics(whole(DENOISER, x0, None, rng(64))))
    rows = [slice(48, 64), slice(0, 24, 2), slice(1, 24, 2), slice(24, 48)]
    parts.adapt(sum(parts.statistics(parts(DENOISER, x0[r], None, rng(64, positions=r))) for r in rows))
    torch.testing.assert_close(parts.schedule.means, whole.schedule.means, rtol=1e-12, atol=0)
    assert not torch.equal(whole.schedule.means, trained(steps=2).schedule.means)


def test_checkpoints_hold_what_was_learnt():
    fresh = adaptive()
    fresh.load_state_dict(TRAINED.state_dict())
    assert list(fresh.state_dict()) == ["schedule.means"] and not list(fresh.parameters())
    assert torch.equal(fresh.schedule(U), TRAINED.schedule(U))
    assert not torch.equal(fresh.schedule(U), adaptive().schedule(U))


def test_every_bin_survives_a_loss_that_vanishes():
    loss = adaptive(halflife_images=1.0)
    for _ in range(50):
        loss.adapt(torch.stack([torch.cat([torch.zeros(99), torch.ones(1)]), torch.ones(100)]))
    p = loss.schedule.probabilities()
    assert float(p[0]) == pytest.approx(1e-3 / 100 / (1 + 1e-3), rel=1e-6)
    assert bool(torch.isfinite(loss.schedule(U)).all()) and bool((loss.schedule(U).diff() < 0).all())


def test_the_protocol_and_misuse():
    assert isinstance(adaptive(), Adaptive)
    assert not isinstance(DenoisingLoss(schedule=Cosine(), weighting=ELBO()), Adaptive)
    values = torch.ones(2, requires_grad=True)
    attached = LossTerms(total=values.mean(), per_example=values, logsnr=torch.zeros(2))
    assert not adaptive().statistics(attached).requires_grad
    with pytest.raises(TypeError, match="AdaptiveSchedule"):
        AdaptiveDenoisingLoss(schedule=Cosine(), weighting=ELBO())
    with pytest.raises(ValueError, match="no such objective"):
        AdaptiveDenoisingLoss(schedule=AdaptiveSchedule(), weighting=EpsMSE(schedule=AdaptiveSchedule()))
    with pytest.raises(ValueError, match="finite range"):
        AdaptiveSchedule(logsnr_max=math.inf)
    for wrong in ({"bins": 0}, {"floor": 0.0}, {"halflife_images": 0}):
        with pytest.raises(ValueError, match="AdaptiveSchedule needs"):
            AdaptiveSchedule(**wrong)


def test_a_schedule_that_would_not_learn_or_would_learn_the_wrong_thing_is_refused():
    weighting = SigmoidWeighting(bias=BIAS)
    for schedule, weighed in (
        (AdaptiveSchedule(), weighting),
        (Cosine(), EpsMSE(schedule=AdaptiveSchedule())),
    ):
        with pytest.raises(ValueError, match="DenoisingLoss would leave an adaptive schedule where it is"):
            DenoisingLoss(schedule=schedule, weighting=weighed)
    for schedule, weighed in ((LearnedLinear(), weighting), (Cosine(), EpsMSE(schedule=LearnedLinear()))):
        with pytest.raises(ValueError, match="learns from the variational bound alone: method=vdm"):
            DenoisingLoss(schedule=schedule, weighting=weighed)
    inner = AdaptiveDenoisingLoss(schedule=AdaptiveSchedule(), weighting=weighting)
    for wrapper in (lambda: UncertaintyLoss(loss=inner), lambda: LossAware(loss=inner, bins=4)):
        with pytest.raises(ValueError, match="would keep AdaptiveDenoisingLoss from adapting"):
            wrapper()
    with pytest.raises(ValueError, match="a learned schedule stays in its run's loss"):
        uniform_u(LearnedLinear(), 4)
