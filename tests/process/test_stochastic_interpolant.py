"""Stochastic interpolants: the bridge at its ends, closed-form regressions, and where it is our own process."""

import itertools
import math

import pytest
import torch
from bridges import INTERPOLANTS, ExactField, Law
from problems import D64

from diffusion_lab.denoisers import V, Velocity
from diffusion_lab.denoisers.prediction import target
from diffusion_lab.process import RectifiedFlow, VariancePreserving, marginal
from diffusion_lab.process.stochastic_interpolant import (
    BridgePath,
    LinearPath,
    StochasticInterpolant,
    TrigonometricPath,
    bridge,
    score_from_xi,
    velocity_target,
)

every = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
TAU = torch.linspace(0.02, 0.98, 25, dtype=D64)


def normals(*shape):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=D64) for _ in range(3)]


@every
def test_ends_are_source_and_data_to_the_bit(interpolant):
    source, data, xi = normals(2, 3, 4)
    for tau, expected in ((0.0, source), (1.0, data)):
        assert torch.equal(bridge(interpolant, source, data, xi, torch.full((2,), tau, dtype=D64)), expected)
    assert isinstance(interpolant.path, BridgePath)


@every
def test_velocity_target_is_the_derivative_of_the_bridge(interpolant):
    source, data, xi = normals(25, 3)
    tau = TAU.clone().requires_grad_()
    weights = normals(25, 3)[0].roll(1)
    (slope,) = torch.autograd.grad((weights * bridge(interpolant, source, data, xi, tau)).sum(), tau)
    expected = (weights * velocity_target(interpolant, source, data, xi, TAU)).sum(1)
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-11)


# three independent signs have the second moments of three normals, all that a linear regression sees
SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=D64).T


@every
@pytest.mark.parametrize("correlation", [0.0, 0.6, -0.9])
@pytest.mark.parametrize("at", [0.05, 0.3, 0.5, 0.9])
def test_regressions_from_gaussian_to_gaussian_are_the_closed_forms(interpolant, correlation, at):
    first, second, xi = (row[:, None] for row in SIGNS)
    m0, s0, m1, s1 = 0.4, 0.8, -1.1, 1.7
    source = m0 + s0 * first
    data = m1 + s1 * (correlation * first + math.sqrt(1 - correlation**2) * second)
    tau = torch.full((8,), at, dtype=D64)
    x = bridge(interpolant, source, data, xi, tau)
    exact = ExactField(interpolant, Law(means=(m0,), stds=(s0,)), Law(means=(m1,), stds=(s1,)), correlation)
    off = x - x.mean()
    for goal, found in zip(
        (velocity_target(interpolant, source, data, xi, tau), xi), exact(x, tau), strict=True
    ):
        regression = goal.mean() + (goal * off).mean() / (off**2).mean() * off
        torch.testing.assert_close(found, regression, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "trigonometric"])
def test_score_from_xi_is_the_gradient_of_the_log_density(name):
    source = Law((0.5, 0.5), (-1.0, 1.2), (0.3, 0.5))
    exact = ExactField(INTERPOLANTS[name], source, Law((0.3, 0.7), (-1.0, 0.8), (0.2, 0.35)))
    for at in (0.1, 0.5, 0.9):
        tau = torch.tensor(at, dtype=D64)
        x = torch.linspace(-2, 2, 11, dtype=D64)[:, None].requires_grad_()
        (expected,) = torch.autograd.grad(exact.log_density(x, tau).sum(), x)
        _, xi = exact(x.detach(), tau)
        torch.testing.assert_close(score_from_xi(INTERPOLANTS[name], xi, tau), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "trigonometric", "linear_plain"])
def test_the_law_moves_with_the_velocity(name):
    # the continuity equation, d log q / dtau + v d log q / dx + dv / dx = 0
    source = Law((0.5, 0.5), (-1.0, 1.2), (0.3, 0.5))
    exact = ExactField(INTERPOLANTS[name], source, Law((0.3, 0.7), (-1.0, 0.8), (0.2, 0.35)))
    for at in (0.1, 0.5, 0.9):
        tau = torch.tensor(at, dtype=D64, requires_grad=True)
        x = torch.linspace(-2, 2, 11, dtype=D64).requires_grad_()
        for i in range(11):
            in_time, in_space = torch.autograd.grad(exact.log_density(x, tau)[i], (tau, x))
            v, _ = exact(x, tau)
            (divergence,) = torch.autograd.grad(v[i], x)
            total = in_time + v[i].detach() * in_space[i] + divergence[i]
            assert abs(float(total)) < 1e-10


# ---- our own process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "ours", "prediction", "factor"),
    [
        (LinearPath(), RectifiedFlow(), Velocity(), -1.0),
        (TrigonometricPath(), VariancePreserving(), V(), -math.pi / 2),
    ],
    ids=["rectified_flow", "vp"],
)
def test_from_gaussian_noise_without_latent_noise_it_is_our_interpolant(path, ours, prediction, factor):
    interpolant = StochasticInterpolant(path=path, noise=0.0)
    eps, x0, xi = normals(25, 3)
    logsnr = interpolant.logsnr(TAU)
    torch.testing.assert_close(
        bridge(interpolant, eps, x0, xi, TAU), marginal(ours, x0, eps, logsnr), rtol=0, atol=1e-14
    )
    expected = factor * target(prediction, x0, eps, *ours(logsnr))
    torch.testing.assert_close(velocity_target(interpolant, eps, x0, xi, TAU), expected, rtol=0, atol=1e-13)


@every
def test_logsnr_is_signal_against_the_rest_and_rises(interpolant):
    a, b = interpolant.path(TAU)
    g, _ = interpolant.latent(TAU)
    torch.testing.assert_close(interpolant.logsnr(TAU), torch.log(b**2 / (a**2 + g**2)), rtol=0, atol=1e-12)
    assert bool((interpolant.logsnr(TAU).diff() > 0).all())


@pytest.mark.parametrize("noise", [-1.0, math.inf, math.nan])
def test_bad_noise_is_refused(noise):
    with pytest.raises(ValueError, match="noise"):
        StochasticInterpolant(path=LinearPath(), noise=noise)
