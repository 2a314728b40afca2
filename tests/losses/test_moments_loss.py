"""Moment matching on closed forms: who pushes the student where, and where it comes to rest."""

import math

import pytest
import torch
from linear_students import (
    D64,
    NOISE,
    VP,
    WIDE,
    Linear,
    S,
    level,
    loss_of,
    noise,
    rng,
    signs,
    slope_of,
    steps_of,
    teacher_slope,
)
from problems import PURE_COSINE

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.losses.distillation import Displacement, InstantLoss
from diffusion_lab.process import RectifiedFlow
from diffusion_lab.process.gaussian import posterior


def pushed(loss, student, t, s, parameter, regulariser=1.0, start_variance=None):
    """dL / dparameter beside an exact auxiliary."""
    taken = steps_of(loss, student, t, s, start_variance)
    theirs = teacher_slope(torch.as_tensor(s, dtype=D64)).view(-1, 1)
    ours = (slope_of(taken) + regulariser * theirs) / (1 + regulariser)
    difference = ((ours - theirs) * taken.x_next.view(-1, 4)).view(-1, 1)
    return torch.autograd.grad(loss.push(taken, difference).mean(), parameter)[0]


S_GRID = [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]


@pytest.mark.parametrize("a", [0.1, 0.3, 0.49, 0.51, 0.8, 1.5])
def test_a_generator_of_one_step_is_pushed_towards_the_datas_variance(a):
    gain = torch.tensor(a, dtype=D64, requires_grad=True)
    found = pushed(loss_of(), Linear(gain), NOISE, S_GRID, gain)
    s = torch.tensor(S_GRID, dtype=D64)
    alpha, sigma = VP(level(s))
    theirs, ours = teacher_slope(s), alpha * a**2 / (alpha**2 * a**2 + sigma**2)
    expected = (1 / sigma**2 * 0.5 * (ours - theirs) * alpha * a).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-9)
    assert math.copysign(1, found) == math.copysign(1, a**2 - S)


@pytest.mark.parametrize("a", [0.1, 1.5])
def test_it_comes_to_rest_at_the_datas_variance(a):
    gain = torch.tensor(a, dtype=D64, requires_grad=True)
    for _ in range(600):
        gain.data -= 0.1 * pushed(loss_of(), Linear(gain), NOISE, [0.2, 0.5, 0.8], gain)
    assert float(gain) ** 2 == pytest.approx(S, abs=1e-9)


@pytest.mark.parametrize("r", [0.0, 1.0, 3.0])
def test_the_best_auxiliary_is_the_mean_of_both_and_weakens_the_push(r):
    loss = loss_of(regulariser=r)
    taken = steps_of(loss, Linear(0.8), NOISE, [0.5])
    theirs, ours = float(teacher_slope(torch.tensor(0.5))), float(slope_of(taken))
    assert abs(ours - theirs) > 0.1
    answer = theirs * taken.x_next

    def gradient(c):
        gain = torch.tensor(c, dtype=D64, requires_grad=True)
        return float(torch.autograd.grad(loss.fit(Linear(gain), taken, answer).mean(), gain)[0])

    # a parabola
    best = -gradient(0.0) / (gradient(1.0) - gradient(0.0))
    assert best == pytest.approx((ours + r * theirs) / (1 + r), rel=1e-9)
    gain = torch.tensor(0.8, dtype=D64, requires_grad=True)
    strong = pushed(loss, Linear(gain), NOISE, [0.5], gain, regulariser=0.0)
    assert float(pushed(loss, Linear(gain), NOISE, [0.5], gain, regulariser=r)) == pytest.approx(
        float(strong) / (1 + r), rel=1e-9
    )


