"""Continuous-time consistency on closed forms: where the tangent is zero, what it is elsewhere, where it leads."""

import math

import pytest
import torch
from problems import INTERPOLANTS, gaussian

from diffusion_lab.denoisers import EDM, X0, Eps, NetworkDenoiser, V, Velocity
from diffusion_lab.losses import EDMWeighting, SNRPlusOne
from diffusion_lab.losses.distillation import ContinuousConsistencyLoss
from diffusion_lab.losses.distillation.continuous_consistency import angle, trig_velocity
from diffusion_lab.process import Cosine, LogNormal, VariancePreserving
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.rng import StepRNG

D64 = torch.float64
VP = VariancePreserving()
LEVELS = torch.linspace(-8.0, 8.0, 9, dtype=D64)
SCHEDULE = LogNormal(mean=-0.4, std=1.4)
VARIANCE = 0.25
PREDICTIONS = [V(), Velocity(), EDM(sigma_data=0.5), X0(), Eps()]


def loss_of(schedule=SCHEDULE, **options):
    return ContinuousConsistencyLoss(schedule=schedule, weighting=SNRPlusOne(schedule=schedule), **options)


def rng(total):
    return StepRNG(seed=0, step=0, positions=slice(None), total=total)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


class FlowMap:
    """Follows the probability flow of N(0, variance) to the data."""

    def __init__(self, variance, interpolant=VP, sigma_data=1.0):
        self.variance, self.interpolant, self.sigma_data = variance, interpolant, sigma_data

    def __call__(self, x, logsnr, cond=None):
        alpha, sigma = self.interpolant(logsnr)
        gain = torch.sqrt(self.variance / (alpha**2 * self.variance + sigma**2))
        return broadcast_right(gain, x) * x


class Net(torch.nn.Module):
    """A network that is no linear map."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.5 * noise(3, 3, seed=8))

    def forward(self, x, logsnr, cond):
        return torch.sin(x @ self.weight + 0.3 * logsnr[:, None])


def network(prediction, interpolant=VP, sigma_data=1.0):
    return NetworkDenoiser(
        network=Net(), interpolant=interpolant, prediction=prediction, sigma_data=sigma_data
    )


def tangent(student, teacher, y, logsnr=LEVELS, sigma_data=1.0):
    slope = trig_velocity(teacher, y, logsnr, None, sigma_data)
    first, second = loss_of().tangent(student, y, slope, logsnr, None, sigma_data)
    return first + second


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_the_tangent_is_zero_at_the_flow_map_and_not_elsewhere(interpolant, sigma_data):
    teacher, y = gaussian(interpolant, VARIANCE, dim=3), noise(9, 3)
    exact = tangent(FlowMap(VARIANCE, interpolant), teacher, y, sigma_data=sigma_data)
    torch.testing.assert_close(exact, torch.zeros_like(exact), rtol=0, atol=1e-10)
    # no other family of curves, nor the denoiser itself
    for other in (FlowMap(0.3, interpolant), gaussian(interpolant, VARIANCE, dim=3)):
        away = tangent(other, teacher, y, sigma_data=sigma_data)
        assert float(away.abs().amax(1).max()) > 0.02


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
def test_it_is_how_the_answer_changes_along_the_teachers_path(prediction, interpolant, sigma_data):
    """cos(t) d(x0 / d)/dt by finite differences, one step of the teacher's ODE to either side."""
    student, teacher = network(prediction, interpolant, sigma_data), FlowMap(0.4, interpolant)
    y, h = noise(9, 3), 1e-5
    cos, sin, _ = angle(interpolant, LEVELS, sigma_data)
    slope = trig_velocity(teacher, y, LEVELS, None, sigma_data)
    t, ends = torch.atan2(sin, cos), []
    for step in (h * sin * cos, -h * sin * cos):
        level = -2.0 * torch.log(sigma_data * torch.tan(t + step))
        n = angle(interpolant, level, sigma_data)[2]
        x = n[:, None] * (y + step[:, None] * slope)
        ends.append(student(x, level) / sigma_data)
    expected = (cos / (2 * h * sin * cos))[:, None] * (ends[0] - ends[1])
    got = tangent(student, teacher, y, sigma_data=sigma_data)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_a_networks_own_answer_is_the_velocity_of_v_prediction_and_less_edms(interpolant, sigma_data):
    y, (cos, sin, n) = noise(9, 3), angle(interpolant, LEVELS, sigma_data)
    for prediction in (V(), Velocity(), EDM(sigma_data=sigma_data), EDM(sigma_data=0.7), X0(), Eps()):
        student = network(prediction, interpolant, sigma_data)
        x = n[:, None] * y
        x0 = student(x, LEVELS) / sigma_data
        f = trig_velocity(student, y, LEVELS, None, sigma_data)
        torch.testing.assert_close(cos[:, None] * y - sin[:, None] * f, x0, rtol=1e-9, atol=1e-9)
        raw = student.predict(x, LEVELS).raw
        if prediction == V() and sigma_data == 1.0:
            torch.testing.assert_close(f, raw, rtol=1e-12, atol=1e-12)
        if prediction == EDM(sigma_data=sigma_data):
            torch.testing.assert_close(f, -raw, rtol=1e-12, atol=1e-12)


