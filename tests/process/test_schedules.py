"""Every schedule: strictly falling, exactly invertible, and a density that is the derivative of its inverse."""

import math

import pytest
import torch

from diffusion_lab.process import (
    Cosine,
    InterpolatedCosine,
    Karras,
    LinearBeta,
    LinearLogSNR,
    LogitNormal,
    LogNormal,
    RectifiedFlow,
    Schedule,
    ShiftedCosine,
    Sigmoid,
)

ALL = {
    "cosine": Cosine(),
    "cosine_unclipped": Cosine(logsnr_min=-math.inf, logsnr_max=math.inf),
    "shifted": ShiftedCosine(size=256),
    "shifted_plain": ShiftedCosine(size=256, keep_range=False),
    "interpolated": InterpolatedCosine(size=512),
    "interpolated_plain": InterpolatedCosine(size=512, keep_range=False),
    "linear_beta": LinearBeta(),
    "karras": Karras(),
    "log_normal": LogNormal(),
    "logit_normal": LogitNormal(),
    "sigmoid": Sigmoid(),
    "linear": LinearLogSNR(),
}
every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
U = torch.linspace(0.0005, 0.9995, 2000, dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@every
def test_is_a_schedule_and_falls_strictly(schedule):
    assert isinstance(schedule, Schedule)
    assert bool((schedule(U).diff() < 0).all())


@every
def test_inverse_is_exact(schedule):
    torch.testing.assert_close(schedule.inverse(schedule(U)), U, rtol=0, atol=1e-11)


@every
def test_density_is_the_derivative_of_the_inverse(schedule):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    u.requires_grad_()
    logsnr = schedule(u)
    (slope,) = torch.autograd.grad(logsnr.sum(), u)
    torch.testing.assert_close(schedule.log_density(logsnr.detach()), -torch.log(-slope), rtol=0, atol=1e-9)


@every
def test_float32_agrees_with_float64(schedule):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(schedule(u.float()).double(), schedule(u), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (Cosine(), (15, -15)),
        (Cosine(logsnr_min=-20, logsnr_max=20), (20, -20)),
        (ShiftedCosine(size=256), (15, -15)),
        (InterpolatedCosine(size=512), (15, -15)),
        (Sigmoid(), (15, -15)),
        (LinearLogSNR(), (13.3, -5)),
        (Karras(), (-2 * math.log(0.002), -2 * math.log(80))),
    ],
    ids=lambda v: type(v).__name__,
)
def test_ends(schedule, ends):
    torch.testing.assert_close(schedule(tensor(0, 1)), tensor(*ends), rtol=0, atol=1e-8)


def test_unclipped_cosine_is_the_trigonometric_one_with_infinite_ends():
    schedule = Cosine(logsnr_min=-math.inf, logsnr_max=math.inf)
    expected = 2 * (torch.log(torch.cos(math.pi / 2 * U)) - torch.log(torch.sin(math.pi / 2 * U)))
    torch.testing.assert_close(schedule(U), expected, rtol=0, atol=1e-10)
    assert schedule(tensor(0, 1)).tolist() == [math.inf, -math.inf]


def test_shift_values_of_simple_diffusion():
    # papers: lambda(0.5) = -1.386 (128), -2.773 (256), -4.159 (512) with reference 64, by plain addition
    for size, value in ((64, 0.0), (128, -2 * math.log(2)), (256, -4 * math.log(2)), (512, -6 * math.log(2))):
        schedule = ShiftedCosine(size=size, reference_size=64, keep_range=False)
        assert float(schedule(tensor(0.5))[0]) == pytest.approx(value, abs=1e-12)


def test_interpolation_weights():
    low, high = (ShiftedCosine(size=512, reference_size=r) for r in (32, 256))
    expected = U * high(U) + (1 - U) * low(U)
    torch.testing.assert_close(
        InterpolatedCosine(size=512, low=32, high=256)(U), expected, rtol=0, atol=1e-12
    )


def test_linear_beta_is_the_limit_of_ddpm():
    # DDPM's discrete product of (1 - beta_i), 1000 steps from 1e-4 to 0.02
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    log_alpha2 = torch.log1p(-beta).cumsum(0)
    discrete = log_alpha2 - torch.log(-torch.expm1(log_alpha2))
    s = torch.arange(1, 1001, dtype=torch.float64) / 1000
    schedule = LinearBeta()
    continuous = schedule((s - schedule.s_min) / (1 - schedule.s_min))
    assert float((continuous - discrete)[50:].abs().max()) < 0.13


def test_logit_normal_is_normal_in_the_logit_of_the_flow_time():
    _, sigma = RectifiedFlow()(LogitNormal(mean=0.3, std=0.8)(U))
    expected = 0.3 + 0.8 * torch.special.ndtri(U)
    torch.testing.assert_close(torch.logit(sigma), expected, rtol=0, atol=1e-9)


def test_log_normal_is_edms_density():
    schedule = LogNormal()
    logsnr = tensor(2.4)
    # logsnr ~ N(2.4, 2.4^2): the density at its mean is 1 / (2.4 sqrt(2 pi))
    assert float(schedule.log_density(logsnr)) == pytest.approx(
        -math.log(2.4 * math.sqrt(2 * math.pi)), abs=1e-12
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cosine(logsnr_min=3, logsnr_max=3),
        lambda: LinearLogSNR(logsnr_min=-math.inf),
        lambda: LinearBeta(s_min=0.0),
        lambda: Karras(sigma_min=0.0),
        lambda: LogNormal(std=0.0),
        lambda: Sigmoid(tau=0.0),
        lambda: ShiftedCosine(size=0),
        lambda: InterpolatedCosine(size=64, low=64, high=32),
        lambda: InterpolatedCosine(size=64, low=1, high=1_000_000, keep_range=False),
    ],
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(ValueError):
        make()
