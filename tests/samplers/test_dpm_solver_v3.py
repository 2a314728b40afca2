"""DPM-Solver-v3: its special cases, its statistics, its orders, and exactness on Gaussian data."""

import math

import laws
import numpy as np
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, gaussian, mixture_1d
from safetensors.torch import save_file
from scipy.integrate import quad

from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, CountingDenoiser
from diffusion_lab.samplers.dpm_solver_v3 import DPMSolverV3
from diffusion_lab.samplers.dpm_solver_v3_statistics import Statistics, constant, estimate
from diffusion_lab.samplers.grids import uniform_logsnr, uniform_u

NOISE, DATA = constant(0.0, -1.0, 0.0), constant(1.0, 0.0, 0.0)
LEVELS = torch.linspace(-10, 10, 201, dtype=D64)


@pytest.fixture(scope="module")
def fitted():
    """Statistics of the 1-D mixture, from 250 of its samples."""
    draw = torch.Generator().manual_seed(0)
    first = torch.rand(250, 1, generator=draw) < 0.3
    x0 = torch.where(first, -1.0, 0.8).to(D64)
    x0 = x0 + torch.where(first, 0.2, 0.35) * torch.randn(250, 1, generator=draw, dtype=D64)
    return estimate(mixture_1d(INTERPOLANTS["vp"]), x0, LEVELS, rng=SampleRNG(range(250)))


# ---- special cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [NOISE, DATA], ids=["noise", "data"])
def test_first_order_noise_and_data_prediction_are_ddim(statistics):
    sampler = DPMSolverV3(order=1, corrector=False, statistics=statistics)
    for interpolant in INTERPOLANTS.values():
        torch.testing.assert_close(
            laws.run(sampler, interpolant), laws.run(DDIM(), interpolant), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("statistics", "data"), [(NOISE, False), (DATA, True)], ids=["noise", "data"])
def test_second_order_noise_and_data_prediction_extrapolate_linearly_in_lam(statistics, data):
    # dy/dlam = -e^-lam eps and, with data prediction, d(e^lam y)/dlam = e^lam x0, along the line through two outputs
    vp = INTERPOLANTS["vp"]
    problem, grid = mixture_1d(vp), torch.tensor([-3.0, -1.6, 0.5, math.inf], dtype=D64)
    seen = []
    x = torch.tensor([[0.7]], dtype=D64)
    DPMSolverV3(order=2, corrector=False, statistics=statistics)(
        problem, x, grid, on_step=lambda k, logsnr, x, x0: seen.append((float(x), float(x0)))
    )
    (x1, first), (x2, second), _ = seen
    a, s = ([float(c) for c in of] for of in vp(grid))
    lam = (grid / 2).tolist()
    outputs = [first, second] if data else [(0.7 - a[0] * first) / s[0], (x1 - a[1] * second) / s[1]]

    def line(at):
        return outputs[1] + (at - lam[1]) * (outputs[1] - outputs[0]) / (lam[1] - lam[0])

    if data:
        integral, _ = quad(lambda at: math.exp(at) * line(at), lam[1], lam[2], epsabs=1e-14)
        expected = a[2] * math.exp(-lam[2]) * (math.exp(lam[1]) * x1 / a[1] + integral)
    else:
        integral, _ = quad(lambda at: math.exp(-at) * line(at), lam[1], lam[2], epsabs=1e-14)
        expected = a[2] * (x1 / a[1] - integral)
    assert x2 == pytest.approx(expected, abs=1e-12)


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_statistics_of_gaussian_data_are_exact(interpolant):
    c, draw = 0.3, torch.Generator().manual_seed(0)
    x0 = math.sqrt(c) * torch.randn(50, 3, generator=draw, dtype=D64)
    found = estimate(gaussian(interpolant, c, dim=3), x0, LEVELS, rng=SampleRNG(range(50)))
    snr = torch.exp(LEVELS)[:, None]
    torch.testing.assert_close(found.l, (1 / (1 + c * snr)).expand(-1, 3), rtol=0, atol=1e-12)
    # f vanishes, and with it what could follow it
    assert float(found.s.abs().max()) == 0.0 and float(found.b.abs().max()) < 1e-2