@pytest.mark.parametrize(("t", "s"), [(0.7, 0.6), (0.7, 0.4), (0.7, 0.05), (0.95, 0.3), (0.25, 0.1)])
def test_a_generator_that_draws_from_the_posterior_is_left_alone_and_its_mean_is_not(t, s):
    """x~ drawn from q(x | z_t) has the teacher's moments at every s; the posterior mean has not."""
    loss = loss_of()
    n = signs(3)
    (alpha, sigma), (alpha_s, sigma_s) = (VP(level(u)) for u in (t, s))
    v, v_s = (float(a**2 * S + b**2) for a, b in ((alpha, sigma), (alpha_s, sigma_s)))
    drawn = float(sigma) * math.sqrt(S / v) * n[:, 2:]
    theirs = teacher_slope(s)

    class Drawing(Linear):
        def __call__(self, x, logsnr, cond=None):
            return super().__call__(x, logsnr) + drawn

    slopes, variances, pushes = [], [], []
    for student in (Drawing, Linear):
        gain = teacher_slope(t).clone().requires_grad_()
        full = torch.ones(8, dtype=D64)
        taken = loss.step(
            student(gain),
            math.sqrt(v) * n[:, :1],
            n[:, 1:2],
            level(t).expand(8) * full,
            level(s).expand(8) * full,
        )
        slopes.append(float((taken.x0 * taken.x_next).mean() / taken.x_next.square().mean()))
        variances.append(float(taken.x_next.square().mean()))
        difference = 0.5 * (slopes[-1] - theirs) * taken.x_next
        pushes.append(float(torch.autograd.grad(loss.push(taken, difference).mean(), gain)[0]))
    assert slopes[0] == pytest.approx(float(theirs), rel=1e-12)
    assert variances[0] == pytest.approx(v_s, rel=1e-12)
    assert abs(pushes[0]) < 1e-12
    # pushed away from where it starts, the teacher: to answer more than the mean
    assert slopes[1] < float(theirs) and pushes[1] < -1e-3
    if (t, s) == (0.7, 0.4):
        assert slopes[1] == pytest.approx(0.097, abs=5e-4) and float(theirs) == pytest.approx(0.397, abs=5e-4)


@pytest.mark.parametrize(("steps", "variance"), [(1, 1.0), (2, 1.040), (4, 1.008), (8, 1.021)])
def test_a_linear_student_of_more_steps_comes_near_the_datas_variance(steps, variance):
    """It cannot have the right moments at every s at once; with w = SNR + 1 this is where it stops."""
    loss, found = loss_of(), 1.0
    for i in range(steps, 0, -1):
        t, end = min(i / steps, 1 - 1e-9), (i - 1) / steps
        alpha, sigma = VP(level(t))
        v = float(alpha**2 * S + sigma**2)
        low = max(t - 1 / steps, 1e-4)
        s = low + (torch.arange(400, dtype=D64) + 0.5) / 400 * (t - low)
        least, most = 1e-4, 20.0
        for _ in range(40):
            gain = torch.tensor((least + most) / 2, dtype=D64, requires_grad=True)
            if float(pushed(loss, Linear(gain), t, s, gain, start_variance=v)) > 0:
                most = float(gain)
            else:
                least = float(gain)
        one = torch.ones(1, 1, dtype=D64)
        levels = (level(t).view(1), (level(end) if end else torch.tensor(math.inf, dtype=D64)).view(1))
        kept, fresh, _ = posterior(VP, one, least * one, *levels)
        found = float(kept) ** 2 * found + float(fresh)
    assert found / S == pytest.approx(variance, abs=1e-3)
    assert abs(found / S - 1) < 0.05


class Net(torch.nn.Module):
    """A network, or a denoiser, of two parameters."""

    interpolant = VP

    def __init__(self, theta=1.0, bias=0.0):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=D64))
        self.bias = torch.nn.Parameter(torch.tensor(bias, dtype=D64))

    def forward(self, x, logsnr, cond=None):
        return torch.sin(self.theta * x) + self.bias * logsnr.view(-1, *[1] * (x.ndim - 1))


class Slope(Net):
    def forward(self, x, logsnr, cond=None):
        return self.theta * x


