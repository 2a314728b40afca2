"""SD3's densities: mode sampling, CosMap and the shift of time, each against the paper's formula in its own time."""

import math

import pytest
import torch
from scipy import integrate

from diffusion_lab.process import Cosine, LogitNormal, RectifiedFlow, Schedule, ShiftedCosine
from diffusion_lab.process.schedules.sd3 import ModeSampling, ShiftedFlow
from diffusion_lab.samplers.grids import shifted_time, uniform_time, uniform_u

INF = math.inf
SHIFTED_MODE = ShiftedFlow(base=ModeSampling(scale=0.8), shift=2.5)
ALL = {
    "mode": ModeSampling(),
    "mode_strong": ModeSampling(scale=1.75),
    "mode_uniform": ModeSampling(scale=0.0),
    "mode_ends": ModeSampling(scale=-0.8),
    "cosmap": Cosine(logsnr_min=-INF, logsnr_max=INF),
    "shifted": ShiftedFlow(base=LogitNormal(), shift=3.0),
    "shifted_mode": SHIFTED_MODE,
    "shifted_back": ShiftedFlow(base=Cosine(), shift=0.4),
}
every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
U = torch.linspace(0.0005, 0.9995, 2000, dtype=torch.float64)


def time(logsnr):
    """Rectified flow's time, 0 at data."""
    return RectifiedFlow()(logsnr)[1]


@every
def test_is_a_schedule_and_falls_strictly(schedule):
    assert isinstance(schedule, Schedule)
    assert bool((schedule(U).diff() < 0).all())


@every
def test_inverse_is_exact(schedule):
    torch.testing.assert_close(schedule.inverse(schedule(U)), U, rtol=0, atol=1e-11)


@every
def test_density_is_the_derivative_of_the_inverse(schedule):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    logsnr = schedule(u)
    (slope,) = torch.autograd.grad(logsnr.sum(), u)
    torch.testing.assert_close(schedule.log_density(logsnr.detach()), -torch.log(-slope), rtol=0, atol=1e-9)


@every
def test_float32_agrees_with_float64(schedule):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    logsnr = schedule(u)
    torch.testing.assert_close(schedule(u.float()).double(), logsnr, rtol=1e-4, atol=1e-3)
    for method in (schedule.inverse, schedule.log_density):
        found = method(logsnr.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), method(logsnr), rtol=1e-4, atol=1e-4)


@every
def test_density_is_normalised(schedule):
    def density(level):
        return float(torch.exp(schedule.log_density(torch.tensor(level, dtype=torch.float64))))

    ends = schedule(torch.tensor([0.999, 0.001], dtype=torch.float64)).tolist()
    mass, _ = integrate.quad(density, *ends, limit=200)
    assert mass == pytest.approx(0.998, abs=1e-7)


# ---- mode sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.9, 0.0, 0.5, 1.29, 1.75])
def test_mode_is_the_papers_formula(scale):
    # f_mode(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u), with u from noise to data
    theirs = 1 - U
    expected = 1 - theirs - scale * (torch.cos(math.pi / 2 * theirs) ** 2 - 1 + theirs)
    # absolute: the paper's form loses digits where t is small
    torch.testing.assert_close(time(ModeSampling(scale=scale)(U)), expected, rtol=0, atol=2e-15)


def test_scale_zero_is_uniform_in_time():
    torch.testing.assert_close(time(ModeSampling(scale=0.0)(U)), U, rtol=0, atol=1e-14)
    grid = uniform_u(ModeSampling(scale=0.0), 12)
    torch.testing.assert_close(grid, uniform_time(12), rtol=0, atol=1e-12)


def test_mode_ends_are_infinite_and_tails_heavy():
    schedule = ModeSampling(scale=1.29)
    assert schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [INF, -INF]
    assert schedule.inverse(torch.tensor([INF, -INF], dtype=torch.float64)).tolist() == [0.0, 1.0]
    # the density of t at the ends is 1 / (1 + scale), where that of the logit-normal vanishes
    level = torch.tensor([30.0, -30.0], dtype=torch.float64)
    alpha, sigma = RectifiedFlow()(level)
    density_of_t = torch.exp(schedule.log_density(level)) / (0.5 * alpha * sigma)
    torch.testing.assert_close(density_of_t, torch.full_like(level, 1 / 2.29), rtol=1e-6, atol=0)


def test_mode_inverse_at_far_levels():
    schedule, u = ModeSampling(scale=1.29), torch.tensor([1e-9, 1e-6], dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse(schedule(u)), u, rtol=1e-7, atol=0)
    torch.testing.assert_close(1 - schedule.inverse(schedule(1 - u)), u, rtol=1e-6, atol=0)


# ---- CosMap ----------------------------------------------------------------------------------------------------------


def test_cosmap_is_the_unbounded_cosine():
    schedule = ALL["cosmap"]
    expected = 1 - 1 / (torch.tan(math.pi / 2 * U) + 1)
    torch.testing.assert_close(time(schedule(U)), expected, rtol=1e-12, atol=0)
    # the paper's density of t, 2 / (pi - 2 pi t + 2 pi t^2)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    log_density = schedule.log_density(2 * torch.log((1 - t) / t)) - torch.log(0.5 * t * (1 - t))
    torch.testing.assert_close(
        log_density.exp(), 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2), rtol=1e-12, atol=0
    )


# ---- the shift -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 8.0])
def test_the_shift_of_time_is_a_move_in_log_snr(shift):
    for base in (ModeSampling(scale=0.0), LogitNormal(), Cosine()):
        schedule, t = ShiftedFlow(base=base, shift=shift), time(base(U))
        expected = shift * t / (1 + (shift - 1) * t)
        torch.testing.assert_close(time(schedule(U)), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            schedule(U), base(U) - 2 * math.log(shift) * torch.ones_like(U), rtol=0, atol=1e-12
        )


def test_the_grid_has_the_same_shift():
    grid, t = shifted_time(12, 3.0), 1 - torch.arange(13, dtype=torch.float64) / 12
    torch.testing.assert_close(time(grid), 3 * t / (1 + 2 * t), rtol=0, atol=1e-14)
    assert grid[0] == -INF and grid[-1] == INF and torch.equal(shifted_time(12, 1.0), uniform_time(12))
    torch.testing.assert_close(
        grid, uniform_u(ShiftedFlow(base=ModeSampling(scale=0.0), shift=3.0), 12), rtol=0, atol=1e-12
    )


def test_the_shift_is_simple_diffusions():
    ours = ShiftedFlow(base=Cosine(), shift=256 / 64)
    theirs = ShiftedCosine(size=256, reference_size=64, keep_range=False)
    torch.testing.assert_close(ours(U), theirs(U), rtol=0, atol=1e-12)


def test_the_shift_keeps_the_uncertainty_of_a_constant_image():
    # SD3, section 5.3.2: an image of n equal pixels c, seen as (1 - t) c + t eps, is known to t / (1 - t) / sqrt(n)
    n, m = 64 * 64, 256 * 256
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shift = math.sqrt(m / n)
    shifted = time(2 * torch.log((1 - t) / t) - 2 * math.log(shift))
    torch.testing.assert_close(
        shifted / (1 - shifted) / math.sqrt(m), t / (1 - t) / math.sqrt(n), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModeSampling(scale=-1.0),
        lambda: ModeSampling(scale=1.76),
        lambda: ShiftedFlow(base=Cosine(), shift=0.0),
        lambda: ShiftedFlow(base=Cosine(), shift=-2.0),
        lambda: shifted_time(4, 0.0),
        lambda: shifted_time(0, 1.0),
    ],
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(ValueError):
        make()