@pytest.mark.parametrize("levels", [201, pytest.param(2001, marks=pytest.mark.slow)])
def test_one_step_on_gaussian_data_is_exact(levels):
    c, vp = 0.3, INTERPOLANTS["vp"]
    problem, grid = gaussian(vp, c), torch.linspace(-10, 10, levels, dtype=D64)
    statistics = estimate(problem, torch.ones(4, 1, dtype=D64), grid, rng=SampleRNG(range(4)))
    seen = []
    x, steps = torch.ones(1, 1, dtype=D64), torch.tensor([-2.0, 1.0, math.inf], dtype=D64)
    DPMSolverV3(order=1, statistics=statistics)(problem, x, steps, on_step=lambda k, l, x, x0: seen.append(x))
    (a, s), (a2, s2) = vp(steps[0]), vp(steps[1])
    # l is linear between levels d apart: within d^2 / 8 of a logistic, whose second derivative is below 0.1, over a
    # step of 1.5 in lam
    d = 20 / (levels - 1)
    exact = float(torch.sqrt((a2**2 * c + s2**2) / (a**2 * c + s**2)))
    assert float(seen[0]) == pytest.approx(exact, rel=1.5 * 0.1 * d**2 / 8)


@pytest.mark.slow
def test_s_and_b_are_the_regression_of_the_derivative_of_f(fitted):
    # f' by finite differences along the ODE, from Heun steps too small to matter
    vp, problem, index = INTERPOLANTS["vp"], mixture_1d(INTERPOLANTS["vp"]), 90
    draw = torch.Generator().manual_seed(5)
    first = torch.rand(200_000, 1, generator=draw) < 0.3
    x0 = torch.where(first, -1.0, 0.8).to(D64)
    x0 = x0 + torch.where(first, 0.2, 0.35) * torch.randn(200_000, 1, generator=draw, dtype=D64)
    logsnr = LEVELS[index]
    alpha, sigma = vp(logsnr)
    y = (alpha * x0 + sigma * torch.randn(200_000, 1, generator=draw, dtype=D64)) / alpha

    def eps(y, lam):
        a, s = vp(2 * lam)
        return (a * y - a * problem(a * y, (2 * lam).expand(len(y)))) / s

    def f(y, lam):
        l = fitted(2 * lam.reshape(1))[0][0]
        return torch.exp(-lam) * eps(y, lam) - l * y

    def move(y, lam, h):
        slope = -torch.exp(-lam) * eps(y, lam)
        return y + h / 2 * (slope - torch.exp(-lam - h) * eps(y + h * slope, lam + h))

    # half the distance of two levels, where the interpolated l has the slope of central differences
    lam, h = logsnr / 2, float(LEVELS[1] - LEVELS[0]) / 2
    fs = f(y, lam).ravel()
    slope = (f(move(y, lam, h), lam + h) - f(move(y, lam, -h), lam - h)).ravel() / (2 * h)
    s, b = np.polyfit(fs.numpy(), slope.numpy(), 1)
    assert float(fitted.s[index]) == pytest.approx(s, abs=0.05) and float(fitted.b[index]) == pytest.approx(
        b, abs=0.05
    )
    assert abs(s) > 0.3, "the test would pass with s = 0"


def test_statistics_do_not_depend_on_the_interpolant():
    x0 = torch.linspace(-2, 2, 300, dtype=D64)[:, None]
    all_of_them = [
        estimate(mixture_1d(interpolant), x0, LEVELS[::20], rng=SampleRNG(range(300)))
        for interpolant in INTERPOLANTS.values()
    ]
    for other in all_of_them[1:]:
        for name, value in other.tensors().items():
            torch.testing.assert_close(value, all_of_them[0].tensors()[name], rtol=1e-8, atol=1e-8)


def test_statistics_between_and_beyond_their_levels():
    line = Statistics(
        logsnr=torch.tensor([0.0, 1.0, 3.0], dtype=D64),
        **{name: torch.tensor([[0.0], [1.0], [3.0]], dtype=D64) for name in "lsb"},
    )
    l, _, _ = line(torch.tensor([-1.0, 0.25, 2.0, 9.0], dtype=D64))
    assert l.ravel().tolist() == [0.0, 0.25, 2.0, 3.0]


