"""Learned schedules: they fall whatever their weights are, meet their end points exactly, and know their density."""

import pytest
import torch
from torch.func import jvp, vmap

from diffusion_lab.process import Schedule
from diffusion_lab.process.schedules import LearnedLinear, LearnedSchedule

D64 = torch.float64
U = torch.linspace(0, 1, 801, dtype=D64)


def scrambled(seed, scale, width=64):
    """A network with random weights, some of them large: the curve has bends and almost steps."""
    schedule = LearnedSchedule(logsnr_min=-4.7, logsnr_max=11.1, width=width).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in ("w2", "b2", "w3"):
            parameter = getattr(schedule, name)
            parameter.copy_(scale * torch.randn(parameter.shape, generator=g, dtype=D64))
        schedule.w1.copy_(0.3 * torch.randn((), generator=g, dtype=D64))
    return schedule


ALL = {
    "linear": LearnedLinear(),
    "fresh": LearnedSchedule(width=48),
    "narrow": LearnedSchedule(width=1),
    **{f"random_{seed}": scrambled(seed, scale) for seed, scale in enumerate((1.0, 10.0, 100.0))},
}
every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())


@every
def test_falls_strictly_between_exact_ends(schedule):
    assert isinstance(schedule, Schedule)
    logsnr = schedule(U)
    assert bool((logsnr.diff() < 0).all())
    assert float(logsnr[0]) == float(schedule.logsnr_max)
    assert float(logsnr[-1]) == float(schedule.logsnr_min)
    assert schedule(U.float()).dtype == torch.float32


def test_the_ends_are_exact_wherever_they_stand_in_a_batch():
    # a vectorised sigmoid rounds the end of a vector otherwise than its middle
    for seed in range(40):
        for width in (1, 3, 5, 7, 13):
            schedule = scrambled(seed, 3.0, width)
            torch.nn.init.ones_(schedule.w1)
            for n in (2, 3, 5, 9):
                m, _ = schedule.curve(torch.cat([torch.linspace(0, 1, n, dtype=D64), U[:1]]))
                assert m[-2:].tolist() == [1.0, 0.0]


@every
def test_the_slope_is_the_derivative_and_the_density_its_inverse(schedule):
    u = U.clone().requires_grad_()
    slope = torch.autograd.grad(schedule(u).sum(), u)[0]
    torch.testing.assert_close(schedule.slope(U), slope, rtol=1e-10, atol=0)
    inside = schedule(U[1:-1]).detach()
    torch.testing.assert_close(schedule.log_density(inside), -torch.log(-slope[1:-1]), rtol=1e-6, atol=1e-6)
    # forward mode and vmap see the same function
    tangent = jvp(schedule, (U,), (torch.ones_like(U),))[1]
    torch.testing.assert_close(tangent, slope, rtol=1e-10, atol=0)
    torch.testing.assert_close(vmap(schedule)(U), schedule(U), rtol=0, atol=1e-12)


@every
def test_the_density_integrates_to_one(schedule):
    nodes = torch.linspace(float(schedule.logsnr_min), float(schedule.logsnr_max), 20_001, dtype=D64)
    middle = 0.5 * (nodes[1:] + nodes[:-1])
    mass = torch.cat([torch.exp(schedule.log_density(part)) for part in middle.split(4000)]).mean()
    assert float(mass * (nodes[-1] - nodes[0])) == pytest.approx(1.0, abs=1e-6)


@every
def test_inverse_round_trip(schedule):
    u = schedule.inverse(schedule(U))
    torch.testing.assert_close(schedule(u), schedule(U), rtol=0, atol=1e-12)
    torch.testing.assert_close(u, U, rtol=0, atol=1e-12)
    assert schedule.inverse(torch.tensor([99.0, -99.0], dtype=D64)).tolist() == [0.0, 1.0]


def test_the_inverse_has_the_gradients_of_the_implicit_function():
    schedule = scrambled(3, 3.0, width=5)
    logsnr = torch.tensor([-2.0, 3.0, 9.0], dtype=D64, requires_grad=True)
    names, parameters = zip(*schedule.named_parameters(), strict=True)
    grads = torch.autograd.grad(schedule.log_density(logsnr).sum(), (logsnr, *parameters))
    step = 1e-5

    def difference(tensor, index):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.view(-1)[index] += sign * step
                values.append(float(schedule.log_density(logsnr).sum()))
                tensor.view(-1)[index] -= sign * step
        return (values[0] - values[1]) / (2 * step)

    for name, tensor, grad in zip(("logsnr", *names), (logsnr, *parameters), grads, strict=True):
        for index in range(tensor.numel()):
            assert float(grad.view(-1)[index]) == pytest.approx(
                difference(tensor, index), rel=1e-5, abs=1e-7
            ), name


def test_the_network_starts_near_the_line_and_every_parameter_of_it_learns():
    schedule = LearnedSchedule(logsnr_min=-5.0, logsnr_max=13.3)
    line = LearnedLinear(logsnr_min=-5.0, logsnr_max=13.3)
    assert float((schedule(U) - line(U)).abs().max()) < 0.03 * 18.3
    ((schedule(U) - torch.cos(U)) ** 2).sum().backward()
    assert all(bool((p.grad != 0).all()) for p in schedule.parameters())
    assert set(dict(schedule.named_parameters())) == {"logsnr_min", "logsnr_max", "w1", "w2", "b2", "w3"}


def test_the_formula_of_the_paper_written_out():
    # biases of layers 1 and 3 and the sum over units, as in the paper: the same curve, with b2 and w3 moved
    schedule = scrambled(4, 5.0, width=7)
    w1, w2, w3 = (getattr(schedule, name).abs() for name in ("w1", "w2", "w3"))
    b1, b3 = 0.4, -2.0

    def g(u):
        h = w1 * u + b1
        return h + (w3 / 7 * torch.sigmoid(w2 * h[:, None] + schedule.b2 - w2 * b1)).sum(-1) + b3

    ends = g(torch.tensor([0.0, 1.0], dtype=D64))
    high, low = schedule.logsnr_max, schedule.logsnr_min
    expected = high + (low - high) * (g(U) - ends[0]) / (ends[1] - ends[0])
    torch.testing.assert_close(schedule(U), expected, rtol=0, atol=1e-12)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="logsnr_min < logsnr_max"):
        LearnedLinear(logsnr_min=1.0, logsnr_max=1.0)
    with pytest.raises(ValueError, match="finite range"):
        LearnedLinear(logsnr_max=float("inf"))
    with pytest.raises(ValueError, match="width"):
        LearnedSchedule(width=0)
