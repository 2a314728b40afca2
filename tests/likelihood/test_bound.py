"""The bound of data sets against entropies, and what its draws say of other densities of levels."""

import math
from itertools import pairwise

import pytest
import torch

from diffusion_lab.denoisers import EmpiricalDenoiser, GaussianDenoiser
from diffusion_lab.likelihood import BoundEvaluation, Cut, ODELikelihood
from diffusion_lab.likelihood.bound import (
    by_level,
    deviation,
    deviations,
    error_density,
    frozen,
    reconstruction_table,
)
from diffusion_lab.losses.vlb_terms import Levels, reconstruction
from diffusion_lab.process import Cosine, LinearLogSNR, VariancePreserving
from diffusion_lab.process.schedules import LearnedSchedule
from diffusion_lab.rng import SampleRNG

D64 = torch.float64
VP = VariancePreserving()
LOW, HIGH, C = -5.0, 13.3, 0.7
LINE = LinearLogSNR(logsnr_min=LOW, logsnr_max=HIGH)


def gaussian(dim, c=C):
    return GaussianDenoiser(
        mean=torch.zeros(dim, dtype=D64), covariance=torch.tensor(c, dtype=D64), interpolant=VP
    )


def gaussian_data(n, dim, c=C):
    return math.sqrt(c) * torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=D64)


def check(values, truth, sigmas=4.0, relative=0.02):
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - truth) < sigmas * error, (float(values.mean()), truth, error)
    assert error < relative * abs(truth)


@torch.no_grad()
def test_of_gaussian_data_the_bound_is_the_entropy():
    x0, draws = gaussian_data(2000, 16), 16
    found = BoundEvaluation(schedule=LINE, levels=None, draws=draws)(
        gaussian(16), x0, rng=SampleRNG(range(2000))
    )
    # papers: L_inf = 6.4693
    check(found.diffusion, 6.4693)
    # prior and decoder know that only the noise is left: the sum is the entropy and KL(q(z_1) || N)
    v = 1 + (C - 1) / (1 + math.exp(-LOW))
    entropy = (
        0.5 * math.log(2 * math.pi * math.e * C)
        + 0.5 * (v - 1 - math.log(v))
        + 0.5 * math.log1p(math.exp(-HIGH) / C)
    )
    check(found.total, entropy, relative=0.1)
    assert found.draws.shape == (2000, draws)


@torch.no_grad()
def test_more_levels_an_image_cut_the_noise_more_than_more_draws_would():
    x0 = gaussian_data(1, 64).expand(600, 64)  # one image, so that all that varies is the estimate
    variance = {}
    for draws in (1, 8):
        bound = BoundEvaluation(schedule=LINE, levels=None, draws=draws)
        variance[draws] = float(bound(gaussian(64), x0, rng=SampleRNG(range(600))).diffusion.var())
    assert variance[8] < 0.5 * variance[1] / 8


@torch.no_grad()
def test_steps_fall_to_the_entropy_with_the_papers_excess():
    # errors are quadratic: images and noise of plus and minus one standard deviation are exact, as signs of all pairs
    class Signs:
        def __init__(self, n):
            self.n = n

        def rand(self, shape, dtype, device):
            return torch.full((self.n, *shape), 0.5, dtype=dtype)

        def randn(self, shape, dtype, device):
            return torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype).view(4, 1).expand(4, *shape)

    x0 = math.sqrt(C) * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=D64)[:, None]
    excess = []
    for steps in (100, 200, 400, 800):
        bound = BoundEvaluation(schedule=LINE, levels=None, steps=steps, draws=steps)
        excess.append(float(bound(gaussian(1), x0, rng=Signs(4)).diffusion.mean()) - 6.4693)
    assert excess == pytest.approx([0.580, 0.281, 0.139, 0.069], abs=1e-3)
    assert all(b < a for a, b in pairwise(excess))


