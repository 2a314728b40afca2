"""Transport along a bridge: the flow map in closed form, orders, and one law for the ODE and every epsilon."""

import math

import pytest
import torch
from bridges import INTERPOLANTS, ExactField, Law
from problems import D64, mixture_1d
from problems import INTERPOLANTS as PROCESSES
from scipy import stats

from diffusion_lab.process import RectifiedFlow
from diffusion_lab.process.stochastic_interpolant import LinearPath, StochasticInterpolant
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import Heun
from diffusion_lab.samplers.grids import uniform_time
from diffusion_lab.samplers.transport import VanishingNoise, transport_ode, transport_sde

SOURCE, DATA = Law(means=(0.4,), stds=(0.8,)), Law(means=(-1.1,), stds=(1.7,))
EPSILONS = {
    "half": VanishingNoise(scale=0.5),
    "two": VanishingNoise(scale=2.0),
    "sine": lambda tau: 0.8 * torch.sin(math.pi * tau) ** 2,
    "late": lambda tau: 3.0 * tau**2 * (1 - tau),
}
every = pytest.mark.parametrize("name", ["linear", "trigonometric"])
every_epsilon = pytest.mark.parametrize("epsilon", EPSILONS.values(), ids=EPSILONS.keys())


def times(steps, start=0.0, end=1.0):
    return torch.linspace(start, end, steps + 1, dtype=D64)


@pytest.mark.parametrize("name", INTERPOLANTS)
@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_ode_converges_to_the_flow_map_at_order_two(name, correlation):
    field = ExactField(INTERPOLANTS[name], SOURCE, DATA, correlation)
    x = torch.linspace(-2, 2, 9, dtype=D64)[:, None]
    for end in (0.6, 1.0):
        mean, variance, _, _ = field.moments(torch.tensor(end, dtype=D64))
        exact = mean + torch.sqrt(variance) / 0.8 * (x - 0.4)
        errors = [float((transport_ode(field, x, times(n, end=end)) - exact).abs().max()) for n in (80, 160)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15) and errors[1] < 1e-3


class Noises:
    """Stands for SampleRNG: hands out given noises in turn."""

    def __init__(self, noises):
        self.noises = iter(noises)

    def randn_like(self, x):
        return next(self.noises)


def moments_at_the_end(field, epsilon, steps):
    """Mean and variance of the SDE's samples in closed form: on Gaussians each step is an affine map.

    Row 0 starts at the mean and meets no noise; row 1 adds a standard deviation to the start; each other row meets one
    unit of noise. The first step draws none, for epsilon vanishes there.
    """
    start = torch.full((steps + 1, 1), 0.4, dtype=D64)
    start[1] += 0.8
    noises = torch.cat(
        [torch.zeros(steps - 1, 2, 1, dtype=D64), torch.eye(steps - 1, dtype=D64)[:, :, None]], 1
    )
    end = transport_sde(
        field, field.interpolant, start, times(steps), epsilon=epsilon, rng=Noises(noises)
    ).ravel()
    return float(end[0]), float(((end[1:] - end[0]) ** 2).sum())


@every
@every_epsilon
@pytest.mark.parametrize("correlation", [pytest.param(0.0, marks=pytest.mark.slow), 0.6])
def test_every_epsilon_has_weak_order_one_and_the_law_of_the_data(name, epsilon, correlation):
    field = ExactField(INTERPOLANTS[name], SOURCE, DATA, correlation)
    found = [moments_at_the_end(field, epsilon, steps) for steps in (800, 1600)]
    for coarse, fine, exact in zip(*found, (-1.1, 1.7**2), strict=True):
        if abs(coarse - exact) < 1e-12:
            # the mean moves in a straight line, on which Euler is exact
            assert name == "linear" and exact == -1.1 and abs(fine - exact) < 1e-12
            continue
        assert math.log2((coarse - exact) / (fine - exact)) == pytest.approx(1, abs=0.05)
        # extrapolated to no step at all, the law is the data's whatever epsilon is
        assert 2 * fine - coarse == pytest.approx(exact, abs=3e-5)


MIXED = Law((0.5, 0.5), (-1.0, 1.2), (0.3, 0.5)), Law((0.3, 0.7), (-1.0, 0.8), (0.2, 0.35))


