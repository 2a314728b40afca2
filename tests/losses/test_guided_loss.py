"""Distillation of guided models on closed forms: what the first stage must reach, and where each walk's steps end."""

import math

import pytest
import torch
from problems import INTERPOLANTS, PURE_COSINE, gaussian, mixture_1d

from diffusion_lab.denoisers import GUIDANCE_SCALE, GuidedDenoiser, V
from diffusion_lab.guidance import ClassifierFree, Distilled
from diffusion_lab.losses import SNRPlusOne, TruncatedSNR
from diffusion_lab.losses.distillation import DoubleStepLoss, EncoderLoss, GuidedLoss, ProgressiveLoss
from diffusion_lab.losses.distillation.guided import with_scales
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.process.gaussian import ddim_step, eps_from_x0
from diffusion_lab.rng import SampleRNG, StepRNG
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.samplers.inversion import invert, towards_noise
from diffusion_lab.typing import NO_LABEL

D64 = torch.float64
VP = VariancePreserving()
WIDE = Cosine(logsnr_min=-20.0, logsnr_max=20.0)
TEN = Cosine(logsnr_min=-10.0, logsnr_max=10.0)


def rng(total, seed=0):
    return StepRNG(seed=seed, step=0, positions=slice(None), total=total)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


def guided_loss(**options):
    return GuidedLoss(schedule=WIDE, weighting=TruncatedSNR(schedule=WIDE), **options)


def labels(n):
    return {"label": torch.arange(n) % 2}


# ---- first stage -----------------------------------------------------------------------------------------------------


