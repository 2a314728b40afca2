"""EM distillation and distribution matching on closed forms: Langevin's moments, fixed points, signs, exact zeros."""

import math
from itertools import pairwise

import pytest
import torch
from problems import INTERPOLANTS, PURE_COSINE, gaussian

from diffusion_lab.guidance import Unguided
from diffusion_lab.losses import P2, DenoisingLoss, EpsMSE
from diffusion_lab.losses.distillation import DistributionMatchingLoss, EMLoss
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.rng import SampleRNG, StepRNG
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.generate import Generation
from diffusion_lab.samplers.grids import from_logsnrs

D64 = torch.float64
VP = VariancePreserving()
WIDE = Cosine(logsnr_min=-10.0, logsnr_max=10.0)
S = 0.25
every_interpolant = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)


def loss_of(kind, schedule=WIDE, weighting=None, **options):
    """Of `kind`, in x0 units: the paper's sigma^2 / alpha^2."""
    weighting = P2(schedule=schedule, k=0.0) if weighting is None else weighting
    score = DenoisingLoss(schedule=schedule, weighting=EpsMSE(schedule=schedule))
    return kind(schedule=schedule, weighting=weighting, score=score, **{"logsnrs": [-6.0], **options})


def rng(total, seed=0):
    return StepRNG(seed=seed, step=0, positions=slice(None), total=total)


class Given:
    """Numbers that a test chooses, by tag; zeros where it says nothing."""

    def __init__(self, rows, u=0.5, **numbers):
        self.rows, self.u, self.numbers = rows, u, numbers

    def randn(self, tag, shape, dtype):
        found = self.numbers.get(tag, torch.zeros(self.rows, *shape))
        return torch.as_tensor(found, dtype=dtype).reshape(self.rows, *shape).clone()

    def stratified(self, tag):
        return torch.full((self.rows,), self.u, dtype=D64)

    rand = stratified


class Student:
    """g(z) = a z + bend sin(z), with a parameter."""

    def __init__(self, a, interpolant=VP, bend=0.0):
        self.interpolant, self.bend = interpolant, bend
        self.a = torch.tensor(a, dtype=D64, requires_grad=True)

    def __call__(self, x, logsnr, cond=None):
        z = x / self.interpolant(logsnr)[1][:, None]
        return self.a * z + self.bend * torch.sin(self.a * z)


class Wavy:
    """A denoiser that is no linear map."""

    def __init__(self, interpolant=VP, phase=0.0):
        self.interpolant, self.phase = interpolant, phase

    def __call__(self, x, logsnr, cond=None):
        assert logsnr.dtype == x.dtype
        return torch.sin(x / (1 + x.abs()) + 0.1 * logsnr[:, None] + self.phase)


def gradients(terms, student):
    """d loss_i / d a, for each example."""
    return torch.stack(
        [torch.autograd.grad(each, student.a, retain_graph=True)[0] for each in terms.per_example]
    )


# ---- Langevin's steps: a linear map plus noise, whose stationary covariance is an equation --------------------------


def stationary(a, gamma, u=0.5):
    """The covariance of (z, eps) in which the code's own steps end, for g = a z; exactly."""
    loss = loss_of(EMLoss, PURE_COSINE, langevin_steps=1, gamma_eps=gamma, gamma_z=gamma)
    student, teacher, score = Student(a), gaussian(VP, S), gaussian(VP, a**2)
    logsnr = PURE_COSINE(torch.full((2,), u, dtype=D64))
    one = torch.eye(2, dtype=D64)

    def step(start, noise=0.0):
        stub = Given(2, langevin_z_0=noise * one[:, :1], langevin_eps_0=noise * one[:, 1:])
        z, eps, _ = loss.langevin(
            student, teacher, score, start[:, :1].clone(), start[:, 1:].clone(), logsnr, None, stub
        )
        return torch.cat([z, eps], dim=1)

    move, noise = step(one).T, step(torch.zeros(2, 2, dtype=D64), 1.0).T
    # sum over all past steps, by squaring
    covariance = noise @ noise.T
    for _ in range(40):
        covariance = covariance + move @ covariance @ move.T
        move = move @ move
    alpha, sigma = (float(x[0]) for x in VP(logsnr))
    return covariance, alpha, sigma


def moments(a, gamma):
    """Var x and E[x z] where Langevin ends, and what they should be without steps' bias."""
    covariance, alpha, sigma = stationary(a, gamma)
    row = torch.tensor([alpha * a, sigma], dtype=D64)
    v_q, v_p = alpha**2 * S + sigma**2, alpha**2 * a**2 + sigma**2
    found = [float(row @ covariance @ row), float((covariance @ row)[0])]
    return found, [v_q, alpha * a * v_q / v_p]