@every
@pytest.mark.parametrize("epsilon", [None, *EPSILONS.values()], ids=["ode", *EPSILONS])
def test_marginals_from_mixture_to_mixture(name, epsilon):
    n, steps, half = 20_000, 200, {}
    interpolant = INTERPOLANTS[name]
    field, draw = ExactField(interpolant, *MIXED), torch.Generator().manual_seed(1)
    x = MIXED[0].draw(n, draw).reshape(n // 100, 100)

    def keep(k, tau, x):
        if k == steps // 2:
            half["x"], half["tau"] = x, tau

    if epsilon is None:
        end = transport_ode(field, x, times(steps), on_step=keep)
    else:
        rng = SampleRNG(range(n // 100))
        end = transport_sde(field, interpolant, x, times(steps), epsilon=epsilon, rng=rng, on_step=keep)
    a, b = interpolant.path(half["tau"])
    g, _ = interpolant.latent(half["tau"])
    between = a * MIXED[0].draw(n, draw) + b * MIXED[1].draw(n, draw)
    between = between + g * torch.randn(n, generator=draw, dtype=D64)
    for got, real in ((end.reshape(-1), MIXED[1].draw(n, draw)), (half["x"].reshape(-1), between)):
        v = float(real.var())
        # both sides are samples: twice the variance of one
        assert abs(float(got.mean() - real.mean())) < 4 * math.sqrt(2 * v / n) + 0.005
        assert abs(float(got.var()) / v - 1) < 4 * math.sqrt(4 / n) + 0.01
        assert stats.ks_2samp(got.numpy(), real.numpy()).pvalue > 1e-4


def test_no_epsilon_is_eulers_method_and_draws_nothing():
    field = ExactField(INTERPOLANTS["linear"], SOURCE, DATA)
    x = expected = torch.linspace(-2, 2, 9, dtype=D64)[:, None]
    for k in range(10):
        expected = expected + 0.1 * field(expected, torch.tensor(k / 10, dtype=D64))[0]
    found = transport_sde(
        field, field.interpolant, x, times(10), epsilon=VanishingNoise(scale=0.0), rng=Noises([])
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_from_gaussian_noise_it_ends_where_our_samplers_end():
    problem = mixture_1d(PROCESSES["rf"])

    def field(x, tau, cond):
        x0 = problem(x, 2 * torch.log(tau / (1 - tau)))
        # the velocity x0 - eps with eps from x = (1 - tau) eps + tau x0
        return x0 - (x - tau[:, None] * x0) / (1 - tau[:, None]), None

    x, almost = torch.linspace(-2, 2, 9, dtype=D64)[:, None], 1 - 1 / 1500
    ours, seen = transport_ode(field, x, times(1499, end=almost)), {}
    Heun()(problem, x, uniform_time(1500), on_step=lambda k, logsnr, x, x0: seen.__setitem__(k, (logsnr, x)))
    logsnr, theirs = seen[1498]
    assert float(RectifiedFlow()(logsnr)[0]) == pytest.approx(almost)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_eight_are_three_and_five():
    field = ExactField(INTERPOLANTS["linear"], *MIXED)
    for dtype in (torch.float32, D64):

        def ends(seeds, dtype=dtype):
            rng = SampleRNG(seeds)
            x = rng.randn((1,), dtype=dtype)

            def asked(x, tau, cond):
                v, xi = field(x.to(D64), tau, cond)
                return v.to(x.dtype), xi.to(x.dtype)

            return transport_sde(asked, field.interpolant, x, times(20), epsilon=VanishingNoise(), rng=rng)

        whole, parts = ends(range(8)), [ends(range(3)), ends(range(3, 8))]
        assert whole.dtype == dtype and torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("bad", [[0.0], [0.5, 0.5], [0.0, 1.1], [-0.1, 1.0], [1.0, 0.0]])
def test_bad_times_are_refused(bad):
    field = ExactField(INTERPOLANTS["linear"], SOURCE, DATA)
    with pytest.raises(ValueError, match="times"):
        transport_ode(field, torch.zeros(1, 1, dtype=D64), torch.tensor(bad))


@pytest.mark.parametrize(
    ("noise", "epsilon"), [(0.7, lambda tau: tau + 0.1), (0.0, VanishingNoise()), (0.7, lambda tau: -tau)]
)
def test_epsilon_that_has_no_score_is_refused(noise, epsilon):
    interpolant = StochasticInterpolant(path=LinearPath(), noise=noise)
    field = ExactField(interpolant, SOURCE, DATA)
    with pytest.raises(ValueError, match="epsilon"):
        transport_sde(
            field, interpolant, torch.zeros(1, 1, dtype=D64), times(4), epsilon=epsilon, rng=SampleRNG([0])
        )


def test_a_field_without_xi_has_no_sde():
    interpolant = INTERPOLANTS["linear"]
    with pytest.raises(ValueError, match="xi"):
        transport_sde(
            lambda x, tau, cond: (x, None),
            interpolant,
            torch.zeros(1, 1, dtype=D64),
            times(4),
            epsilon=VanishingNoise(),
            rng=SampleRNG([0]),
        )
    with pytest.raises(ValueError, match="scale"):
        VanishingNoise(scale=-1.0)
