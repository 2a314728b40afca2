"""Reflow on closed forms: pairs of a Gaussian's ODE lie on straight lines, and one step along them is all of it."""

import math

import pytest
import torch
from problems import INTERPOLANTS, gaussian

from diffusion_lab.losses import SNRPlusOne, VelocityMSE
from diffusion_lab.losses.distillation import ReflowLoss
from diffusion_lab.losses.distillation.reflow import carried
from diffusion_lab.process import Cosine, RectifiedFlow, VariancePreserving
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.schedules.sd3 import ModeSampling
from diffusion_lab.rng import StepRNG
from diffusion_lab.samplers import DDIM, Euler
from diffusion_lab.samplers.adaptive_rk import AdaptiveRK
from diffusion_lab.samplers.grids import uniform_logsnr, uniform_time, uniform_u

D64 = torch.float64
VP = VariancePreserving()
COSINE = Cosine(logsnr_min=-10.0, logsnr_max=10.0)
TIME = ModeSampling(scale=0.0)
SPREAD = 0.4


def loss_of(schedule=COSINE, weighting=SNRPlusOne, **options):
    return ReflowLoss(schedule=schedule, weighting=weighting(schedule=schedule), **options)


def rng(total):
    return StepRNG(seed=0, step=0, positions=slice(None), total=total)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


class Straight:
    """What reflow has to find for x1 = spread eps."""

    def __init__(self, interpolant, spread=SPREAD):
        self.interpolant, self.spread = interpolant, spread

    def __call__(self, x, logsnr, cond=None):
        alpha, sigma = self.interpolant(logsnr)
        return broadcast_right(self.spread / (alpha * self.spread + sigma), x) * x


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_a_gaussians_pairs_are_straight_and_one_step_of_the_reflowed_is_the_whole_ode(interpolant):
    teacher, eps = gaussian(interpolant, SPREAD**2, dim=3), noise(8, 3)
    solver = AdaptiveRK(rtol=1e-9, atol=1e-9)
    ends = carried(teacher, solver, uniform_logsnr(-30.0, 30.0, 2), eps)
    # the ODE's map, from as good as pure noise
    torch.testing.assert_close(ends, SPREAD * eps, rtol=1e-5, atol=1e-6)
    student = Straight(interpolant)
    terms = loss_of()(student, SPREAD * eps, eps, None, rng(8))
    assert float(terms.per_example.max()) < 1e-20
    assert float(loss_of()(Straight(interpolant, 0.5), ends, eps, None, rng(8)).total) > 1e-3
    grids = [uniform_u(COSINE, n) for n in (1, 7)]
    if interpolant is not INTERPOLANTS["ve"]:
        grids.append(uniform_time(1))
    for grid in grids:
        (alpha, sigma), sampler = interpolant(grid[0]), DDIM()
        at_start = float(alpha) * SPREAD * eps + float(sigma) * eps
        torch.testing.assert_close(sampler(student, at_start, grid), SPREAD * eps, rtol=1e-9, atol=1e-9)
        # the teacher in as many steps is not there
        assert float((sampler(teacher, at_start, grid) - SPREAD * eps).abs().max()) > 0.01


def test_straightness_is_the_papers_before_and_none_after():
    """E |(x1 - x0) - v|^2 over time: pi s / 2 for data that know nothing of the noise, zero for pairs."""
    # every second moment, exactly, at next to equal levels
    n = 8192
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=D64).repeat(n // 4, 1)
    x0, eps = SPREAD * signs[:, :1], signs[:, 1:]
    flow = RectifiedFlow()
    before = loss_of(TIME, VelocityMSE)(gaussian(flow, SPREAD**2), x0, eps, None, rng(n))
    assert 2 * float(before.total) == pytest.approx(0.5 * math.pi * SPREAD, abs=1e-3)
    assert 2 * float(before.total) == pytest.approx(0.63, abs=5e-3)
    after = loss_of(TIME, VelocityMSE)(Straight(flow), SPREAD * eps, eps, None, rng(n))
    assert 2 * float(after.total) < 1e-20
    # and the way is shorter
    assert float((SPREAD * eps - eps).square().mean()) < float((x0 - eps).square().mean())


def test_one_step_is_asked_at_the_noise_end_alone():
    eps = noise(16, 2)
    ends = SPREAD * eps

    class AtNoise(Straight):
        """What has to be found for sigma eps, where a sampler starts."""

        def __call__(self, x, logsnr, cond=None):
            assert float((COSINE.inverse(logsnr) - 1).abs().max()) < 1e-9
            _, sigma = VP(logsnr)
            return broadcast_right(self.spread / sigma, x) * x

    terms = loss_of()(AtNoise(VP), ends, eps, None, rng(16), one_step=True)
    assert float(terms.total) < 1e-18
    wrong = loss_of()(AtNoise(VP, 0.5), ends, eps, None, rng(16), one_step=True)
    # the same for each: no level counts more than another
    _, sigma = VP(wrong.logsnr)
    ratio = wrong.per_example / (ends - AtNoise(VP, 0.5)(sigma[:, None] * eps, wrong.logsnr)).square().mean(1)
    torch.testing.assert_close(ratio, ratio[:1].expand(16), rtol=1e-6, atol=0)
    # levels of the whole schedule otherwise
    assert float(loss_of()(Straight(VP), ends, eps, None, rng(16)).logsnr.std()) > 2


def test_only_the_student_gets_a_gradient_and_labels_are_dropped_for_it_alone():
    heard = []

    class Listening:
        interpolant = VP

        def __init__(self):
            self.weight = torch.ones((), dtype=D64, requires_grad=True)

        def __call__(self, x, logsnr, cond=None):
            heard.append((cond["label"], torch.is_grad_enabled()))
            return self.weight * x

    student, teacher, label = Listening(), Listening(), {"label": torch.arange(32)}
    ends = carried(teacher, Euler(), uniform_u(COSINE, 2), noise(32, 2), label)
    assert not ends.requires_grad and all(torch.equal(given, label["label"]) for given, _ in heard)
    loss_of(label_dropout=0.5)(student, ends, noise(32, 2), label, rng(32)).total.backward()
    assert [grad for _, grad in heard] == [False, False, True]
    assert 0 < int((heard[-1][0] == -1).sum()) < 32
    assert student.weight.grad is not None and teacher.weight.grad is None