@pytest.mark.parametrize("a", [0.2, 0.8])
def test_moments_of_parameters_push_the_same_way(a):
    """theta z as the teacher: nu = alpha sigma^2 (S - a^2) / v, and dL / da = -w E[z_1 z_s] nu."""
    loss, s = loss_of(InstantLoss), 0.5
    gain = torch.tensor(a, dtype=D64, requires_grad=True)
    taken = steps_of(loss, Linear(gain), NOISE, [s])
    teacher = Slope(float(teacher_slope(s))).requires_grad_(False)
    displacement = Displacement(teacher)
    assert [name for name, _ in displacement.named_parameters()] == ["theta", "bias"]
    w = loss.weight(taken.end)[0]
    loss.moments(teacher, displacement, taken).mean().backward()
    nu = displacement.theta.grad / w
    alpha, sigma = (float(x) for x in VP(level(s)))
    v = alpha**2 * S + sigma**2
    assert float(nu) == pytest.approx(alpha * sigma**2 * (S - a**2) / v, rel=1e-9)
    assert gain.grad is None and displacement.bias.grad is None
    displacement.theta.data = -nu
    change = loss.change(teacher, displacement, taken)
    torch.testing.assert_close(change, -nu * taken.x_next, rtol=1e-12, atol=0)
    loss.push(taken, change).mean().backward()
    z_1 = signs(2)[:, :1]
    assert float(gain.grad) == pytest.approx(float(-w * (z_1 * taken.x_next).mean() * nu), rel=1e-9)
    assert (float(gain.grad) > 0) == (a**2 > S)