@torch.no_grad()
def test_eight_bits():
    # iid uniform levels: prior + diffusion + reconstruction = 8 bits and KL(q(z_1) || N), at the papers' figures
    levels, n = Levels(count=256, low=-255 / 256, high=255 / 256), 256
    x0 = levels.positions(torch.zeros((), dtype=D64))[torch.arange(n) % 256][:, None]
    denoiser = EmpiricalDenoiser(data=levels.positions(torch.zeros((), dtype=D64))[:, None], interpolant=VP)
    found = BoundEvaluation(schedule=LINE, levels=levels, draws=128)(denoiser, x0, rng=SampleRNG(range(n)))
    check(found.diffusion / math.log(2), 7.98797)
    assert float(found.prior.mean()) / math.log(2) == pytest.approx(0.00163, abs=1e-5)
    assert float(found.reconstruction.mean()) / math.log(2) == pytest.approx(0.01041, abs=6e-6)
    check(found.total / math.log(2), 8.00001)


@pytest.mark.parametrize("logsnr", [9.5, 13.3])
@torch.no_grad()
def test_the_table_is_the_mean_of_the_losses_own_term(logsnr):
    levels, n = Levels(), 4_000
    table = reconstruction_table(levels, logsnr)
    g = torch.Generator().manual_seed(1)
    for k in (0, 100):  # the end of the range has one neighbour only
        x0 = levels.positions(table)[k].expand(n, 1)
        values = reconstruction(
            x0, torch.randn(n, 1, generator=g, dtype=D64), torch.tensor(logsnr, dtype=D64), levels
        )
        error = float(values.std()) / math.sqrt(n)
        assert abs(float(values.mean() - table[k])) < 4 * error + 1e-12


@torch.no_grad()
def test_the_bound_and_the_ode_agree_on_gaussian_data():
    pytest.importorskip("torchode")
    x0 = gaussian_data(64, 4)
    bound = BoundEvaluation(schedule=LINE, levels=None, draws=300)(
        gaussian(4), x0, rng=SampleRNG(range(64))
    ).total
    ode = ODELikelihood(logsnr_min=LOW, logsnr_max=HIGH, divergence="exact")(gaussian(4), x0)
    difference = bound + ode.log_density / 4
    # image by image the bound holds the noise of its levels; the mean is the same
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 8
    assert float(difference.std()) / 8 < 0.05


def test_a_schedule_is_cut():
    pure = Cosine(logsnr_min=-math.inf, logsnr_max=math.inf)
    cut = Cut(pure, logsnr_min=-8.0, logsnr_max=11.0)
    u = torch.linspace(0, 1, 2001, dtype=D64)
    logsnr = cut(u)
    assert float(logsnr[0]) == pytest.approx(11.0, abs=1e-9) and float(logsnr[-1]) == pytest.approx(
        -8.0, abs=1e-9
    )
    torch.testing.assert_close(cut.inverse(logsnr), u, rtol=0, atol=1e-9)
    # a density of one on what is left, as steep as the slope
    levels = torch.linspace(-8, 11, 20_001, dtype=D64)
    assert float(torch.trapezoid(cut.log_density(levels).exp(), levels)) == pytest.approx(1.0, abs=1e-6)
    slope = -(logsnr[2:] - logsnr[:-2]) / (u[2:] - u[:-2])
    torch.testing.assert_close(torch.exp(-cut.log_density(logsnr[40:-40])), slope[39:-39], rtol=2e-3, atol=0)
    whole = Cut(LINE, logsnr_min=-math.inf, logsnr_max=math.inf)
    assert torch.equal(whole(u), LINE(u)) and (whole.logsnr_min, whole.logsnr_max) == (LOW, HIGH)
    with pytest.raises(ValueError, match="finite ends"):
        Cut(pure, logsnr_min=-math.inf, logsnr_max=10.0)
    with pytest.raises(ValueError, match="leaves"):
        Cut(LINE, logsnr_min=14.0, logsnr_max=20.0)
    learned = frozen(LearnedSchedule(logsnr_min=LOW, logsnr_max=HIGH, width=8))
    assert not any(p.requires_grad for p in learned.parameters())
    assert Cut(learned, logsnr_min=-20.0, logsnr_max=20.0).logsnr_max == pytest.approx(HIGH, abs=1e-6)