class Head:
    """x0_hat = (p0 + p1 s) x0_cond + (p2 + p3 s) x0_uncond: linear in the scale."""

    def __init__(self, teacher, p):
        self.teacher, self.interpolant, self.p = teacher, teacher.interpolant, p

    def __call__(self, x, logsnr, cond=None):
        s = cond[GUIDANCE_SCALE][:, None]
        plain = {"label": cond["label"]}
        p = self.p
        return (p[0] + p[1] * s) * self.teacher(x, logsnr, plain) + (p[2] + p[3] * s) * self.teacher(
            x, logsnr
        )


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_a_head_linear_in_the_scale_reaches_zero_loss_at_every_scale(interpolant):
    teacher, loss = mixture_1d(interpolant), guided_loss()
    x0, _ = teacher.sample(256, torch.Generator().manual_seed(0))

    def of(p, scales, seed):
        return loss(Head(teacher, p), teacher, x0, labels(256), rng(256, seed), scales=scales).total

    start = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=D64)
    hessian = torch.autograd.functional.hessian(lambda p: of(p, (1.0, 3.0), 0), start)
    slope = torch.autograd.functional.jacobian(lambda p: of(p, (1.0, 3.0), 0), start)
    best = start - torch.linalg.solve(hessian, slope)
    torch.testing.assert_close(best, torch.tensor([0.0, 1.0, 1.0, -1.0], dtype=D64), rtol=0, atol=1e-7)
    exact = torch.tensor([0.0, 1.0, 1.0, -1.0], dtype=D64)
    # between the draws, beyond them, on other noise
    for scales in ((1.0, 3.0), (1.73, 1.73), (0.0, 0.0), (3.0, 5.0)):
        assert float(of(exact, scales, 1)) < 1e-25
        assert float(of(best, scales, 1)) < 1e-10
        assert float(of(start, scales, 1)) > (1e-3 if scales[1] > 1.0 else 1e-4)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_guiding_x0_guides_eps_and_v_and_is_that_of_cfg(interpolant):
    teacher, loss, n = mixture_1d(interpolant), guided_loss(), 12
    # from the noise end to the middle: v and eps are told by x0 and x there with all digits
    logsnr, x, scale = torch.linspace(-8, 8, n, dtype=D64), noise(n, 1), torch.linspace(0, 5, n, dtype=D64)
    cond = labels(n)
    target = loss.target(teacher, x, logsnr, {**cond, GUIDANCE_SCALE: scale})
    given, without = teacher(x, logsnr, cond), teacher(x, logsnr)
    alpha, sigma = (c[:, None] for c in interpolant(logsnr))

    def eps(x0):
        return eps_from_x0(interpolant, x, x0, logsnr)

    def v(x0):
        return alpha * eps(x0) - sigma * x0

    s = scale[:, None]
    for what in (eps, v):
        guided = (1.0 - s) * what(without) + s * what(given)
        # back to x0, by the inverse of each
        if what is eps:
            back = (x - sigma * guided) / alpha
        else:
            back = (alpha * x - sigma * guided) / (alpha**2 + sigma**2)
        torch.testing.assert_close(back, target, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(guided, what(target), rtol=1e-9, atol=1e-9)
    for i in range(n):
        row = slice(i, i + 1)
        alone = ClassifierFree(teacher, scale=float(scale[i]))(
            x[row], logsnr[row], {"label": cond["label"][row]}
        )
        torch.testing.assert_close(target[row], alone, rtol=1e-13, atol=1e-14)


def test_a_guided_gaussian_is_the_one_of_combined_precision():
    """P = s / v_c - (s - 1) / v_u, mean s alpha m / (v_c P), for each example's own scale."""
    mean, variance, broad = 0.7, 0.3, 1.4
    scale = torch.tensor([0.0, 1.0, 1.5, 4.0], dtype=D64)
    logsnr, x = torch.tensor([-3.0, -0.5, 1.0, 2.5], dtype=D64), noise(4, 1)
    parts = gaussian(VP, variance, mean=mean), gaussian(VP, broad)

    class Teacher:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return parts[0](x, logsnr) if cond and "label" in cond else parts[1](x, logsnr)

    target = guided_loss().target(Teacher(), x, logsnr, {**labels(4), GUIDANCE_SCALE: scale})
    alpha, sigma = VP(logsnr)
    v_c, v_u = alpha**2 * variance + sigma**2, alpha**2 * broad + sigma**2
    precision = scale / v_c - (scale - 1) / v_u
    m = scale * alpha * mean / (v_c * precision)
    eps = sigma * precision * (x[:, 0] - m)
    torch.testing.assert_close(eps_from_x0(VP, x, target, logsnr)[:, 0], eps, rtol=1e-12, atol=1e-13)


class Hearing:
    """Answers x0_hat = 0.1 x and remembers what it was told."""

    interpolant = VP

    def __init__(self):
        self.heard, self.levels = [], []

    def __call__(self, x, logsnr, cond=None):
        self.heard.append(cond)
        self.levels.append(logsnr)
        return 0.1 * x


def test_the_student_alone_is_told_the_scale_and_the_teacher_is_asked_with_a_label_and_without():
    student, teacher = Hearing(), Hearing()
    cond = {**labels(64), "seed": torch.arange(64)}
    guided_loss()(student, teacher, noise(64, 2), cond, rng(64), scales=(1.0, 5.0))
    assert [sorted(told) for told in teacher.heard] == [["label", "seed"], ["seed"]]
    ((told),) = student.heard
    assert sorted(told) == [GUIDANCE_SCALE, "label", "seed"]
    s = told[GUIDANCE_SCALE]
    assert s.shape == (64,) and float(s.min()) >= 1.0 and float(s.max()) <= 5.0
    assert float(s.mean()) == pytest.approx(3.0, abs=0.4) and float(s.std()) == pytest.approx(
        4 / math.sqrt(12), abs=0.25
    )
    # whatever the noise level is
    assert abs(float(torch.corrcoef(torch.stack([s, student.levels[0]]))[0, 1])) < 0.3
    # a process has the scales of its rows
    half = StepRNG(seed=0, step=0, positions=slice(1, None, 2), total=64)
    assert torch.equal(with_scales(None, (1.0, 5.0), half)[GUIDANCE_SCALE], s[1::2])
    # a hidden label is hidden from all of them
    student, teacher = Hearing(), Hearing()
    guided_loss(label_dropout=1.0)(student, teacher, noise(8, 2), labels(8), rng(8), scales=(1.0, 5.0))
    assert all(bool((c["label"] == NO_LABEL).all()) for c in (teacher.heard[0], student.heard[0]))


@pytest.mark.parametrize("cond", [None, {"seed": torch.arange(8)}])
def test_without_conditions_there_is_nothing_to_guide_by(cond):
    with pytest.raises(ValueError, match="needs conditions to guide by") as error:
        guided_loss()(Hearing(), Hearing(), noise(8, 2), cond, rng(8), scales=(1.0, 5.0))
    assert "\n" not in str(error.value)


# ---- a network that is told its scale --------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heard = None

    def forward(self, x, logsnr, cond=None):
        self.heard = cond
        return torch.zeros_like(x)


def student_of(scales=(1.0, 5.0), network=None):
    return GuidedDenoiser(network=network or Net(), interpolant=VP, prediction=V(), scales=scales)


def test_a_network_hears_the_scale_normalised_and_the_guidance_says_it():
    denoiser = student_of()
    x, logsnr = noise(2, 3), torch.zeros(2, dtype=D64)
    s = torch.linspace(1.0, 5.0, 10001, dtype=D64)
    heard = denoiser.heard(s)
    assert float(heard.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(heard.std()) == pytest.approx(1.0, abs=1e-3)
    assert denoiser.heard(s[[0, -1]]).tolist() == pytest.approx([-math.sqrt(3), math.sqrt(3)])
    Distilled(denoiser, scale=4.0)(x, logsnr, labels(2))
    told = denoiser.network.heard
    assert sorted(told) == [GUIDANCE_SCALE, "label"]
    assert told[GUIDANCE_SCALE].tolist() == pytest.approx([math.sqrt(12) / 4] * 2)
    for what in (None, labels(2)):
        with pytest.raises(ValueError, match="guidance=distilled"):
            denoiser(x, logsnr, what)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: student_of(scales=(5.0, 1.0)), "the lowest and the highest guidance scale"),
        (lambda: student_of(scales=(1.0,)), "the lowest and the highest guidance scale"),
        (lambda: student_of(scales=(1.0, math.inf)), "the lowest and the highest guidance scale"),
        (lambda: Distilled(student_of(), scale=5.5), "scale=5.5: this student was trained for scales 1.0 to 5"),
        (lambda: Distilled(student_of(), scale=0.5), "was trained for scales"),
    ],
)  # fmt: skip
def test_scales_out_of_range_are_one_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


