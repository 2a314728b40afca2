"""Weightings against the published tables, and the rule that the sampling density never changes the objective."""

import math

import pytest
import torch

from diffusion_lab.losses import (
    ELBO,
    P2,
    SNR,
    VMSE,
    EDMWeighting,
    EpsMSE,
    MinSNR,
    SigmoidWeighting,
    SNRPlusOne,
    TruncatedSNR,
    VelocityMSE,
    Weighting,
)
from diffusion_lab.process import Cosine, LinearLogSNR, LogitNormal, LogNormal

WIDE = Cosine(logsnr_min=-math.inf, logsnr_max=math.inf)
LOGSNR = torch.linspace(-12, 12, 97, dtype=torch.float64)
sech = 1 / torch.cosh(LOGSNR / 2)
density = sech / (2 * math.pi)


class FlowTime:
    """Uniform rectified-flow time: p = |d sigmoid(-l/2) / dl|."""

    def log_density(self, logsnr):
        return torch.log(0.5 * torch.sigmoid(logsnr / 2) * torch.sigmoid(-logsnr / 2))


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        # Kingma & Gao 2023, table 1, with its constants
        (ELBO(), torch.ones_like(LOGSNR)),
        (EpsMSE(schedule=WIDE), density),
        (VMSE(schedule=WIDE), torch.exp(-LOGSNR / 2) / math.pi),
        (VelocityMSE(schedule=FlowTime()), torch.exp(-LOGSNR / 2) / 2),
        (SigmoidWeighting(bias=2.0), torch.sigmoid(2 - LOGSNR)),
        (MinSNR(gamma=5.0, schedule=WIDE), density * torch.clamp(5 * torch.exp(-LOGSNR), max=1)),
        (P2(k=1.0, gamma=1.0, schedule=WIDE), density / (1 + torch.exp(LOGSNR))),
        (TruncatedSNR(schedule=WIDE), density * torch.clamp(torch.exp(-LOGSNR), min=1)),
        # the same with other parameters than the papers'
        (MinSNR(gamma=2.0, schedule=WIDE), density * torch.clamp(2 * torch.exp(-LOGSNR), max=1)),
        (P2(k=0.3, gamma=0.5, schedule=WIDE), density / torch.sqrt(0.3 + torch.exp(LOGSNR))),
        (SigmoidWeighting(bias=-1.5), 1 / (1 + torch.exp(LOGSNR + 1.5))),
        (
            EDMWeighting(p_mean=-0.4, p_std=1.0, sigma_data=0.8),
            torch.exp(-0.5 * ((LOGSNR - 0.8) / 2.0) ** 2)
            / (2.0 * math.sqrt(2 * math.pi))
            * (torch.exp(-LOGSNR) + 0.64)
            / 0.64,
        ),
        (
            EDMWeighting(sigma_data=0.5),
            torch.exp(-0.5 * ((LOGSNR - 2.4) / 2.4) ** 2)
            / (2.4 * math.sqrt(2 * math.pi))
            * (torch.exp(-LOGSNR) + 0.25)
            / 0.25,
        ),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Weighting) else "",
)
def test_table(weighting, expected):
    torch.testing.assert_close(weighting(LOGSNR), expected, rtol=1e-10, atol=0)


def test_aliases_are_the_same_objective():
    assert SNR is EpsMSE and SNRPlusOne is VMSE


def test_edm_peaks_where_the_paper_says():
    # papers: the argmax of EDM's w is at logsnr = -3.308
    fine = torch.linspace(-6, 0, 60_001, dtype=torch.float64)
    assert float(fine[EDMWeighting(sigma_data=0.5)(fine).argmax()]) == pytest.approx(-3.308, abs=1e-3)


@pytest.mark.parametrize("bias", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(
    "schedule",
    [
        LinearLogSNR(logsnr_min=-40, logsnr_max=40),
        Cosine(logsnr_min=-40, logsnr_max=40),
        # wide enough to hold the integrand; a narrow one has the same mean and endless variance
        LogNormal(mean=0.0, std=4.0),
        LogitNormal(mean=0.5, std=5.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_density_changes_nothing_and_the_closed_form_holds(schedule, c, bias):
    # Gaussian data of variance c: the eps error is sigmoid(logsnr + ln c), and the loss has the value k / (2 (1 -
    # e^-k))
    k = bias + math.log(c)
    exact = 0.5 * (k / -math.expm1(-k) if k else 1.0)
    n = 400_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    logsnr = schedule(u)
    ratio = SigmoidWeighting(bias=bias)(logsnr) * torch.exp(-schedule.log_density(logsnr))
    value = 0.5 * (ratio * torch.sigmoid(logsnr + math.log(c))).mean()
    assert float(value) == pytest.approx(exact, rel=2e-5)