def drawn(schedule, proposal=None, n=4000, dim=8):
    bound = BoundEvaluation(schedule=schedule, levels=None, draws=4, proposal=proposal)
    with torch.no_grad():
        return bound(gaussian(dim), gaussian_data(n, dim), rng=SampleRNG(range(n)))


COSINE = Cosine(logsnr_min=LOW, logsnr_max=HIGH)


def test_a_proposal_changes_the_noise_and_not_the_mean():
    line, cosine = drawn(LINE), drawn(COSINE)
    proposed = drawn(COSINE, LINE)
    assert torch.equal(line.draws, proposed.draws)
    check(cosine.diffusion, 6.4693, relative=0.1)
    with pytest.raises(ValueError, match="proposal ends"):
        BoundEvaluation(schedule=LINE, levels=None, proposal=LinearLogSNR(logsnr_min=-4.0, logsnr_max=HIGH))
    with pytest.raises(ValueError, match="no proposal"):
        BoundEvaluation(schedule=LINE, levels=None, proposal=COSINE, steps=3)


def test_deviations_are_foretold_from_draws_of_another_density():
    line, cosine = drawn(LINE), drawn(COSINE)
    for found, own in ((line, LINE), (cosine, COSINE)):
        measured = float(found.draws.std())
        assert deviation(found.logsnr, found.draws, own, own) == pytest.approx(measured, rel=1e-3)
    told = deviations(line.logsnr, line.draws, LINE, COSINE)
    assert list(told) == [
        "uniform in log-SNR",
        "the run's schedule",
        "as the error",
        "as its root mean square",
    ]
    assert told["the run's schedule"] == pytest.approx(float(cosine.draws.std()), rel=0.15)
    assert told["uniform in log-SNR"] == pytest.approx(float(line.draws.std()), rel=1e-3)
    assert told["as its root mean square"] <= told["as the error"] < told["uniform in log-SNR"]
    assert told["uniform in log-SNR"] < told["the run's schedule"]


def test_the_error_density_is_the_errors():
    found = drawn(LINE)
    density = error_density(found.logsnr, found.draws, LINE, (HIGH, LOW))
    middle = torch.linspace(LOW, HIGH, 41, dtype=D64)[1::2]
    # papers: E |eps - eps_hat|² = sigmoid(lambda + log c) a dimension
    expected = torch.sigmoid(middle + math.log(C))
    ratio = density.means / (0.5 * expected)
    assert float((ratio / ratio.mean() - 1).abs().max()) < 0.15


def test_levels_add_up_to_the_term():
    found = drawn(LINE, n=500)
    rows = by_level(found.logsnr, found.draws, (HIGH, LOW))
    assert len(rows) == 10 and rows[0]["logsnr_min"] == LOW and rows[-1]["logsnr_max"] == pytest.approx(HIGH)
    assert sum(row["value"] for row in rows) == pytest.approx(float(found.diffusion.mean()), rel=1e-9)
    for row in rows[5:]:
        width = (HIGH - LOW) / 10
        truth = 0.5 * (
            math.log1p(C * math.exp(row["logsnr_max"])) - math.log1p(C * math.exp(row["logsnr_max"] - width))
        )
        assert abs(row["value"] - truth) < 4 * row["standard_error"]


def test_an_image_does_not_see_its_neighbours():
    bound = BoundEvaluation(schedule=COSINE, levels=None, draws=3)
    x0 = gaussian_data(6, 5)
    whole = bound(gaussian(5), x0, rng=SampleRNG(range(6)))
    part = bound(gaussian(5), x0[4:], rng=SampleRNG([4, 5]))
    torch.testing.assert_close(whole.total[4:], part.total, rtol=1e-13, atol=0)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="draws >= 1"):
        BoundEvaluation(schedule=LINE, levels=None, draws=0)
    with pytest.raises(ValueError, match="finite ends"):
        BoundEvaluation(schedule=Cosine(logsnr_min=-math.inf), levels=None)
    bound = BoundEvaluation(schedule=LINE, levels=Levels(), draws=1)
    with pytest.raises(ValueError, match="not among"):
        bound(gaussian(2), torch.full((1, 2), 0.3, dtype=D64), rng=SampleRNG([0]))
