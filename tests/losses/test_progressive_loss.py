"""Progressive distillation on closed forms: what one step of the student must be, and is."""

import math

import pytest
import torch
from problems import INTERPOLANTS, PURE_COSINE, gaussian

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.losses import ELBO, SNRPlusOne, TruncatedSNR
from diffusion_lab.losses.distillation import DistillationLoss, ProgressiveLoss, adjusted, joined, one_step
from diffusion_lab.process import Cosine, LinearLogSNR, VariancePreserving
from diffusion_lab.process.gaussian import ddim_step, inverse_ddim_step
from diffusion_lab.rng import StepRNG
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.addim import ADDIM
from diffusion_lab.samplers.grids import uniform_u

D64 = torch.float64
VP = VariancePreserving()
WIDE = Cosine(logsnr_min=-20.0, logsnr_max=20.0)


def rng(total):
    return StepRNG(seed=0, step=0, positions=slice(None), total=total)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


class Gains:
    """x0_hat = gain x, one gain for each of the N levels of a student."""

    interpolant = VP

    def __init__(self, schedule, gains):
        self.schedule, self.gains = schedule, gains

    def __call__(self, x, logsnr, cond=None):
        level = (self.schedule.inverse(logsnr) * len(self.gains)).round().long() - 1
        return self.gains[level][:, None] * x


def regressed(loss, teacher, steps, x_var=None, variance=0.25):
    """The exact minimiser of the loss, which is a square in each gain, from its gradients at 0 and 1."""
    x0 = math.sqrt(variance) * noise(4 * steps, 1)
    slopes = []
    for value in (0.0, 1.0):
        gains = torch.full((steps,), value, dtype=D64, requires_grad=True)
        loss(
            Gains(loss.schedule, gains), teacher, x0, None, rng(4 * steps), steps=steps, x_var=x_var
        ).total.backward()
        slopes.append(gains.grad)
    return slopes[0] / (slopes[0] - slopes[1])


def gain_of(denoiser, schedule, steps):
    return float(DDIM()(denoiser, torch.ones(1, 1, dtype=D64), uniform_u(schedule, steps)))


@pytest.mark.parametrize("weighting", [TruncatedSNR, SNRPlusOne])
def test_after_six_halvings_one_step_is_the_teachers_sixty_four(weighting):
    teacher = gaussian(VP, 0.25)
    loss = ProgressiveLoss(schedule=PURE_COSINE, weighting=weighting(schedule=PURE_COSINE))
    student = teacher
    for steps in (32, 16, 8, 4, 2, 1):
        student = Gains(PURE_COSINE, regressed(loss, student, steps))
        # the grid begins at logsnr = -inf, the student was trained just before it
        assert gain_of(Gains(PURE_COSINE, student.gains), PURE_COSINE, steps) == pytest.approx(
            gain_of(teacher, PURE_COSINE, 64), abs=1e-9
        )
    # the constant of the paper's own chain, and not sqrt(S), to which finer teachers would lead
    assert float(student.gains[0]) == pytest.approx(0.4880939573, abs=2e-10)


def test_a_teacher_that_steps_by_addim_is_met_too():
    # x_var = 0.75 V, a part of the posterior's own variance
    teacher, sampler = gaussian(VP, 0.25), ADDIM(fraction=0.75, prior_variance=0.25)
    loss = ProgressiveLoss(schedule=PURE_COSINE, weighting=TruncatedSNR(schedule=PURE_COSINE))
    levels = loss.levels(torch.linspace(0.01, 1, 64, dtype=D64), 8)
    x = noise(64, 5)
    got = loss.target(teacher, x, levels, x_var=sampler.x_var)
    for i in range(64):
        grid = torch.stack([level[i] for level in levels])
        between = sampler.step(Bound(teacher), x[i : i + 1], grid[0], grid[1], None, None)[0]
        after = sampler.step(Bound(teacher), between, grid[1], grid[2], None, None)[0]
        again = ddim_step(VP, x[i : i + 1], got[i : i + 1], grid[0], grid[2])
        torch.testing.assert_close(again, after, rtol=1e-10, atol=1e-12)
    # variance zero is DDIM, to the bit
    plain = loss.target(teacher, x, levels)
    assert torch.equal(plain, loss.target(teacher, x, levels, x_var=ADDIM(fraction=0.0).x_var))


class Bound:
    def __init__(self, denoiser):
        self.denoiser, self.interpolant = denoiser, denoiser.interpolant

    def __call__(self, x, logsnr):
        return self.denoiser(x, logsnr.expand(len(x)))


class Wavy:
    """A denoiser that is no linear map."""

    def __init__(self, interpolant):
        self.interpolant = interpolant

    def __call__(self, x, logsnr, cond=None):
        return torch.sin(x + 0.1 * logsnr[:, None])


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_one_ddim_step_with_the_target_ends_where_two_steps_of_the_teacher_end(interpolant):
    teacher, loss = Wavy(interpolant), ProgressiveLoss(schedule=WIDE, weighting=ELBO())
    x, levels = noise(24, 3), loss.levels((torch.arange(24, dtype=D64) + 1) / 24, 24)
    target = loss.target(teacher, x, levels)
    logsnr, middle, end = levels
    between = ddim_step(interpolant, x, teacher(x, logsnr), logsnr, middle)
    after = ddim_step(interpolant, between, teacher(between, middle), middle, end)
    scale = interpolant(logsnr)[1].clamp(min=1)[:, None]
    torch.testing.assert_close(
        ddim_step(interpolant, x, target, logsnr, end) / scale, after / scale, rtol=1e-11, atol=1e-11
    )
    # and it is the inverse of the DDIM step, where that has digits
    inside = slice(8, 16)
    by_inverse = inverse_ddim_step(interpolant, x[inside], after[inside], logsnr[inside], end[inside])
    torch.testing.assert_close(target[inside], by_inverse, rtol=1e-8, atol=1e-8)
    # i = 1: the second answer, to the bit
    assert end[0] == math.inf and torch.equal(target[:1], teacher(between[:1], middle[:1]))