def test_the_change_is_that_of_a_small_step_of_the_teacher_and_no_step_is_none():
    loss = loss_of(InstantLoss, WIDE)
    network = Net(1.3, 0.1)
    teacher = NetworkDenoiser(network=network, interpolant=VP, prediction=V()).requires_grad_(False)
    taken = loss.draw(Linear(0.3), noise(16, 3), None, rng(16), 4)
    displacement = Displacement(teacher)
    assert set(displacement.by_name()) == {"network.theta", "network.bias"}
    assert not bool(loss.change(teacher, displacement, taken).any())
    for parameter, value in zip(displacement.parameters(), (0.7, -0.2), strict=True):
        parameter.data.fill_(value)
    found = loss.change(teacher, displacement, taken)
    step = 1e-5
    answers = []
    for sign in (1, -1):
        moved = NetworkDenoiser(
            network=Net(1.3 + sign * step * 0.7, 0.1 - sign * step * 0.2), interpolant=VP, prediction=V()
        )
        answers.append(moved(taken.x_next, taken.end).detach())
    torch.testing.assert_close(found, (answers[0] - answers[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    # and its gradient is taken at the teacher wherever the displacement is
    for there in (0.0, 0.7):
        displacement.zero_grad()
        for parameter in displacement.parameters():
            parameter.data.fill_(there)
        loss.moments(teacher, displacement, taken).mean().backward()
        gradients = [p.grad.clone() for p in displacement.parameters()]
        if there == 0.0:
            expected = gradients
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    displacement.forget()
    assert not any(p.any() for p in displacement.parameters())


def test_the_auxiliarys_loss_is_the_papers_and_a_network_is_judged_alike():
    loss = loss_of(schedule=WIDE)
    network = NetworkDenoiser(network=Net(1.3, 0.1), interpolant=VP, prediction=V())

    class ByX0:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return network(x, logsnr, cond)

    taken = loss.draw(Linear(0.3), noise(32, 3), None, rng(32), 4)
    answer = Linear(0.4)(taken.x_next, taken.end)
    own = network(taken.x_next, taken.end)
    squares = ((taken.x0 - own) ** 2 + (answer - own) ** 2).mean(1)
    for auxiliary in (network, ByX0()):
        found = loss.fit(auxiliary, taken, answer)
        torch.testing.assert_close(found, (1 + taken.end.exp()) * squares, rtol=1e-6, atol=0)


def test_the_student_is_pushed_against_the_difference_and_not_through_its_step():
    loss = loss_of(schedule=WIDE)
    student = NetworkDenoiser(network=Net(0.9, 0.1), interpolant=VP, prediction=V())
    auxiliary, teacher = (Net(*values).requires_grad_(False) for values in ((0.5, 0.02), (0.3, -0.01)))
    x0 = noise(8, 3)
    terms = loss(student, auxiliary, teacher, x0, None, rng(8), steps=4, learner="student")
    found = torch.autograd.grad(terms.total, tuple(student.parameters()))
    taken = loss.draw(student, x0, None, rng(8), 4)
    assert taken.x0.requires_grad and not taken.x_next.requires_grad
    w = (1 + taken.end.exp())[:, None]
    difference = auxiliary(taken.x_next, taken.end) - teacher(taken.x_next, taken.end)
    direction = w * difference / (3 * 8)
    expected = torch.autograd.grad(taken.x0, tuple(student.parameters()), direction)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    # what is shown is how far apart the moments are
    square = (w * difference**2).mean(1)
    torch.testing.assert_close(terms.per_example, square, rtol=1e-9, atol=0)
    assert torch.equal(terms.logsnr, taken.end)


def test_its_step_is_the_posterior_of_its_own_answer():
    loss = loss_of(schedule=WIDE)
    for process in (VP, RectifiedFlow()):
        student = Linear(0.3)
        student.interpolant = process
        start, end = (torch.full((4096,), value, dtype=D64) for value in (-1.0, 0.5))
        x, z = noise(4096, 1, seed=1), noise(4096, 1, seed=2)
        taken = loss.step(student, x, z, start, end)
        mean, lower, _ = posterior(process, x, 0.3 * x, start, end)
        torch.testing.assert_close(taken.x_next, mean + lower.sqrt() * z, rtol=1e-12, atol=0)
    # no step is no change, and a whole one is the answer
    same = loss.step(student, x, z, start, start)
    torch.testing.assert_close(same.x_next, x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lengths_are_drawn_continuously_up_to_one_of_the_samplers(steps):
    loss = loss_of()
    u = torch.linspace(0, 1, 101, dtype=D64)
    for delta in (0.0, 0.37, 1.0):
        start, end = loss.levels(u, torch.full_like(u, delta), steps)
        assert bool(torch.isfinite(start).all() and torch.isfinite(end).all() and (start <= end).all())
        expected = (u + delta / steps).clamp(max=1.0)
        torch.testing.assert_close(PURE_COSINE.inverse(start), expected, rtol=0, atol=1e-9)
    taken = loss.draw(Linear(0.5), noise(4096, 1), None, rng(4096), steps)
    t, s = (PURE_COSINE.inverse(x) for x in (taken.start, taken.end))
    length = (t - s)[t < 1 - 1e-6] * steps
    assert float(length.max()) <= 1 + 1e-9 and float(t.max()) == pytest.approx(1.0)
    if steps == 8:
        assert float(length.mean()) == pytest.approx(0.48, abs=0.03)
    # every t is trained, not only the sampler's
    counts = torch.histc(t[t < 1 - 1e-6].float(), bins=20, min=0, max=1)
    assert bool((counts > 0).all())


@pytest.mark.parametrize("learner", ["student", "auxiliary"])
def test_one_learns_at_a_time_and_all_hear_the_same_labels(learner):
    heard = []

    class Listening(Slope):
        def forward(self, x, logsnr, cond=None):
            heard.append((cond["label"], torch.is_grad_enabled()))
            return super().forward(x, logsnr)

    gains = {"student": 0.5, "auxiliary": 0.4, "teacher": 0.3}
    nets = {name: Listening(gain) for name, gain in gains.items()}
    loss = loss_of(schedule=WIDE, label_dropout=0.5)
    loss(
        *nets.values(), noise(32, 2), {"label": torch.arange(32)}, rng(32), steps=4, learner=learner
    ).total.backward()  # fmt: skip
    grads = {name for name, net in nets.items() if net.theta.grad is not None and net.theta.grad != 0}
    assert grads == {learner}
    order = [learner == "student", False, learner == "auxiliary"]
    assert [grad for _, grad in heard] == order
    assert all(torch.equal(heard[0][0], label) for label, _ in heard[1:])
    assert 0 < int((heard[0][0] == -1).sum()) < 32


@pytest.mark.parametrize("regulariser", [-1.0, math.inf])
def test_what_does_not_fit_is_one_line(regulariser):
    with pytest.raises(ValueError, match="regulariser must be 0 or more") as error:
        loss_of(regulariser=regulariser)
    assert "\n" not in str(error.value)