# ---- second stage: the same walk at every scale ----------------------------------------------------------------------

SCALES = torch.tensor([1.0, 2.5, 4.0], dtype=D64)


class GuidedGaussian:
    """A teacher that is told its scale: Gaussians of variance 0.25 with a label and 1 without."""

    interpolant = VP
    given, without = gaussian(VP, 0.25), gaussian(VP, 1.0)

    def __call__(self, x, logsnr, cond=None):
        return torch.lerp(
            self.without(x, logsnr), self.given(x, logsnr), cond[GUIDANCE_SCALE][:, None].to(x.dtype)
        )


class Gains:
    """x0_hat = gain x, one gain for each of N levels and each of the scales."""

    interpolant = VP

    def __init__(self, place, gains):
        self.place, self.gains = place, gains

    def __call__(self, x, logsnr, cond=None):
        row = (cond[GUIDANCE_SCALE][:, None] - SCALES).abs().argmin(1)
        return self.gains[row, self.place(logsnr, self.gains.shape[1])][:, None] * x


def from_noise(logsnr, n):
    return (PURE_COSINE.inverse(logsnr) * n).round().long() - 1


def from_data(logsnr, n):
    return (TEN.inverse(logsnr) * n).round().long()


def regressed(loss, teacher, steps, place):
    """The exact minimiser of the loss: it is a square in each gain, told by its slopes at 0 and 1."""
    n = 6 * len(SCALES) * steps
    cond = {GUIDANCE_SCALE: SCALES[torch.arange(n) % len(SCALES)]}
    slopes = []
    for value in (0.0, 1.0):
        gains = torch.full((len(SCALES), steps), value, dtype=D64, requires_grad=True)
        loss(Gains(place, gains), teacher, 0.5 * noise(n, 1), cond, rng(n), steps=steps).total.backward()
        slopes.append(gains.grad)
    assert bool((slopes[1] != slopes[0]).all())
    return Gains(place, slopes[0] / (slopes[0] - slopes[1]))