# ---- the solver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("statistics", ["noise", "data", "fitted"])
def test_laws(order, corrector, statistics, fitted):
    chosen = {"noise": NOISE, "data": DATA, "fitted": fitted}[statistics]
    laws.check_everything(DPMSolverV3(order=order, corrector=corrector, statistics=chosen))


@pytest.fixture(scope="module")
def smooth():
    """Statistics without kinks, so that the order is the solver's and not that of the interpolation between levels."""
    levels = torch.linspace(-10, 10, 20_001, dtype=D64)[:, None]
    return Statistics(
        logsnr=levels[:, 0],
        l=torch.sigmoid(-levels),
        s=-0.5 * torch.sigmoid(levels),
        b=0.2 * torch.sin(levels),
    )


@pytest.mark.parametrize(
    ("order", "corrector", "nominal"),
    [*(pytest.param(n, False, n, marks=pytest.mark.slow) for n in (1, 2)), (1, True, 2), (2, True, 3)],
)
@pytest.mark.parametrize(
    "statistics", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("noise", "data")), "smooth"]
)
def test_order_of_convergence(order, corrector, nominal, statistics, smooth):
    chosen = {"noise": NOISE, "data": DATA, "smooth": smooth}[statistics]
    laws.check_order(DPMSolverV3(order=order, corrector=corrector, statistics=chosen), nominal)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("statistics", ["noise", "data", "smooth"])
def test_order_of_a_step_from_an_exact_history(order, statistics, smooth):
    chosen = {"noise": NOISE, "data": DATA, "smooth": smooth}[statistics]
    laws.check_local_order(DPMSolverV3(order=order, corrector=False, statistics=chosen), order)


@pytest.mark.slow
def test_fitted_beats_noise_and_data_prediction_in_few_steps(fitted):
    vp, grid = INTERPOLANTS["vp"], uniform_logsnr(-10.0, 10.0, 9)
    exact = laws.run(
        DPMSolverV3(order=3, statistics=DATA), vp, range(200), grid=uniform_logsnr(-10.0, 10.0, 4000)
    )
    error = {
        name: float(
            (laws.run(DPMSolverV3(order=2, statistics=of), vp, range(200), grid=grid) - exact).abs().mean()
        )
        for name, of in (("noise", NOISE), ("data", DATA), ("fitted", fitted))
    }
    assert error["fitted"] < min(error["noise"], error["data"]), error


def test_one_call_a_step():
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]))
    DPMSolverV3(statistics=DATA)(counting, torch.zeros(2, 1, dtype=D64), laws.GRID)
    assert counting.calls == len(laws.GRID) - 1


def test_fit_save_and_recall(tmp_path):
    problem, x0 = gaussian(INTERPOLANTS["vp"], 0.5, dim=2), torch.ones(6, 2)
    seen = []
    unfitted = DPMSolverV3(levels=5, logsnr_min=-4.0, logsnr_max=4.0)
    tensors = unfitted.fit(
        problem, x0.double(), None, SampleRNG(range(6)), lambda done, of: seen.append((done, of))
    )
    assert seen[-1] == (5, 5) and not unfitted.fitted
    save_file(tensors, tmp_path / "statistics.safetensors")
    recalled = DPMSolverV3(statistics=str(tmp_path / "statistics.safetensors"))
    direct = DPMSolverV3(statistics=Statistics.of(tensors))
    x, grid = torch.ones(3, 2, dtype=D64), uniform_u(PURE_COSINE, 6)
    assert recalled.fitted and torch.equal(recalled(problem, x, grid), direct(problem, x, grid))
    with pytest.raises(ValueError, match="fit it first"):
        unfitted(problem, x, grid)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="order"):
        DPMSolverV3(order=4)
    with pytest.raises(ValueError, match="three"):
        estimate(gaussian(INTERPOLANTS["vp"], 1.0), torch.ones(2, 1), LEVELS[:2], rng=SampleRNG([0, 1]))
