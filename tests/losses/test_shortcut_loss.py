"""Shortcut models on closed forms: two steps in one, whatever their number; at the shortest, flow matching."""

import pytest
import torch
from problems import INTERPOLANTS, gaussian

from diffusion_lab.denoisers import ShortcutDenoiser, Velocity
from diffusion_lab.losses import DenoisingLoss, SNRPlusOne, VelocityMSE
from diffusion_lab.losses.distillation import ShortcutLoss
from diffusion_lab.networks import MLP
from diffusion_lab.process import Cosine, RectifiedFlow, VariancePreserving
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import ddim_step, inverse_ddim_step
from diffusion_lab.process.schedules.sd3 import ModeSampling
from diffusion_lab.rng import StepRNG
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.samplers.shortcut import Shortcut
from diffusion_lab.typing import STEPS

D64 = torch.float64
VP = VariancePreserving()
COSINE = Cosine(logsnr_min=-10.0, logsnr_max=10.0)
TIME = ModeSampling(scale=0.0)
"""Even in rectified flow's time, from pure noise."""
VARIANCE, FINEST = 0.25, 128


def loss_of(schedule=COSINE, weighting=SNRPlusOne, **options):
    return ShortcutLoss(schedule=schedule, weighting=weighting(schedule=schedule), **options)


def rng(total):
    return StepRNG(seed=0, step=0, positions=slice(None), total=total)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


def every_step(finest=FINEST):
    """`(u, n)` that stand for every step of every student, but the finest's."""
    pairs = [((i + 0.5) / 2**k, 2.0**k) for k in range(finest.bit_length() - 1) for i in range(2**k)]
    return torch.tensor(pairs, dtype=D64).unbind(1)


class FlowMap:
    """Steps exactly along the probability flow of N(0, variance), as far as it is told."""

    def __init__(self, interpolant=VP, schedule=COSINE, variance=VARIANCE):
        self.interpolant, self.schedule, self.variance = interpolant, schedule, variance

    def spread(self, logsnr):
        alpha, sigma = self.interpolant(logsnr)
        return torch.sqrt(alpha**2 * self.variance + sigma**2)

    def __call__(self, x, logsnr, cond=None):
        u = self.schedule.inverse(logsnr) - 1.0 / cond[STEPS]
        clean = u < 1e-9
        after = self.schedule(torch.where(clean, 0.5, u))
        x_next = broadcast_right(self.spread(after) / self.spread(logsnr), x) * x
        x0 = inverse_ddim_step(self.interpolant, x, x_next, logsnr, torch.where(clean, logsnr + 1.0, after))
        ends = broadcast_right(self.variance**0.5 / self.spread(logsnr), x) * x
        return torch.where(broadcast_right(clean, x).bool(), ends, x0)


class Wavy:
    """A student that is no linear map, nor the same for all steps."""

    def __init__(self, interpolant=VP):
        self.interpolant = interpolant

    def __call__(self, x, logsnr, cond=None):
        return torch.sin(x + 0.1 * logsnr[:, None] + cond[STEPS].log()[:, None])


@pytest.mark.parametrize("schedule", [COSINE, TIME], ids=["cosine", "time"])
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_the_flow_map_agrees_with_itself_at_every_step_and_nothing_else_does(interpolant, schedule):
    u, steps = every_step()
    loss, student = loss_of(schedule), FlowMap(interpolant, schedule)
    levels = loss.levels(u, steps)
    _, sigma = interpolant(levels[0])
    x = noise(len(u), 2) * sigma[:, None]
    own = student(x, levels[0], {STEPS: steps})
    torch.testing.assert_close(loss.target(student, x, levels, steps), own, rtol=1e-8, atol=1e-9)
    # the denoiser, which is right for infinitely many steps
    tired = gaussian(interpolant, VARIANCE, dim=2)
    away = (loss.target(tired, x, levels, steps) - tired(x, levels[0])).abs().amax(1)
    assert float(away[steps == 1.0]) > 0.1