def halved(loss, targets, place):
    student = GuidedGaussian()
    for steps in targets:
        student = regressed(loss, student, steps, place)
    return student


def ddim_gains(denoiser, grid):
    x = torch.ones(len(SCALES), 1, dtype=D64)
    return DDIM()(denoiser, x, grid, cond={GUIDANCE_SCALE: SCALES})[:, 0]


def test_after_six_halvings_one_step_is_the_guided_teachers_sixty_four_at_every_scale():
    loss = ProgressiveLoss(schedule=PURE_COSINE, weighting=TruncatedSNR(schedule=PURE_COSINE))
    student = halved(loss, (32, 16, 8, 4, 2, 1), from_noise)
    expected = ddim_gains(GuidedGaussian(), uniform_u(PURE_COSINE, 64))
    torch.testing.assert_close(student.gains[:, 0], expected, rtol=0, atol=1e-9)
    # unguided it is the constant of progressive distillation, and scales differ
    assert float(expected[0]) == pytest.approx(0.4880939573, abs=2e-10)
    assert float(expected[1]) < 0.9 * float(expected[0]) and float(expected[2]) < 0.9 * float(expected[1])


# ---- double steps ----------------------------------------------------------------------------------------------------


class Wavy:
    """A denoiser that is no linear map."""

    def __init__(self, interpolant):
        self.interpolant = interpolant

    def __call__(self, x, logsnr, cond=None):
        assert bool(torch.isfinite(logsnr).all())
        return torch.sin(x + 0.1 * logsnr[:, None])


def draws(steps):
    return (torch.arange(steps, dtype=D64) + 0.5) / steps


def double(schedule=WIDE):
    return DoubleStepLoss(schedule=schedule, weighting=SNRPlusOne(schedule=schedule))


def test_a_double_step_goes_two_levels_on_and_the_first_level_one():
    start, middle, end = double().levels(draws(8), 8)
    u = [
        [float(WIDE.inverse(v)) * 8 if math.isfinite(v) else 0.0 for v in level]
        for level in (start, middle, end)
    ]
    assert u[0] == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8], abs=1e-6)
    assert u[1] == pytest.approx([1, 1, 2, 3, 4, 5, 6, 7], abs=1e-6)
    assert u[2] == pytest.approx([0, 0, 1, 2, 3, 4, 5, 6], abs=1e-6)
    # every draw has its level
    assert torch.equal(double().levels(torch.tensor([0.0, 1e-9, 1.0], dtype=D64), 8)[0], start[[0, 0, 7]])


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_a_double_step_ends_where_two_steps_of_the_teacher_end_and_the_last_where_one_does(interpolant):
    teacher, x, (start, middle, end) = Wavy(interpolant), noise(8, 3), double().levels(draws(8), 8)
    target = double().target(teacher, x, (start, middle, end))
    # the edge: the teacher's own answer
    assert torch.equal(target[0], teacher(x, start)[0])
    alone = double().levels(draws(1), 1)
    assert torch.equal(double().target(teacher, x[:1], alone), teacher(x[:1], alone[0]))
    rest = slice(1, None)
    between = ddim_step(interpolant, x, teacher(x, start), start, middle)[rest]
    after = ddim_step(interpolant, between, teacher(between, middle[rest]), middle[rest], end[rest])
    reached = ddim_step(interpolant, x, target, start, end)[rest]
    torch.testing.assert_close(reached, after, rtol=1e-9, atol=1e-10)


