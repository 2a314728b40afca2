"""Settings and meters: what they draw from, what they refuse, and rows that add up."""

import math

import pytest
import torch

from diffusion_lab.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lab.likelihood import BitsPerDim, BitsPerDimODE, Uniform, bits_per_dim
from diffusion_lab.losses.vlb_terms import Levels
from diffusion_lab.process import Cosine, LinearLogSNR, VariancePreserving
from diffusion_lab.process.schedules import LearnedLinear

D64 = torch.float64
COSINE = Cosine(logsnr_min=-math.inf, logsnr_max=math.inf)
LEVELS = Levels(count=4)


def model(dim=2):
    return GaussianDenoiser(
        mean=torch.zeros(dim, dtype=D64),
        covariance=torch.tensor(0.5, dtype=D64),
        interpolant=VariancePreserving(),
    )


def images(n):
    g = torch.Generator().manual_seed(0)
    return LEVELS.positions(torch.zeros((), dtype=D64))[torch.randint(0, 4, (n, 2), generator=g)]


def test_levels_are_drawn_as_asked_and_infinite_ends_are_cut():
    settings = BitsPerDim(logsnr_min=-6.0, logsnr_max=9.0)
    meter = settings.meter(COSINE, None)
    assert (meter.evaluation.logsnr_min, meter.evaluation.logsnr_max) == (-6.0, 9.0)
    assert isinstance(meter.drawn_from, LinearLogSNR) and "log-SNR -6 to 9" in meter.facts["ends"]
    assert BitsPerDim(proposal="run").meter(COSINE, None).drawn_from is not meter.drawn_from
    learned = LearnedLinear(logsnr_min=-5.0, logsnr_max=8.0).double().requires_grad_(False)
    own = BitsPerDim().meter(learned, None)
    assert own.drawn_from is own.schedule and own.evaluation.logsnr_max == pytest.approx(8.0)
    assert isinstance(BitsPerDim(proposal="uniform").meter(learned, None).drawn_from, LinearLogSNR)


def test_rows_of_the_bound():
    meter = BitsPerDim(draws=4).meter(COSINE, LEVELS)
    rows = meter(model(), images(30), None, range(30))
    assert rows.shape == (30, len(meter.columns)) == (30, 3 + 8) and rows.dtype == D64
    total = meter.total(rows)
    torch.testing.assert_close(total, rows[:, :3].sum(1) / math.log(2))
    torch.testing.assert_close(rows[:, 2], rows[:, 7:].mean(1))
    assert sum(part.mean for part in meter.terms(rows).values()) == pytest.approx(float(total.mean()))
    told = meter.report(rows)
    assert set(told) == {"by_level", "deviation_of_one_draw"} and len(told["by_level"]) == 10
    # of a density: the same rows but for the decoder, and in nats
    density = BitsPerDim(draws=4).meter(COSINE, None)
    other = density(model(), images(30), None, range(30))
    torch.testing.assert_close(other[:, 2:], rows[:, 2:])
    torch.testing.assert_close(density.total(other), other[:, :3].sum(1))
    assert "deviation_of_one_draw" not in BitsPerDim(steps=5, draws=4).meter(COSINE, None).report(other)


def test_rows_of_the_ode_are_bits_per_dim():
    pytest.importorskip("torchode")
    meter = BitsPerDimODE(dequantisation="uniform", divergence="exact").meter(COSINE, LEVELS)
    rows = meter(model(), images(8), None, range(8))
    # with uniform noise it is the change of variables of bits.py
    torch.testing.assert_close(meter.total(rows), bits_per_dim(2 * rows[:, 0], 2, LEVELS.gap))
    torch.testing.assert_close(rows[:, 1], torch.full((8,), -math.log(LEVELS.gap), dtype=D64))
    several = BitsPerDimODE(dequantisation="uniform", divergence="exact", draws=3).meter(COSINE, LEVELS)
    assert not torch.equal(several(model(), images(8), None, range(8))[:, 0], rows[:, 0])
    density = BitsPerDimODE(divergence="exact").meter(COSINE, None)
    y = images(8)
    truth = -0.5 * (y.square() / 0.5 + math.log(2 * math.pi * 0.5)).sum(1) / 2
    assert float((density.total(density(model(), y, None, range(8))) + truth).abs().max()) < 1e-4
    assert density.terms(rows) == {}


def test_a_law_that_is_learned_is_asked_for_and_used():
    settings = BitsPerDimODE(dequantisation="variational", dequantisation_images=256)
    assert settings.needs_learning(LEVELS) and not settings.needs_learning(None)
    with pytest.raises(ValueError, match="learned first"):
        settings.meter(COSINE, LEVELS)
    x0 = images(32).float()[:, :1, None, None].expand(32, 1, 2, 2)
    frozen = GaussianMixtureDenoiser(
        means=torch.zeros(1, 1, 2, 2),
        variances=torch.ones(1),
        weights=torch.ones(1),
        interpolant=VariancePreserving(),
    )
    seen = []
    q = settings.learn(frozen, COSINE, LEVELS, x0, None, on_step=lambda n, loss: seen.append(n))
    assert seen == [128, 256] and not any(p.requires_grad for p in q.parameters())
    meter = settings.meter(COSINE, LEVELS, q)
    assert meter.dequantisation is q and "learned from 256 images" in meter.facts["dequantisation"]
    assert isinstance(BitsPerDimODE(dequantisation="uniform").meter(COSINE, LEVELS).dequantisation, Uniform)


def test_misuse_is_named():
    for wrong in ({"draws": 0}, {"steps": 0}, {"proposal": "cosine"}, {"proposal": "run", "steps": 4}):
        with pytest.raises(ValueError):
            BitsPerDim(**wrong)
    for wrong in ({"dequantisation": "none"}, {"draws": 0}, {"dequantisation_images": 0}, {"rtol": -1.0}):
        with pytest.raises(ValueError):
            BitsPerDimODE(**wrong)
    with pytest.raises(ValueError, match="leaves"):
        BitsPerDim(logsnr_min=5.0, logsnr_max=6.0).meter(LinearLogSNR(logsnr_min=-1.0, logsnr_max=1.0), None)