def test_langevin_has_the_moments_of_the_teachers_data_and_the_students_latents():
    found, exact = moments(0.2, 0.01)
    assert exact == pytest.approx([0.625, 0.17], abs=5e-5)
    # 200,000 chains of a bare loop had .6306 and .1733, give or take .002
    assert found == pytest.approx([0.6306, 0.1733], abs=4e-3)
    # in closed form: with precision P, steps of length g end in the covariance (P (1 - g P / 2))^-1
    half = math.sqrt(0.5)
    row = torch.tensor([half * 0.2, half], dtype=D64)
    precision = torch.eye(2, dtype=D64) + (1 / 0.625 - 1 / 0.52) * torch.outer(row, row)
    covariance = torch.linalg.inv(precision @ (torch.eye(2, dtype=D64) - 0.005 * precision))
    torch.testing.assert_close(stationary(0.2, 0.01)[0], covariance, rtol=1e-9, atol=1e-12)
    # what is missing is due to the steps' length: it falls with it
    errors = [[abs(x - y) for x, y in zip(*moments(0.2, gamma), strict=True)] for gamma in (1e-2, 1e-3, 1e-4)]
    for coarse, fine in pairwise(errors):
        assert [c / f for c, f in zip(coarse, fine, strict=True)] == pytest.approx([10, 10], rel=0.1)


def em_update(a, gamma=1e-6):
    """The M-step's answer, E[x z] / (alpha E[z^2]), for the E-step's end."""
    covariance, alpha, sigma = stationary(a, gamma)
    return float((alpha * a * covariance[0, 0] + sigma * covariance[0, 1]) / (alpha * covariance[0, 0]))


@pytest.mark.parametrize("a", [0.1, 1.5])
def test_e_step_and_m_step_converge_monotonically_to_the_teachers_variance(a):
    alpha, sigma = math.sqrt(0.5), math.sqrt(0.5)
    v_q, v_p = alpha**2 * S + sigma**2, alpha**2 * a**2 + sigma**2
    assert em_update(a) == pytest.approx(a * v_q / (alpha**2 * a**2 * v_q / v_p + sigma**2), rel=1e-4)
    found = [a]
    while abs(found[-1] - found[-2] if len(found) > 1 else 1.0) > 1e-9 and len(found) < 400:
        found.append(em_update(found[-1]))
    assert found[-1] ** 2 == pytest.approx(S, rel=1e-4)
    distances = [abs(x - math.sqrt(S)) for x in found]
    assert distances[:20] == sorted(distances[:20], reverse=True)