def test_data_and_teacher_agree_in_expectation():
    # every second moment of x0 and eps, exactly
    x0 = math.sqrt(VARIANCE) * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=D64)[:, None]
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=D64)[:, None]
    student = FlowMap(0.6)
    for level in LEVELS:
        logsnr = level.repeat(4)
        cos, sin, _ = angle(VP, logsnr)
        y, slope = cos[:, None] * x0 + sin[:, None] * eps, cos[:, None] * eps - sin[:, None] * x0
        from_data = sum(loss_of().tangent(student, y, slope, logsnr))
        from_teacher = tangent(student, gaussian(VP, VARIANCE), y, logsnr)
        torch.testing.assert_close((from_data * y).mean(), (from_teacher * y).mean(), rtol=1e-9, atol=1e-12)


def test_without_the_ramp_the_student_learns_the_slope_itself():
    student, teacher, y = network(V()), FlowMap(0.4), noise(9, 3)
    slope = trig_velocity(teacher, y, LEVELS)
    first, second = loss_of().tangent(student, y, slope, LEVELS)
    cos, _, _ = angle(VP, LEVELS)
    torch.testing.assert_close(first, cos[:, None] ** 2 * (slope - trig_velocity(student, y, LEVELS)))
    x0 = noise(64, 3, seed=2)
    for ramp in (0.0, 0.3, 1.0):
        terms = loss_of(normalise=None)(student, x0, None, rng(64), teacher=teacher, ramp=ramp)
        at = terms.logsnr
        c, s, _ = angle(VP, at)
        y = c[:, None] * x0 + s[:, None] * rng(64).randn("noise", (3,), dtype=D64)
        first, second = loss_of().tangent(student, y, trig_velocity(teacher, y, at), at)
        expected = 0.5 * (first + ramp * second).square().mean()
        torch.testing.assert_close(terms.total, expected, rtol=1e-9, atol=0)
        left = 0.5 * (first + second).square().mean(1)
        torch.testing.assert_close(terms.per_example, left, rtol=1e-9, atol=1e-15)