def test_the_papers_identity_and_its_limit():
    """s(x, t, 2d) = ½ s(x, t, d) + ½ s(x', t - d, d); the shortest step is the velocity."""
    flow, (u, steps) = RectifiedFlow(), every_step()
    for student, exact in ((Wavy(flow), False), (FlowMap(flow, TIME), True)):
        start, middle, end = loss_of(TIME).levels(u, steps)
        x, told = noise(len(u), 3), {STEPS: 2 * steps}
        t, t_middle = ((1.0 / (1.0 + torch.exp(0.5 * level)))[:, None] for level in (start, middle))
        s = (x - student(x, start, told)) / t
        after = x - s / (2 * steps)[:, None]
        mean = 0.5 * s + 0.5 * (after - student(after, middle, told)) / t_middle
        target = loss_of(TIME).target(student, x, (start, middle, end), steps)
        torch.testing.assert_close((x - target) / t, mean, rtol=1e-9, atol=1e-9)
        if exact:
            # the flow's own step, as in the paper's check
            own = (x - student(x, start, {STEPS: steps})) / t
            torch.testing.assert_close(mean, own, rtol=1e-8, atol=1e-9)
    level = torch.linspace(-6, 6, 9, dtype=D64)
    shortest = FlowMap(flow, TIME)(noise(9, 3), level, {STEPS: torch.full((9,), 2.0**17, dtype=D64)})
    torch.testing.assert_close(
        shortest, gaussian(flow, VARIANCE, dim=3)(noise(9, 3), level), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("schedule", [COSINE, TIME], ids=["cosine", "time"])
def test_steps_begin_and_end_where_those_of_the_sampler_do(schedule):
    u, steps = every_step()
    start, middle, end = loss_of(schedule).levels(u, steps)
    assert bool((start < middle).all() and (middle < end).all()) and bool(torch.isfinite(middle).all())
    for n in (1, 2, 64):
        grid, of = uniform_u(schedule, n), steps == n
        torch.testing.assert_close(end[of].sort().values, grid[1:], rtol=1e-9, atol=1e-9)
        finite = torch.isfinite(grid[:-1])
        torch.testing.assert_close(start[of].sort().values[finite], grid[:-1][finite], rtol=1e-5, atol=1e-5)
        # and the middle is where the student of twice as many steps goes on
        halves = uniform_u(schedule, 2 * n)[1::2]
        torch.testing.assert_close(middle[of].sort().values, halves, rtol=1e-9, atol=1e-9)
    edge = loss_of(schedule).levels(torch.tensor([0.0, 1.0], dtype=D64), torch.tensor([4.0, 4.0], dtype=D64))
    assert edge[2].tolist() == [float("inf"), float(schedule(torch.tensor(0.75, dtype=D64)))]


@pytest.mark.parametrize("weighting", [SNRPlusOne, VelocityMSE])
def test_without_a_share_it_is_flow_matching_with_levels_of_the_finest_grid(weighting):
    class Student(Wavy):
        def __call__(self, x, logsnr, cond=None):
            assert cond is None or bool((cond[STEPS] == FINEST).all())
            return torch.sin(x + 0.1 * logsnr[:, None])

    x0, loss = noise(256, 3), loss_of(weighting=weighting, share=0.0)
    terms = loss(Student(), x0, None, rng(256), finest=FINEST)
    assert set((COSINE.inverse(terms.logsnr) * FINEST).round().long().tolist()) == set(range(1, FINEST + 1))
    plain = DenoisingLoss(schedule=COSINE, weighting=weighting(schedule=COSINE))
    expected = plain(Student(), x0, None, rng(256), logsnr=terms.logsnr)
    torch.testing.assert_close(terms.per_example, expected.per_example, rtol=1e-9, atol=0)
    # from a teacher the student learns its answers instead
    taught = loss(Student(), x0, None, rng(256), finest=FINEST, teacher=Student())
    assert float(taught.total) < 1e-20


def test_the_share_learns_from_the_students_next_and_hears_half_as_many_steps():
    heard = []

    class Listening(Wavy):
        def __init__(self, name):
            super().__init__()
            self.name, self.weight = name, torch.ones((), dtype=D64, requires_grad=True)

        def __call__(self, x, logsnr, cond=None):
            heard.append((self.name, cond, torch.is_grad_enabled(), logsnr, x))
            return self.weight * (super().__call__(x, logsnr, cond) if STEPS in cond else x)

    n, label = 4096, torch.arange(4096)
    student, reference, teacher = (Listening(name) for name in ("student", "reference", "teacher"))
    loss, x0 = loss_of(label_dropout=0.5, share=0.25), noise(4096, 2)
    terms = loss(
        student, x0, {"label": label}, rng(n), finest=FINEST, teacher=teacher, reference=reference
    )  # fmt: skip
    terms.total.backward()
    assert student.weight.grad is not None and float(student.weight.grad) != 0
    assert reference.weight.grad is None and teacher.weight.grad is None
    assert [(name, grad) for name, _, grad, *_ in heard] == [
        ("teacher", False), ("reference", False), ("reference", False), ("student", True)
    ]  # fmt: skip
    steps = heard[3][1][STEPS]
    own = steps < FINEST
    assert float(own.double().mean()) == pytest.approx(0.25, abs=0.03)
    counts = torch.bincount(steps[own].log2().round().long(), minlength=7)
    assert len(counts) == 7 and float(counts.min() / counts.max()) > 0.7
    for at in (1, 2):
        assert torch.equal(heard[at][1][STEPS], 2 * steps[own])
        assert torch.equal(heard[at][1]["label"], heard[3][1]["label"][own])
    assert torch.equal(heard[0][1]["label"], heard[3][1]["label"])
    assert 0.4 < float((heard[0][1]["label"] == -1).double().mean()) < 0.6
    # the loss by hand, of one of each kind
    x, start = heard[3][4], heard[3][3]
    for row in (int(own.nonzero()[0]), int((~own).nonzero()[0])):
        one = slice(row, row + 1)
        if bool(own[row]):
            u = rng(n).stratified("noise_level")[one]
            levels = loss.levels(u, steps[one])
            assert torch.equal(levels[0], start[one])
            wavy = Wavy()
            first = wavy(x[one], levels[0], {STEPS: 2 * steps[one]})
            between = ddim_step(VP, x[one], first, levels[0], levels[1])
            assert torch.equal(levels[1], heard[2][3][own.nonzero()[:, 0] == row])
            target = loss.target(wavy, x[one], levels, steps[one])
            torch.testing.assert_close(between, heard[2][4][own.nonzero()[:, 0] == row])
        else:
            target = x[one]
        answer = Wavy()(x[one], start[one], {STEPS: steps[one]})
        expected = 0.5 * (1 + start[one].exp()) * (target - answer).square().mean(1)
        torch.testing.assert_close(terms.per_example[one].detach(), expected, rtol=1e-9, atol=1e-12)


def test_a_batch_without_a_share_or_of_nothing_else_is_whole():
    x0 = noise(3, 2)
    for share in (0.0, 1.0):
        terms = loss_of(share=share)(Wavy(), x0, None, rng(3), finest=2)
        assert terms.per_example.shape == (3,) and bool(torch.isfinite(terms.per_example).all())


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        loss_of(share=1.5)


@pytest.mark.slow
def test_a_trained_student_of_two_dimensions_has_the_same_samples_in_1_4_and_128_steps():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(dim=2, width=128, depth=3, num_classes=0, scalars=[STEPS])
    student = ShortcutDenoiser(
        network=network, interpolant=RectifiedFlow(), prediction=Velocity(), finest=FINEST
    )
    loss, total = loss_of(TIME, VelocityMSE, share=0.5), 1500
    optimizer = torch.optim.Adam(student.parameters())
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    for step in range(total):
        which = torch.randint(4, (256,), generator=generator)
        x0 = corners[which] + 0.1 * torch.randn(256, 2, generator=generator)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / total)
        optimizer.zero_grad()
        numbers = StepRNG(seed=0, step=step, positions=slice(None), total=256)
        loss(student, x0, None, numbers).total.backward()
        optimizer.step()
    eps = torch.randn(1000, 2, generator=generator)
    with torch.no_grad():
        one, four, finest = (Shortcut()(student, eps, uniform_u(TIME, n)) for n in (1, 4, FINEST))
        # the denoiser that it is for the finest steps makes the mean of all four of it
        denoised = DDIM()(student, eps, uniform_u(TIME, 1))
    apart = [float((x - finest).square().mean().sqrt()) for x in (four, one, denoised)]
    assert apart[0] < 0.1 and apart[1] < 0.2 and apart[2] > 0.8
    for x, far in ((one, 0.15), (four, 0.05), (finest, 0.02)):
        distance, nearest = (x[:, None] - corners).norm(dim=2).min(1)
        assert float((distance > 0.4).float().mean()) < far
        assert int(torch.bincount(nearest, minlength=4).min()) > 180
