"""Every schedule: strictly falling, exactly invertible, and a density that is the derivative of its inverse."""

import math

import pytest
import torch
from scipy import integrate

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
from diffusion_lab.process.schedules.offset_cosine import OffsetCosine

ALL = {
    "cosine": Cosine(),
    "cosine_unclipped": Cosine(logsnr_min=-math.inf, logsnr_max=math.inf),
    "shifted": ShiftedCosine(size=256),
    "shifted_plain": ShiftedCosine(size=256, keep_range=False),
    "interpolated": InterpolatedCosine(size=512),
    "interpolated_plain": InterpolatedCosine(size=512, keep_range=False),
    "interpolated_unclipped": InterpolatedCosine(size=512, logsnr_min=-math.inf, logsnr_max=math.inf),
    "linear_beta": LinearBeta(),
    "linear_beta_other": LinearBeta(beta_min=0.7, beta_max=9.0, s_min=0.02),
    "linear_beta_from_zero": LinearBeta(beta_min=0.0, beta_max=12.0),
    "karras": Karras(),
    "karras_other": Karras(sigma_min=0.03, sigma_max=14.6, rho=3.0),
    "log_normal": LogNormal(),
    "logit_normal": LogitNormal(),
    "sigmoid": Sigmoid(),
    "sigmoid_other": Sigmoid(start=-2.0, end=1.0, tau=0.7),
    "linear": LinearLogSNR(),
    "offset_cosine": OffsetCosine(),
    "offset_cosine_other": OffsetCosine(offset=0.1, logsnr_min=-9.0, logsnr_max=4.0),
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


@pytest.mark.parametrize("bounds", [{}, {"keep_range": False}], ids=["kept", "plain"])
def test_infinite_ends_are_exact_in_the_whole_family(bounds):
    ends = {"logsnr_min": -math.inf, "logsnr_max": math.inf}
    for schedule in (
        Cosine(**ends),
        ShiftedCosine(size=256, **ends, **bounds),
        InterpolatedCosine(size=512, **ends, **bounds),
    ):
        logsnr = schedule(tensor(0, 0.5, 1))
        assert logsnr[0] == math.inf and logsnr[2] == -math.inf and bool(torch.isfinite(logsnr[1]))


def test_linear_beta_is_the_limit_of_ddpm():
    # DDPM's product of (1 - beta_i), 1000 steps from 1e-4 to 0.02, and finer ones with the same beta a unit of time
    schedule, errors = LinearBeta(), []
    for n in (1000, 10_000, 100_000):
        beta = torch.linspace(0.1, 20.0, n, dtype=torch.float64) / n
        log_alpha2 = torch.log1p(-beta).cumsum(0)
        discrete = log_alpha2 - torch.log(-torch.expm1(log_alpha2))
        s = torch.arange(1, n + 1, dtype=torch.float64) / n
        continuous = schedule((s - schedule.s_min) / (1 - schedule.s_min))
        errors.append(float((continuous - discrete)[n // 20 :].abs().max()))
    # the difference falls as 1 / n, so there is nothing left of it at infinity
    assert errors[0] < 0.13 and errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize(("b0", "b1", "s_min"), [(0.1, 20.0, 1e-3), (0.7, 9.0, 0.02), (0.0, 12.0, 1e-5)])
def test_linear_beta_integrates_beta(b0, b1, s_min):
    # Song et al. 2021, eq. 29: alpha^2(s) = exp(-integral of beta from 0 to s), beta(s) = b0 + s (b1 - b0)
    schedule = LinearBeta(beta_min=b0, beta_max=b1, s_min=s_min)
    for s in (s_min, 0.1, 0.4, 1.0):
        B, _ = integrate.quad(lambda s: b0 + s * (b1 - b0), 0.0, s)
        expected = math.log(math.exp(-B) / -math.expm1(-B))
        assert float(schedule(tensor((s - s_min) / (1 - s_min)))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("b0", [0.0, 0.1])
def test_linear_beta_has_an_inverse_and_a_density_at_both_infinities(b0, dtype):
    schedule = LinearBeta(beta_min=b0, s_min=0.25)
    ends = torch.tensor([math.inf, -math.inf], dtype=dtype)
    u = schedule.inverse(ends)
    # s = 0 and s = inf, in units of u
    assert u.tolist() == [pytest.approx(-1 / 3), math.inf] and torch.equal(schedule(u[1:]), ends[1:])
    density = schedule.log_density(ends)
    # (with b0 = 0 the density at +inf is 0 / 0, and no level is drawn there)
    assert density[1] == -math.inf and (b0 == 0.0 or density[0] == -math.inf)
    # round trips from far beyond the schedule's range
    far = torch.tensor([9.0, 2.0, -30.0, -3000.0], dtype=dtype)
    rtol = 1e-4 if dtype is torch.float32 else 1e-10
    torch.testing.assert_close(schedule(schedule.inverse(far)), far, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("start", "end", "tau"),
    [(-3, 3, 0.3), (-3, 3, 0.7), (-3, 3, 1.0), (0, 3, 0.3), (0, 3, 0.7), (0, 3, 1.0), (-2, 1, 0.7)],
)
def test_sigmoid_is_chens(start, end, tau):
    def g(t):
        return 1 / (1 + math.exp(-(start + t * (end - start)) / tau))

    def gamma(t):
        """Chen 2023, algorithm 1: gamma(t) is alpha^2."""
        return (g(1) - g(t)) / (g(1) - g(0))

    # u runs over the part of [0, 1] that is left by clipping log-SNR to +-L: choose the ends of that part
    first, last = 0.02, 0.97
    high, low = (math.log(gamma(t) / (1 - gamma(t))) for t in (first, last))
    schedule = Sigmoid(start=start, end=end, tau=tau, logsnr_min=low, logsnr_max=high)
    for t in (0.02, 0.1, 0.35, 0.5, 0.8, 0.97):
        expected = math.log(gamma(t) / (1 - gamma(t)))
        u = (t - first) / (last - first)
        assert float(schedule(tensor(u))) == pytest.approx(expected, abs=1e-9)
        assert float(schedule.inverse(tensor(expected))) == pytest.approx(u, abs=1e-9)


@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.03, 14.6, 3.0)])
def test_karras_is_edms_formula(low, high, rho):
    # Karras et al. 2022, eq. 5, with i / (N - 1) = 1 - u
    schedule = Karras(sigma_min=low, sigma_max=high, rho=rho)
    for part in (0.0, 0.2, 0.5, 0.9, 1.0):
        sigma = (high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        got = float(torch.exp(-schedule(tensor(1 - part)) / 2))
        assert got == pytest.approx(sigma, rel=1e-12)


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


def test_the_offset_cosine_is_improved_ddpms():
    # eq. 17 for T = 4000, wherever the published bound on beta does not act
    schedule, s, T = OffsetCosine(logsnr_min=-15.0, logsnr_max=15.0), 0.008, 4000
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T)]
    for t in (1, 5, 20, 100, 2000, 3900):
        abar = f[t] / f[0]
        logsnr = math.log(abar / (1 - abar))
        # theta of this t, and the u of it between the bounds
        theta = (t / T + s) / (1 + s) * math.pi / 2
        u = (theta - schedule._ends()[0]) / (schedule._ends()[1] - schedule._ends()[0])
        assert float(schedule(tensor(u))) == pytest.approx(logsnr, abs=1e-9)
    assert float(OffsetCosine(offset=1e-9)(tensor(0.3))) == pytest.approx(
        float(Cosine()(tensor(0.3))), abs=1e-3
    )
    with pytest.raises(ValueError, match="offset > 0"):
        OffsetCosine(offset=0.0)