@pytest.mark.parametrize("a", [0.2, 0.5, 0.9])
def test_the_residual_is_what_the_m_steps_gradient_says(a):
    """E[z (x - alpha a z)] = (alpha a sigma^2 / v_p^2) (v_q - v_p)."""
    covariance, alpha, sigma = stationary(a, 1e-6)
    v_q, v_p = alpha**2 * S + sigma**2, alpha**2 * a**2 + sigma**2
    expected = alpha * a * sigma**2 / v_p**2 * (v_q - v_p)
    assert float(sigma * covariance[0, 1]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# signs of z and eps in all combinations: every second moment of both is exact
SIGNS = {"generator": torch.tensor([1.0, 1.0, -1.0, -1.0]), "noise": torch.tensor([1.0, -1.0, 1.0, -1.0])}
KINDS = [(EMLoss, {"langevin_steps": 1}), (EMLoss, {"langevin_steps": 8}), (DistributionMatchingLoss, {})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("a", [0.1, 0.3, 0.8, 1.5])
def test_a_student_grows_if_and_only_if_its_variance_is_too_small(kind, options, a):
    student = Student(a)
    like = torch.zeros(4, 1, dtype=D64)
    terms = loss_of(kind, **options)(
        student, gaussian(VP, S), gaussian(VP, a**2), like, None, Given(4, **SIGNS)
    )
    terms.total.backward()
    assert float(student.a.grad) * (a**2 - S) > 0


# ---- exact zeros, and variational score distillation -----------------------------------------------------------------


@every_interpolant
@pytest.mark.parametrize("cancel_noise", [True, False])
def test_where_both_scores_agree_the_gradient_is_zero_for_each_sample(interpolant, cancel_noise):
    student, other = Student(0.7, interpolant, bend=0.5), Wavy(interpolant)
    loss = loss_of(EMLoss, langevin_steps=5, gamma_z=0.01, cancel_noise=cancel_noise)
    terms = loss(student, other, other, torch.zeros(64, 3, dtype=D64), None, rng(64))
    found = gradients(terms, student)
    if cancel_noise:
        assert torch.equal(found, torch.zeros_like(found)) and float(terms.total) == 0
    else:
        # zero in the mean alone
        assert float(found.abs().min()) > 0
        unit = found / found.abs().max()
        assert abs(float(unit.mean())) < 4 * float(unit.std()) / 8
    terms = loss_of(DistributionMatchingLoss)(
        student, other, other, torch.zeros(64, 3, dtype=D64), None, rng(64)
    )
    found = gradients(terms, student)
    assert torch.equal(found, torch.zeros_like(found))


@every_interpolant
@pytest.mark.parametrize("schedule", [WIDE, Cosine(logsnr_min=-3.0, logsnr_max=5.0)])
def test_one_langevin_step_is_variational_score_distillation(interpolant, schedule):
    """- w alpha gamma (s_q - s_p) dg/da, with w = sigma^2 / alpha^2; and what the other loss does unnormalised."""
    student, teacher, score = Student(0.7, interpolant, bend=0.5), Wavy(interpolant, 1.0), Wavy(interpolant)
    like, gamma = torch.zeros(32, 3, dtype=D64), 0.16
    em = loss_of(EMLoss, schedule, langevin_steps=1, gamma_z=0.0, gamma_eps=gamma)
    terms = em(student, teacher, score, like, None, rng(32))
    found = gradients(terms, student)

    z, eps = (rng(32).randn(tag, (3,), dtype=D64) for tag in ("generator", "noise"))
    logsnr = terms.logsnr
    assert torch.equal(logsnr, schedule(rng(32).stratified("noise_level")))
    alpha, sigma = (x[:, None] for x in interpolant(logsnr))
    x0 = student.a * z + 0.5 * torch.sin(student.a * z)
    slope = z + 0.5 * z * torch.cos(student.a * z)
    x = alpha * x0 + sigma * eps
    s_q, s_p = ((alpha * who(x, logsnr) - x) / sigma**2 for who in (teacher, score))
    weight = sigma**2 / alpha**2
    expected = -(weight * alpha * gamma * (s_q - s_p) * slope).mean(1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)

    plain = loss_of(DistributionMatchingLoss, schedule, normalise=False, u_min=0.0, u_max=1.0)
    direct = gradients(plain(student, teacher, score, like, None, rng(32)), student)
    torch.testing.assert_close(found, gamma * direct, rtol=1e-9, atol=1e-12)
    # z that moves by next to nothing is z that stays
    near = loss_of(EMLoss, schedule, langevin_steps=1, gamma_z=1e-16, gamma_eps=gamma)
    close = gradients(near(student, teacher, score, like, None, rng(32)), student)
    torch.testing.assert_close(close, found, rtol=1e-5, atol=1e-6)


def test_the_weighting_is_that_of_the_data_loss():
    """w / p of the eps error: SNR times as much as for the x0 error."""
    student, teacher, score = Student(0.7), Wavy(phase=1.0), Wavy()
    found = []
    for weighting in (P2(schedule=WIDE, k=0.0), EpsMSE(schedule=WIDE)):
        loss = loss_of(EMLoss, weighting=weighting, langevin_steps=3, gamma_z=0.01)
        terms = loss(student, teacher, score, torch.zeros(16, 2, dtype=D64), None, rng(16))
        found.append(terms.per_example.detach())
    torch.testing.assert_close(found[1], found[0] * terms.logsnr.exp(), rtol=1e-9, atol=0)


def test_several_steps_are_what_they_say_with_the_noise_taken_off():
    """By hand: the paper's recursion, and e the end of eps less that of its noise alone."""
    a, b, steps = 0.16, 0.01, 6
    student, teacher, score = Student(0.7, bend=0.5), Wavy(phase=1.0), Wavy()
    loss = loss_of(EMLoss, langevin_steps=steps, gamma_eps=a, gamma_z=b)
    z0, eps0 = (rng(16).randn(tag, (3,), dtype=D64) for tag in ("generator", "noise"))
    logsnr = WIDE(torch.linspace(0.1, 0.9, 16, dtype=D64))
    alpha, sigma = (x[:, None] for x in VP(logsnr))
    z, eps, linear = z0.clone(), eps0.clone(), eps0.clone()
    gain = student.a.detach()
    for i in range(steps):
        x = alpha * (gain * z + 0.5 * torch.sin(gain * z)) + sigma * eps
        delta = alpha / sigma**2 * (teacher(x, logsnr) - score(x, logsnr))
        slope = gain * (1 + 0.5 * torch.cos(gain * z))
        n, m = (rng(16).randn(f"langevin_{name}_{i}", (3,), dtype=D64) for name in ("eps", "z"))
        eps = eps + a * (sigma * delta - eps) + math.sqrt(2 * a) * n
        z = z + b * (alpha * slope * delta - z) + math.sqrt(2 * b) * m
        linear = (1 - a) * linear + math.sqrt(2 * a) * n
    found = loss.langevin(student, teacher, score, z0.clone(), eps0, logsnr, None, rng(16))
    for got, expected in zip(found, (z, eps, eps - linear), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    # and the student is fitted at the end of it: - (w alpha / sigma) e dg/da at the last z, w = sigma^2 / alpha^2
    terms = loss(student, teacher, score, torch.zeros(16, 3, dtype=D64), None, rng(16))
    z, _, e = loss.langevin(student, teacher, score, z0.clone(), eps0, terms.logsnr, None, rng(16))
    alpha, sigma = (x[:, None] for x in VP(terms.logsnr))
    slope = z * (1 + 0.5 * torch.cos(gain * z))
    expected = -(sigma / alpha * e * slope).mean(1)
    torch.testing.assert_close(gradients(terms, student), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms.total, terms.per_example.mean())


# ---- distribution matching -------------------------------------------------------------------------------------------


def test_distribution_matching_on_gaussians_is_its_closed_form():
    """x0_q - x0_p = (k_q - k_p) x, divided by the mean of |a z - k_q x|; the papers' two lines, too."""
    a, dim = 0.8, 5
    student, teacher, score = Student(a), gaussian(VP, S, dim), gaussian(VP, a**2, dim)
    # whatever the weighting is
    loss = loss_of(DistributionMatchingLoss, weighting=EpsMSE(schedule=WIDE))
    terms = loss(student, teacher, score, torch.zeros(32, dim, dtype=D64), None, rng(32))
    z, eps = (rng(32).randn(tag, (dim,), dtype=D64) for tag in ("generator", "noise"))
    u = WIDE.inverse(terms.logsnr)
    assert 0.02 - 1e-9 <= float(u.min()) and float(u.max()) <= 0.98 and float(u.max() - u.min()) > 0.9
    alpha, sigma = (x[:, None] for x in VP(terms.logsnr))
    x = alpha * a * z + sigma * eps
    k_q, k_p = (alpha * variance / (alpha**2 * variance + sigma**2) for variance in (S, a**2))
    pushes = (k_q - k_p) * x / (a * z - k_q * x).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradients(terms, student), -(pushes * z).mean(1), rtol=1e-9, atol=1e-12)
    x0 = (a * z).requires_grad_()
    real, fake = (x0 - who(x, terms.logsnr) for who in (teacher, score))
    gradient = (real - fake) / real.abs().mean(1, keepdim=True)
    published = 0.5 * (x0 - (x0 - gradient).detach()).square().mean()
    torch.testing.assert_close(terms.total, published, rtol=1e-9, atol=0)
    (by_code,) = torch.autograd.grad(published, x0)
    torch.testing.assert_close(by_code, -pushes / (32 * dim), rtol=1e-9, atol=1e-12)


def test_it_goes_the_way_of_variational_score_distillation():
    """Each sample's push has the same direction; the normalisation is its length."""
    teacher, score, like = Wavy(phase=1.0), Wavy(), torch.zeros(32, 4, dtype=D64)
    pushes = []

    class Free(Student):
        """Each number of each sample is its own parameter."""

        def __call__(self, x, logsnr, cond=None):
            pushes.append(super().__call__(x, logsnr, cond).detach().requires_grad_())
            return pushes[-1]

    for normalise in (True, False):
        loss = loss_of(DistributionMatchingLoss, normalise=normalise)
        loss(Free(0.7), teacher, score, like, None, rng(32)).total.backward()
    ratio = pushes[0].grad / pushes[1].grad
    assert bool((ratio > 0).all())
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-8, atol=0)


# ---- the student score, the sampler, who hears what ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_score_learns_the_students_own_denoiser(kind, options):
    a, u = 0.8, 0.4
    alpha, sigma = (float(x) for x in VP(WIDE(torch.tensor(u, dtype=D64))))
    best = alpha * a**2 / (alpha**2 * a**2 + sigma**2)

    class Gain:
        interpolant = VP

        def __init__(self, gain):
            self.gain = torch.tensor(gain, dtype=D64, requires_grad=True)

        def __call__(self, x, logsnr, cond=None):
            return self.gain * x

    student, like = Student(a), torch.zeros(4, 1, dtype=D64)
    slopes = []
    for gain in (best - 0.1, best, best + 0.1):
        score = Gain(gain)
        loss_of(kind, **options).follow(score, student, like, None, Given(4, u, **SIGNS)).total.backward()
        slopes.append(float(score.gain.grad))
    assert slopes[0] < -0.01 and slopes[1] == pytest.approx(0.0, abs=1e-12) and slopes[2] > 0.01
    assert student.a.grad is None


@every_interpolant
def test_one_ddim_step_from_its_level_is_the_students_sampler(interpolant):
    student = Wavy(interpolant)
    loss = loss_of(EMLoss, logsnrs=[-3.0])
    recipe = Generation(sampler=DDIM(), grid=from_logsnrs([-3.0]), guidance=Unguided, shape=(3,))
    images = recipe(student, seeds=range(5))
    z = SampleRNG(range(5)).randn((3,))
    torch.testing.assert_close(images, loss.generate(student, z, None), rtol=1e-6, atol=1e-6)
    assert recipe.nfe(interpolant) == 1


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_only_the_student_gets_a_gradient_and_all_hear_the_same_labels(kind, options):
    heard = []

    class Listening(Wavy):
        def __init__(self, phase=0.0):
            super().__init__(phase=phase)
            self.weight = torch.ones((), dtype=D64, requires_grad=True)

        def __call__(self, x, logsnr, cond=None):
            heard.append(cond["label"])
            return self.weight * super().__call__(x, logsnr)

    student, teacher, score = (Listening(phase) for phase in (0.0, 1.0, 2.0))
    loss = loss_of(kind, label_dropout=0.5, **options)
    like, cond = torch.zeros(32, 2, dtype=D64), {"label": torch.arange(32)}
    loss(student, teacher, score, like, cond, rng(32)).total.backward()
    assert float(student.weight.grad) != 0 and teacher.weight.grad is None and score.weight.grad is None
    student.weight.grad = None
    loss.follow(score, student, like, cond, rng(32)).total.backward()
    assert float(score.weight.grad) != 0 and student.weight.grad is None
    assert all(torch.equal(heard[0], label) for label in heard[1:])
    assert 0 < int((heard[0] == -1).sum()) < 32


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (EMLoss, {"logsnrs": [-6.0, 0.0]}, "logsnrs must be one level"),
        (EMLoss, {"langevin_steps": 0}, "langevin_steps must be at least 1"),
        (EMLoss, {"gamma_eps": 0.0}, r"gamma_eps in \(0, 1\]"),
        (EMLoss, {"gamma_z": -0.1}, r"gamma_z in \[0, 1\]"),
        (DistributionMatchingLoss, {"logsnrs": []}, "finite levels that increase"),
        (DistributionMatchingLoss, {"logsnrs": [0.0, -6.0]}, "finite levels that increase"),
        (DistributionMatchingLoss, {"logsnrs": [-math.inf]}, "finite levels that increase"),
        (DistributionMatchingLoss, {"u_min": 0.9, "u_max": 0.1}, "0 <= u_min < u_max <= 1"),
    ],
)
def test_what_does_not_fit_is_one_line(kind, options, words):
    with pytest.raises(ValueError, match=words) as error:
        loss_of(kind, **options)
    assert "\n" not in str(error.value)


def test_in_float32_a_small_push_keeps_its_digits():
    loss = loss_of(DistributionMatchingLoss)
    x0 = torch.full((1, 4), 0.9, requires_grad=True)
    loss.pushed(x0, torch.full((1, 4), 1e-9), torch.ones(1)).sum().backward()
    torch.testing.assert_close(x0.grad, torch.full((1, 4), -2.5e-10), rtol=1e-6, atol=0)
    # and one at either end of a wide schedule is finite
    student, teacher, score = Wavy(), Wavy(phase=1.0), Wavy()
    z, eps = (rng(2).randn(tag, (3,)) for tag in ("generator", "noise"))
    logsnr = torch.tensor([-20.0, 20.0], dtype=D64)
    em = loss_of(EMLoss, Cosine(logsnr_min=-20.0, logsnr_max=20.0), gamma_z=1e-8)
    found = em.langevin(student, teacher, score, z, eps, logsnr, None, rng(2))
    assert all(bool(torch.isfinite(x).all()) for x in found)
