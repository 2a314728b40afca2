"""Multistep consistency on closed forms: what the target of each segment must be, and is."""

import math

import pytest
import torch
from problems import INTERPOLANTS, PURE_COSINE, gaussian

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.losses import DenoisingLoss, SNRPlusOne
from diffusion_lab.losses.distillation import ConsistencyLoss, TeacherSteps
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.process.gaussian import ddim_step, inverse_ddim_step, marginal
from diffusion_lab.rng import StepRNG
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.grids import uniform_u

D64 = torch.float64
VP = VariancePreserving()
WIDE = Cosine(logsnr_min=-20.0, logsnr_max=20.0)


def loss_of(schedule=WIDE, **options):
    return ConsistencyLoss(schedule=schedule, weighting=SNRPlusOne(schedule=schedule), **options)


def rng(total):
    return StepRNG(seed=0, step=0, positions=slice(None), total=total)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


def draws(steps):
    """One for each of the T levels."""
    return (torch.arange(steps, dtype=D64) + 0.5) / steps


class Wavy:
    """A denoiser that is no linear map."""

    def __init__(self, interpolant, phase=0.0):
        self.interpolant, self.phase = interpolant, phase

    def __call__(self, x, logsnr, cond=None):
        assert bool(torch.isfinite(logsnr).all())
        return torch.sin(x + 0.1 * logsnr[:, None] + self.phase)


class Gains:
    """x0_hat = gain x, one gain for each of T levels."""

    interpolant = VP

    def __init__(self, gains):
        self.gains = gains

    def __call__(self, x, logsnr, cond=None):
        level = (PURE_COSINE.inverse(logsnr) * len(self.gains)).round().long() - 1
        return self.gains[level][:, None] * x


def gain_of(denoiser, segments):
    return DDIM()(denoiser, torch.ones(1, 1, dtype=D64), uniform_u(PURE_COSINE, segments))


def teachers_path(steps, segments, variance=0.25):
    """The x0 gains with which one step goes where the teacher's DDIM steps lead in a segment, and its gains."""
    loss, one = loss_of(PURE_COSINE), torch.ones(steps, 1, dtype=D64)
    levels, teacher = loss.levels(draws(steps), segments, steps), gaussian(VP, variance)
    answers = teacher(one, levels.start)
    gains = ddim_step(VP, one, answers, levels.start, levels.middle)
    whole = gains.view(segments, -1).cumprod(1)
    x0 = inverse_ddim_step(VP, one, whole.view(-1, 1), levels.start, levels.end)
    return loss, levels, one, answers, x0[:, 0], whole[:, -1]