def test_with_edms_networks_edms_weights_of_the_same_law_are_the_papers():
    student, x0 = network(EDM(sigma_data=0.5), INTERPOLANTS["ve"], 0.5), noise(64, 3, seed=2)
    weighting = EDMWeighting(p_mean=-0.4, p_std=1.4, sigma_data=0.5)
    loss = ContinuousConsistencyLoss(schedule=SCHEDULE, weighting=weighting)
    terms = loss(student, x0, None, rng(64), teacher=FlowMap(0.1, INTERPOLANTS["ve"]))
    cos, sin, _ = angle(INTERPOLANTS["ve"], terms.logsnr, 0.5)
    y = cos[:, None] * x0 / 0.5 + sin[:, None] * rng(64).randn("noise", (3,), dtype=D64)
    g = tangent(student, FlowMap(0.1, INTERPOLANTS["ve"]), y, terms.logsnr, 0.5)
    torch.testing.assert_close(terms.per_example, 0.5 * g.square().mean(1), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("normalise", [None, 0.1])
@pytest.mark.parametrize("teacher", [FlowMap(0.4), None], ids=["teacher", "data"])
def test_the_gradient_is_that_of_the_answer_against_the_tangent(normalise, teacher, sigma_data):
    student, x0 = network(V(), sigma_data=sigma_data), noise(32, 3)
    # w / p = 1 / cos(t)^2 for any sigma_data, so that it is the answer alone that is weighed
    weighting = EDMWeighting(p_mean=-0.4, p_std=1.4, sigma_data=sigma_data)
    loss = ContinuousConsistencyLoss(schedule=SCHEDULE, weighting=weighting, normalise=normalise)
    terms = loss(student, x0, None, rng(32), teacher=teacher)
    (got,) = torch.autograd.grad(terms.total, student.network.weight)
    cos, sin, _ = angle(VP, terms.logsnr, sigma_data)
    eps, unit = rng(32).randn("noise", (3,), dtype=D64), x0 / sigma_data
    y = cos[:, None] * unit + sin[:, None] * eps
    slope = cos[:, None] * eps - sin[:, None] * unit
    if teacher is not None:
        slope = trig_velocity(teacher, y, terms.logsnr, None, sigma_data)
    g = sum(loss.tangent(student, y, slope, terms.logsnr, None, sigma_data))
    if normalise is not None:
        # of Euclidean length below one, times the root of the dimensions, which no optimizer of ours notices
        g = g * math.sqrt(3) / (g.norm(dim=1, keepdim=True) + normalise)
        assert bool((g.square().mean(1) < 1).all())
    pushed = -(trig_velocity(student, y, terms.logsnr, None, sigma_data) * g).mean()
    (expected,) = torch.autograd.grad(pushed, student.network.weight)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalise", [None, 0.1])
def test_the_loss_leads_to_the_flow_map_and_stays_there(normalise):
    """Students that are flow maps of another variance have one number to learn, and learn it from either side."""
    x0, loss = noise(256, 1, seed=4), loss_of(normalise=normalise)

    def slope_at(value):
        variance = torch.tensor(value, dtype=D64, requires_grad=True)
        terms = loss(FlowMap(variance), x0, None, rng(256), teacher=gaussian(VP, VARIANCE))
        return float(torch.autograd.grad(terms.total, variance)[0])

    assert all(slope_at(value) < -1e-5 for value in (0.1, 0.2, 0.249))
    assert all(slope_at(value) > 1e-5 for value in (0.251, 0.3, 0.9))
    assert abs(slope_at(VARIANCE)) < 1e-12


def test_the_levels_are_the_papers_and_so_is_the_balance():
    """ln(sigma / alpha) is normal; half of e^w |..|^2 - w with w = -u, the weights of the paper's algorithm."""
    student, x0 = network(V()), noise(512, 3)
    loss = loss_of(uncertainty=8)
    plain = loss_of()(student, x0, None, rng(512))
    tau = -0.5 * plain.logsnr
    assert float(tau.mean()) == pytest.approx(-0.4, abs=0.02)
    assert float(tau.std()) == pytest.approx(1.4, abs=0.02)
    # zero at first
    torch.testing.assert_close(loss(student, x0, None, rng(512)).total, plain.total, rtol=1e-12, atol=0)
    with torch.no_grad():
        loss.uncertainty.bias.fill_(0.7)
    terms = loss(student, x0, None, rng(512))
    expected = plain.total * math.exp(-0.7) + 0.5 * 0.7
    torch.testing.assert_close(terms.total, expected, rtol=1e-6, atol=0)
    assert torch.equal(terms.per_example, plain.per_example)
    # and it moves to ln of the paper's loss, twice ours: where that is one, the student's gradient is left alone
    (slope,) = torch.autograd.grad(terms.total, loss.uncertainty.bias)
    assert float(slope) == pytest.approx(0.5 - math.exp(-0.7) * float(plain.total), abs=1e-6)


def test_in_float32_the_tangent_has_its_digits_at_both_ends():
    wide, y = torch.linspace(-20, 16, 9, dtype=D64), noise(9, 3)
    student, teacher = network(V()), FlowMap(0.4)
    slope = trig_velocity(teacher, y, wide)
    expected = sum(loss_of().tangent(student, y, slope, wide))
    student.float()
    got = sum(loss_of().tangent(student, y.float(), slope.float(), wide.float()))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_students_own_answer_gets_a_gradient_and_all_hear_the_same_labels():
    heard, order = [], []

    class Listening:
        interpolant = VP

        def __init__(self):
            self.weight = torch.ones((), dtype=D64, requires_grad=True)

        def __call__(self, x, logsnr, cond=None):
            heard.append((cond["label"], torch.is_grad_enabled()))
            order.append(self)
            return self.weight * x

    student, teacher = Listening(), Listening()
    loss = loss_of(schedule=Cosine(logsnr_min=-10.0, logsnr_max=10.0), label_dropout=0.5)
    cond, again = {"label": torch.arange(32)}, lambda: order.append("again")
    loss(student, noise(32, 2), cond, rng(32), teacher=teacher, again=again).total.backward()
    assert order == [teacher, student, "again", student]
    assert [grad for _, grad in heard] == [False, True, False]
    assert student.weight.grad is not None and float(student.weight.grad) != 0 and teacher.weight.grad is None
    assert all(torch.equal(heard[0][0], label) for label, _ in heard[1:])
    assert 0 < int((heard[0][0] == -1).sum()) < 32


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match="normalise must be positive, or null"):
        loss_of(normalise=0.0)
    with pytest.raises(ValueError, match="even number of features"):
        loss_of(uncertainty=3)
