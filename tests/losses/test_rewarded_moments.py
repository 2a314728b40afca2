"""Rewarded moment matching on closed forms: what is added to the student's push, and from which samples it learns."""

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
    slope_of,
    steps_of,
    teacher_slope,
)
from problems import gaussian

from diffusion_lab.losses.distillation import Rewarded
from diffusion_lab.losses.distillation.rewarded import own_samples
from diffusion_lab.rewards import Brightness, DigitProbability
from diffusion_lab.samplers import DDPM
from diffusion_lab.samplers.grids import uniform_u


def test_a_reward_and_the_student_as_it_was_are_added_to_the_push():
    loss, x0 = loss_of(schedule=WIDE), noise(8, 3)
    auxiliary, teacher, before = Linear(0.5), Linear(0.3), Linear(0.2)
    rewarded = Rewarded(reward=lambda x, cond: x.pow(3).sum(1) / 3, strength=0.4)

    class Given(Linear):
        def __call__(self, x, logsnr, cond=None):
            self.answer = (0.7 * x).detach().requires_grad_()
            return self.answer

    student = Given(0.7)
    terms = loss(
        student, auxiliary, teacher, x0, None, rng(8), steps=4, learner="student", rewarded=rewarded,
        reference=before,
    )  # fmt: skip
    (found,) = torch.autograd.grad(terms.total, student.answer)
    taken = loss.draw(Linear(0.7), x0, None, rng(8), 4)
    w, x = (1 + taken.end.exp())[:, None], taken.x0
    # pull is half the strength
    direction = w * 0.2 * taken.x_next - 0.4 * x**2 + 0.4 * (x - 0.2 * taken.x)
    torch.testing.assert_close(found, direction / (3 * 8), rtol=1e-9, atol=1e-12)
    alone = loss(student, auxiliary, teacher, x0, None, rng(8), steps=4, learner="student")
    assert torch.equal(alone.per_example, terms.per_example) and alone.total != terms.total


def test_a_rewarded_gaussian_moves_its_mean_as_far_as_the_teacher_lets_it():
    """x~ = ½ z_1 + b, the exact auxiliary is affine: b rests where w (g_phi - g_theta) is the reward's gradient."""
    loss, strength, s = loss_of(), 0.3, 0.1
    rewarded = Rewarded(reward=Brightness(), strength=strength, pull=0.0)
    alpha, sigma = (float(x) for x in VP(level(s)))
    v = alpha**2 * S + sigma**2
    # ½ (1 / sigma^2) (sigma^2 / v) b = strength, and v tends to S: exp(2 strength R)
    rest = 2 * strength * v
    for b, sign in ((0.5 * rest, -1), (rest, 0), (2 * rest, 1)):
        shift = torch.tensor(b, dtype=D64, requires_grad=True)
        taken = steps_of(loss, Linear(0.5, shift), NOISE, [s])
        ours = b + slope_of(taken) * (taken.x_next - alpha * b)
        theirs = teacher_slope(s) * taken.x_next
        total = loss.push(taken, 0.5 * (ours - theirs)) + rewarded(taken.x0, taken.x0.detach())
        (found,) = torch.autograd.grad(total.mean(), shift)
        assert (abs(float(found)) < 1e-10) if sign == 0 else (float(found) * sign > 1e-3)


def test_its_own_samples_are_those_of_the_sampler():
    like, steps, numbers = noise(6, 2), 4, rng(6)
    tags = ("own_start", *(f"own_step_{i}" for i in range(3)))
    draws = [numbers.randn(tag, (2,), dtype=D64) for tag in tags]

    class Given:
        def randn_like(self, x):
            return draws.pop(0)

    student = gaussian(VP, S, dim=2)
    found = own_samples(student, like, None, rng(6), schedule=WIDE, steps=steps)
    grid = uniform_u(WIDE, steps)
    x = VP(grid[0])[1] * draws.pop(0)
    for i in range(steps):
        x, _ = DDPM(interpolation=0.0).step(student, x, grid[i], grid[i + 1], None, Given())
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-12)
    assert not draws


def test_the_reward_of_a_digit_has_a_gradient_towards_it():
    reward = DigitProbability()
    x = torch.zeros(4, 1, 8, 8, requires_grad=True)
    cond = {"label": torch.tensor([0, 3, 7, -1])}
    value = reward(x, cond)
    (g,) = torch.autograd.grad(value.sum(), x)
    moved = reward(x + 1e-3 * g, cond)
    assert bool((moved > value)[:3].all())
    assert float(value[3]) == 0.0 and not bool(g[3].any())
    with pytest.raises(ValueError, match="digits of 1x8x8 and 1x28x28, not"):
        reward(torch.zeros(1, 3, 8, 8), cond)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rewarded(strength=0.0), "Rewarded needs strength > 0"),
        (lambda: Rewarded(part=1.0), "part in"),
        (lambda: Rewarded(pull=-1.0), "pull >= 0"),
        (
            lambda: Rewarded(reward=lambda x, cond: x.detach().sum(1))(
                noise(2, 3).requires_grad_(), noise(2, 3)
            ),
            "has no gradient",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