def test_the_fixed_point_of_each_segment_is_the_teachers_path():
    loss, levels, one, answers, gains, whole = teachers_path(8192, 2)
    # the levels begin 1e-12 below the noise end
    assert whole.tolist() == pytest.approx([0.632353, 0.790548], abs=6e-7)
    assert whole.tolist() != pytest.approx([math.sqrt(0.25 / 0.625), math.sqrt(0.625)], abs=1e-5)
    student = Gains(gains)
    torch.testing.assert_close(loss.target(student, one, answers, levels)[:, 0], gains, rtol=1e-8, atol=1e-8)
    assert float(gain_of(student, 2)) == pytest.approx(0.632353 * 0.790548, abs=1e-6)
    # and no other point is fixed: a push is passed on, and grows weaker
    pushed = loss.target(Gains(gains + 0.1), one, answers, levels)[:, 0]
    assert float((pushed - gains).abs().max()) > 0.05


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_training_from_level_to_level_arrives_there_from_anywhere(segments):
    loss, levels, one, answers, gains, _ = teachers_path(16, segments)
    found = torch.full_like(gains, 3.0)
    for _ in range(16 // segments):
        found = loss.target(Gains(found), one, answers, levels)[:, 0]
    torch.testing.assert_close(found, gains, rtol=1e-10, atol=1e-10)


def test_data_and_teacher_give_the_same_slope():
    """t = .75, s = .7, t0 = .5: the paper's two losses agree in expectation."""
    loss, variance = loss_of(PURE_COSINE), 0.25
    # every second moment of x0 and eps, exactly
    x0 = math.sqrt(variance) * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=D64)[:, None]
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=D64)[:, None]
    levels = loss.levels(torch.full((4,), 14.5 / 20, dtype=D64), 2, 20)
    u = [float(PURE_COSINE.inverse(level[0])) for level in (levels.start, levels.middle, levels.end)]
    assert u == pytest.approx([0.75, 0.7, 0.5], abs=1e-12)
    x = marginal(VP, x0, eps, levels.start)

    class Exact:
        """Follows the probability flow to t0."""

        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            alpha, sigma = VP(logsnr)
            to = VP(levels.end)
            gain = torch.sqrt((to[0] ** 2 * variance + to[1] ** 2) / (alpha**2 * variance + sigma**2))
            return inverse_ddim_step(VP, x, gain[:, None] * x, logsnr, levels.end)

    slopes = []
    for x_teacher in (x0, gaussian(VP, variance)(x, levels.start)):
        target = loss.target(Exact(), x, x_teacher, levels)
        reached = ddim_step(VP, x, target, levels.start, levels.end)
        slopes.append(float((reached * x).mean() / x.square().mean()))
    assert slopes == pytest.approx([0.8371, 0.8371], abs=5e-5)
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-12)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
@pytest.mark.parametrize("segments", [1, 3])
def test_one_step_with_the_target_ends_where_the_paper_says(interpolant, segments):
    """Its two DDIM steps; its inverse where that has digits; the step alone where s = t0."""
    loss, student = loss_of(), Wavy(interpolant)
    levels, x = loss.levels(draws(12), segments, 12), noise(12, 3)
    x_teacher = Wavy(interpolant, phase=1.0)(x, levels.start)
    target = loss.target(student, x, x_teacher, levels)
    done = [i % (12 // segments) == 0 for i in range(12)]
    assert levels.done.tolist() == done
    assert torch.equal(target[levels.done], x_teacher[levels.done])
    between = ddim_step(interpolant, x, x_teacher, levels.start, levels.middle)
    rest = ~levels.done
    after = ddim_step(
        interpolant, between[rest], student(between[rest], levels.middle[rest]), levels.middle[rest], levels.end[rest]
    )  # fmt: skip
    again = inverse_ddim_step(interpolant, x[rest], after, levels.start[rest], levels.end[rest])
    torch.testing.assert_close(target[rest], again, rtol=1e-7, atol=1e-7)
    if segments == 1:
        # a consistency model: the student's own answer at s
        assert bool((levels.end == math.inf).all())
        own = student(between[rest], levels.middle[rest])
        torch.testing.assert_close(target[rest], own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_the_inverse_of_a_ddim_step_is_one(interpolant):
    x, x0 = noise(9, 3), noise(9, 3, seed=1)
    start = torch.linspace(-7, 5, 9, dtype=D64)
    after = ddim_step(interpolant, x, x0, start, start + 0.7)
    torch.testing.assert_close(
        inverse_ddim_step(interpolant, x, after, start, start + 0.7), x0, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("huber", [None, 0.1])
def test_one_step_a_segment_with_data_is_diffusion_training(huber):
    student, x0 = Wavy(VP), noise(64, 3)
    loss = loss_of(huber=huber)
    terms = loss(student, x0, None, rng(64), segments=8, steps=8)
    assert len(terms.logsnr.unique()) == 8
    if huber is None:
        denoising = DenoisingLoss(schedule=WIDE, weighting=SNRPlusOne(schedule=WIDE))
        plain = denoising(student, x0, None, rng(64), logsnr=terms.logsnr)
        torch.testing.assert_close(terms.per_example, plain.per_example, rtol=1e-9, atol=0)
    else:
        x = marginal(VP, x0, rng(64).randn("noise", (3,), dtype=D64), terms.logsnr)
        square = (student(x, terms.logsnr) - x0).square().mean(1)
        rho = torch.sqrt(square + huber**2) - huber
        torch.testing.assert_close(terms.per_example, (1 + terms.logsnr.exp()) * rho, rtol=1e-9, atol=1e-12)


def test_the_teachers_step_is_the_papers_addim():
    """Lengthened by its own square error, each sample's own, without guidance."""
    x0, fraction, segments, steps = noise(24, 5), 0.75, 2, 24
    guided, plain, student = Wavy(VP, 1.0), Wavy(VP, 2.0), Wavy(VP)
    heard = []

    class Listening(Wavy):
        def __call__(self, x, logsnr, cond=None):
            heard.append((x, logsnr))
            return super().__call__(x, logsnr, cond)

    loss = loss_of(x_var_fraction=fraction)
    options = {"segments": segments, "steps": steps, "teacher": guided, "reference": Listening(VP)}
    loss(student, x0, None, rng(24), plain=plain, **options)
    (between, asked), *others = heard
    levels = loss.levels(rng(24).stratified("noise_level"), segments, steps)
    x = marginal(VP, x0, rng(24).randn("noise", (5,), dtype=D64), levels.start)
    answer = guided(x, levels.start)
    x_var = fraction * (plain(x, levels.start) - x0).square().mean(1)
    (alpha, sigma), (alpha_next, sigma_next) = VP(levels.start), VP(levels.middle)
    eps = (x - alpha[:, None] * answer) / sigma[:, None]
    variance = (alpha_next - alpha * sigma_next / sigma) ** 2 * x_var
    length = torch.sqrt(sigma_next**2 + variance / eps.square().mean(1))
    expected = alpha_next[:, None] * answer + length[:, None] * eps
    inside = levels.middle < math.inf
    torch.testing.assert_close(between[inside], expected[inside], rtol=1e-9, atol=1e-9)
    assert not others and torch.equal(asked[~levels.done], levels.middle[~levels.done])
    # no share of it is DDIM, and without guidance the teacher is its own measure
    heard.clear()
    loss_of(x_var_fraction=0.0)(student, x0, None, rng(24), plain=plain, **options)
    torch.testing.assert_close(heard[0][0], ddim_step(VP, x, answer, levels.start, levels.middle))
    a = loss(student, x0, None, rng(24), plain=guided, **options)
    assert torch.equal(a.per_example, loss(student, x0, None, rng(24), **options).per_example)


@pytest.mark.parametrize("segments", [1, 3, 4, 16])
def test_the_teachers_steps_grow_evenly_in_the_logarithm_and_share_out(segments):
    steps = TeacherSteps(first=64, last=1280, max_images=1000, part=0.5)
    found = [steps(images, segments) for images in range(0, 1001, 10)]
    assert all(count % segments == 0 for count in found) and found == sorted(found)
    for images, count in ((0, 64), (250, math.sqrt(64 * 1280)), (500, 1280), (900, 1280)):
        assert abs(steps(images, segments) - count) <= segments / 2
    assert TeacherSteps(max_images=10, part=0.0)(0, 4) == 1280
    assert TeacherSteps(first=1, last=2, max_images=10)(0, 8) == 8


@pytest.mark.parametrize(("segments", "steps"), [(1, 1), (1, 64), (3, 63), (4, 1280), (7, 7)])
def test_borders_of_segments_are_those_of_the_students_sampler(segments, steps):
    levels = loss_of().levels(torch.cat([draws(steps), torch.tensor([0.0, 1.0])]), segments, steps)
    grid = uniform_u(WIDE, segments)
    torch.testing.assert_close(levels.end.unique(), grid[1:], rtol=1e-12, atol=1e-12)
    assert int(levels.done[:steps].sum()) == segments
    assert torch.equal(levels.middle[levels.done], levels.end[levels.done])
    assert bool((levels.start < levels.middle).all() and (levels.middle <= levels.end).all())
    assert bool(torch.isfinite(levels.asked).all())
    for level in grid[:-1]:
        # each segment's first step of the sampler is one that was trained for
        assert float((levels.start - level).abs().min()) < 1e-4


def test_huber_of_one_is_nearly_the_squared_loss_and_a_network_is_judged_alike():
    class Net(torch.nn.Module):
        def forward(self, x, logsnr, cond):
            return torch.sin(1.3 * x) + 0.1 * logsnr[:, None]

    network = NetworkDenoiser(network=Net(), interpolant=VP, prediction=V())

    class ByX0:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return network(x, logsnr, cond)

    x, logsnr = noise(9, 3), torch.linspace(-6, 6, 9, dtype=D64)
    target = network(x, logsnr) + 1e-3 * noise(9, 3, seed=2)
    squared = loss_of(huber=None).rho(ByX0(), x, target, logsnr, None)
    torch.testing.assert_close(
        loss_of(huber=1.0).rho(ByX0(), x, target, logsnr, None), squared, rtol=1e-5, atol=0
    )
    for huber in (None, 1e-4):
        a, b = (loss_of(huber=huber).rho(s, x, target, logsnr, None) for s in (network, ByX0()))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    # the gradient where student and target agree is zero, not nan
    answer = network(x, logsnr).detach().requires_grad_()

    class Given(ByX0):
        def __call__(self, x, logsnr, cond=None):
            return answer

    loss_of().rho(Given(), x, answer.detach(), logsnr, None).sum().backward()
    assert torch.equal(answer.grad, torch.zeros_like(answer))


def test_only_the_students_own_answer_gets_a_gradient_and_all_hear_the_same_labels():
    heard = []

    class Listening:
        interpolant = VP

        def __init__(self):
            self.weight = torch.ones((), dtype=D64, requires_grad=True)

        def __call__(self, x, logsnr, cond=None):
            heard.append((cond["label"], torch.is_grad_enabled()))
            return self.weight * x

    student, teacher, plain, reference = (Listening() for _ in range(4))
    loss_of(label_dropout=0.5)(
        student, noise(32, 2), {"label": torch.arange(32)}, rng(32), segments=2, steps=16, teacher=teacher,
        plain=plain, reference=reference,
    ).total.backward()  # fmt: skip
    assert student.weight.grad is not None and float(student.weight.grad) != 0
    assert all(other.weight.grad is None for other in (teacher, plain, reference))
    assert [grad for _, grad in heard] == [False, False, False, True]
    assert all(torch.equal(heard[0][0], label) for label, _ in heard[1:])
    assert 0 < int((heard[0][0] == -1).sum()) < 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"huber": 0.0}, "huber must be positive, or null"),
        ({"x_var_fraction": 1.5}, r"x_var_fraction must be in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        loss_of(**options)
    with pytest.raises(ValueError, match="10 teacher steps do not share out among 4 segments"):
        loss_of().levels(draws(4), 4, 10)
    with pytest.raises(ValueError, match="TeacherSteps needs"):
        TeacherSteps(first=0, max_images=8)


def test_in_float32_a_student_that_does_not_waver_meets_itself():
    class Steady:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return torch.full_like(x, 0.3)

    loss = loss_of()
    levels = loss.levels(draws(1280), 4, 1280)
    x = noise(1280, 2).float()
    target = loss.target(Steady(), x, torch.full_like(x, 0.3), levels)
    torch.testing.assert_close(target, torch.full_like(x, 0.3), rtol=1e-6, atol=0)
    assert target.dtype == torch.float32