def test_halved_double_steps_are_the_teachers_path_at_every_scale():
    """Of 32 steps to two: from t = 1 all of it, from t = ½ the second half of it."""
    student = halved(double(PURE_COSINE), (32, 16, 8, 4, 2), from_noise)
    grid = uniform_u(PURE_COSINE, 32)
    torch.testing.assert_close(student.gains[:, 1], ddim_gains(GuidedGaussian(), grid), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        student.gains[:, 0], ddim_gains(GuidedGaussian(), grid[16:]), rtol=0, atol=1e-9
    )


# ---- the encoder -----------------------------------------------------------------------------------------------------


def encoder(schedule=TEN):
    return EncoderLoss(schedule=schedule, weighting=TruncatedSNR(schedule=schedule))


def test_an_encoders_levels_grow_noisier_from_the_schedules_clean_end():
    levels = encoder().levels(draws(4), 4)
    u = [[float(TEN.inverse(v)) * 4 for v in level] for level in levels]
    for found, expected in zip(u, ([0, 1, 2, 3], [0.5, 1.5, 2.5, 3.5], [1, 2, 3, 4]), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    assert float(levels[0][0]) == 10.0 and float(levels[2][-1]) == pytest.approx(-10.0, abs=1e-6)
    with pytest.raises(ValueError, match="must be finite: logsnr_max"):
        encoder(PURE_COSINE)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_a_step_of_the_encoder_ends_where_two_of_its_teacher_end(interpolant):
    teacher, levels = Wavy(interpolant), encoder().levels(draws(8), 8)
    alpha, sigma = (c[:, None] for c in interpolant(levels[0]))
    x = alpha * noise(8, 3) + sigma * noise(8, 3, seed=1)
    start, middle, end = levels
    target = encoder().target(teacher, x, levels)
    between = ddim_step(interpolant, x, teacher(x, start), start, middle)
    after = ddim_step(interpolant, between, teacher(between, middle), middle, end)
    reached = ddim_step(interpolant, x, target, start, end)
    torch.testing.assert_close(reached / after, torch.ones_like(after), rtol=0, atol=1e-8)


def test_a_halved_encoder_is_the_teachers_inversion_at_every_scale_and_decodes_to_the_data():
    student = halved(encoder(), (32, 16, 8, 4, 2, 1), from_data)
    x0, cond = noise(len(SCALES), 1), {GUIDANCE_SCALE: SCALES}
    expected = invert(GuidedGaussian(), x0, towards_noise(TEN, 64), cond=cond)
    found = invert(student, x0, towards_noise(TEN, 1), cond=cond)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    # and the noise it finds leads back by many steps
    fine = invert(GuidedGaussian(), x0, towards_noise(TEN, 1024), cond=cond)
    again = DDIM()(GuidedGaussian(), fine, uniform_u(TEN, 1024), cond=cond)
    torch.testing.assert_close(again, x0, rtol=2e-2, atol=0)
    # the probability flow's own gain, unguided
    assert float(fine[0] / x0[0]) == pytest.approx(math.sqrt((1 - 4.5e-5 * 0.75) / 0.25), rel=5e-3)


def test_data_that_do_not_vary_are_inverted_to_unit_noise_from_the_noise_of_the_first_level():
    nothing, levels, x0 = gaussian(VP, 0.0, dim=3), towards_noise(TEN, 5), torch.zeros(4, 3, dtype=D64)
    found = invert(nothing, x0, levels, rng=SampleRNG(range(4)))
    sigma = VP(levels[-1])[1]
    torch.testing.assert_close(found, sigma * SampleRNG(range(4)).randn((3,), dtype=D64), rtol=1e-12, atol=0)
    assert not bool(invert(nothing, x0, levels).any())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: towards_noise(TEN, 0), "at least 1"),
        (lambda: towards_noise(PURE_COSINE, 4), "give the schedule ends"),
        (lambda: invert(GuidedGaussian(), noise(1, 1), uniform_u(TEN, 4)), "log-SNRs that fall"),
        (lambda: invert(GuidedGaussian(), noise(1, 1), torch.tensor([1.0])), "log-SNRs that fall"),
    ],
)  # fmt: skip
def test_levels_that_do_not_lead_to_noise_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