def test_the_target_of_a_teacher_that_does_not_waver_is_its_answer_in_float32_at_8192_steps():
    class Steady:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return torch.full_like(x, 0.3)

    loss = ProgressiveLoss(schedule=WIDE, weighting=ELBO())
    levels = loss.levels(torch.linspace(0, 1, 100, dtype=D64), 4096)
    target = loss.target(Steady(), noise(100, 2).float(), levels)
    torch.testing.assert_close(target, torch.full((100, 2), 0.3), rtol=1e-6, atol=0)
    wavy = loss.target(Wavy(VP), noise(100, 2), levels)
    in_float = loss.target(Wavy(VP), noise(100, 2).float(), levels)
    torch.testing.assert_close(in_float.double(), wavy, rtol=0, atol=2e-6)


def test_levels_are_those_of_the_samplers_grids():
    loss = ProgressiveLoss(schedule=WIDE, weighting=ELBO())
    steps = 8
    u = torch.cat([torch.zeros(1, dtype=D64), torch.linspace(1e-9, 1, 400, dtype=D64)])
    logsnr, middle, end = loss.levels(u, steps)
    student, teacher = uniform_u(WIDE, steps), uniform_u(WIDE, 2 * steps)
    # the very top is avoided by 1e-12, for schedules that have no value there
    torch.testing.assert_close(logsnr.unique(), student[:-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(middle.unique(), teacher[1::2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end.unique()[:-1], student[1:-1], rtol=1e-12, atol=1e-12)
    assert end.max() == math.inf and bool((end[u <= 1 / steps] == math.inf).all())
    counts = torch.stack([(logsnr == level).sum() for level in logsnr.unique()])
    assert counts.min() >= 49


def test_weights_are_those_of_the_paper():
    schedule = LinearLogSNR(logsnr_min=-8.0, logsnr_max=8.0)
    x0, target, logsnr = noise(9, 3), noise(9, 3, seed=1), torch.linspace(-7, 7, 9, dtype=D64)
    student, snr = Gains(schedule, noise(4)), torch.exp(torch.linspace(-7, 7, 9, dtype=D64))
    error = (student(x0, logsnr) - target).square().mean(1)
    for weighting, weight in ((TruncatedSNR, snr.clamp(min=1)), (SNRPlusOne, snr + 1)):
        loss = DistillationLoss(schedule=schedule, weighting=weighting(schedule=schedule))
        torch.testing.assert_close(
            loss.against(student, x0, target, logsnr), 0.5 * weight * error, rtol=1e-10, atol=0
        )


def test_a_network_is_judged_by_its_own_output_with_the_same_result():
    class Net(torch.nn.Module):
        def forward(self, x, logsnr, cond):
            return torch.sin(1.3 * x) + 0.1 * logsnr[:, None]

    network = NetworkDenoiser(network=Net(), interpolant=VP, prediction=V())

    class ByX0:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return network(x, logsnr, cond)

    loss = ProgressiveLoss(schedule=Cosine(logsnr_min=-6.0, logsnr_max=6.0), weighting=ELBO())
    a, b = (loss(s, Wavy(VP), noise(16, 2), None, rng(16), steps=4) for s in (network, ByX0()))
    torch.testing.assert_close(a.per_example, b.per_example, rtol=1e-8, atol=0)


def test_the_teacher_gets_no_gradient_and_both_hear_the_same_labels():
    heard = []

    class Listening:
        interpolant = VP

        def __init__(self):
            self.weight = torch.ones((), dtype=D64, requires_grad=True)

        def __call__(self, x, logsnr, cond=None):
            heard.append(cond["label"])
            return self.weight * x

    student, teacher = Listening(), Listening()
    loss = ProgressiveLoss(schedule=WIDE, weighting=TruncatedSNR(schedule=WIDE), label_dropout=0.5)
    loss(student, teacher, noise(32, 2), {"label": torch.arange(32)}, rng(32), steps=4).total.backward()
    assert teacher.weight.grad is None and student.weight.grad is not None
    assert len(heard) == 3 and all(torch.equal(heard[0], other) for other in heard[1:])
    assert 0 < int((heard[0] == -1).sum()) < 32


def test_small_pieces():
    x, x0, logsnr = noise(4, 2), noise(4, 2, seed=1), torch.linspace(-3, 3, 4, dtype=D64)
    clean = torch.full((4,), math.inf, dtype=D64)
    assert torch.equal(adjusted(VP, x, x0, logsnr, clean, lambda level: torch.ones_like(level)), x0)
    assert torch.equal(joined(x, x0, logsnr, logsnr + 1, clean), x0)
    assert torch.equal(one_step(Wavy(VP), x, logsnr, clean)[1], Wavy(VP)(x, logsnr))
    with pytest.raises(ValueError, match=r"label_dropout must be in \[0, 1\]"):
        ProgressiveLoss(schedule=WIDE, weighting=ELBO(), label_dropout=1.5)
