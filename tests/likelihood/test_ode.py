"""The ODE likelihood against closed forms: Gaussian and mixture data in four processes, float64."""

import math

import pytest
import torch
from problems import D64, INTERPOLANTS, mixture_1d

from diffusion_lab.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lab.likelihood.ode import ODELikelihood, divergence_of, draw_probes, standard_normal
from diffusion_lab.process import VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import CountingDenoiser

pytest.importorskip("torchode")


class SubVP:
    """alpha = e^(-B/2), sigma = 1 - alpha²: score-SDE's third process. a = s (1 - a²) for s = alpha / sigma."""

    def __call__(self, logsnr):
        r, s = torch.exp(-0.5 * logsnr), torch.exp(0.5 * logsnr)
        return 2 / (r + torch.sqrt(r**2 + 4)), 2 / (1 + torch.sqrt(1 + 4 * s**2))


PROCESSES = {**INTERPOLANTS, "sub_vp": SubVP()}
every = pytest.mark.parametrize("name", PROCESSES)
VP = VariancePreserving()
LOW, HIGH = -26.0, 22.0


def ode(**options):
    return ODELikelihood(
        **{
            "logsnr_min": LOW,
            "logsnr_max": HIGH,
            "rtol": 1e-7,
            "atol": 1e-7,
            "divergence": "exact",
            **options,
        }
    )


def rng(n, first=0):
    return SampleRNG(range(first, first + n))


def test_sub_vp_is_the_process_of_the_paper():
    B = torch.tensor([1e-4, 0.5, 3.0, 10.0], dtype=D64)
    alpha, sigma = SubVP()(2 * torch.log(torch.exp(-B / 2) / (1 - torch.exp(-B))))
    torch.testing.assert_close(alpha, torch.exp(-B / 2), rtol=1e-9, atol=0)
    torch.testing.assert_close(sigma, 1 - torch.exp(-B), rtol=1e-9, atol=0)
    assert bool((sigma**2 <= 1 - torch.exp(-B)).all())  # its variance is below that of VP


@every
def test_gaussian_data(name):
    c, y = 0.7, math.sqrt(0.7) * torch.tensor([[1.0, -1.0], [0.3, 2.0]], dtype=D64)
    truth = (-0.5 * (y**2 / c + math.log(2 * math.pi * c))).sum(1)
    denoiser = GaussianDenoiser(
        mean=torch.zeros(2, dtype=D64), covariance=torch.tensor(c, dtype=D64), interpolant=PROCESSES[name]
    )
    found = ode()(denoiser, y)
    assert float((found.log_density - truth).abs().max()) / 2 < 1e-5
    # and the ODE maps y to sqrt(V1 / V0) y
    v1, v0 = (1 + (c - 1) / (1 + math.exp(-level)) for level in (LOW, HIGH))
    z0 = y / math.sqrt(1 + math.exp(-HIGH))
    torch.testing.assert_close(found.latent, z0 * math.sqrt(v1 / v0), rtol=0, atol=1e-5)


def test_noisy_data_have_the_density_of_noisy_data():
    # at log-SNR 1 the noise has 0.37 of the unit of the data: y ~ N(0, c + 0.37), y being x / alpha
    c, y = 0.7, torch.tensor([[0.4], [-1.3]], dtype=D64)
    denoiser = GaussianDenoiser(
        mean=torch.zeros(1, dtype=D64), covariance=torch.tensor(c, dtype=D64), interpolant=INTERPOLANTS["ve"]
    )
    total = c + math.exp(-1.0)
    truth = (-0.5 * (y**2 / total + math.log(2 * math.pi * total))).sum(1)
    found = ode(logsnr_max=1.0)(denoiser, y).log_density
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)


@every
def test_a_full_covariance(name):
    g = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=g, dtype=D64)
    covariance, mean = (
        root @ root.T + 0.1 * torch.eye(3, dtype=D64),
        torch.tensor([0.5, -1.0, 2.0], dtype=D64),
    )
    law = torch.distributions.MultivariateNormal(mean, covariance)
    y = mean + torch.randn(4, 3, generator=g, dtype=D64) @ root.T
    denoiser = GaussianDenoiser(mean=mean, covariance=covariance, interpolant=PROCESSES[name])
    found = ode()(denoiser, y)
    assert float((found.log_density - law.log_prob(y)).abs().max()) / 3 < 1e-4


@every
def test_mixture_data(name):
    y = torch.linspace(-1.6, 1.8, 12, dtype=D64)[:, None]
    denoiser = mixture_1d(PROCESSES[name])
    truth = denoiser.log_density(y, torch.tensor(math.inf, dtype=D64))
    found = ode()(denoiser, y)
    assert float((found.log_density - truth).abs().max()) < 1e-4
    # told the class, the class's own density
    cond = {"label": torch.zeros(12, dtype=torch.int64)}
    of_class = denoiser.log_density(y, torch.tensor(math.inf, dtype=D64), cond)
    assert float((ode()(denoiser, y, cond=cond).log_density - of_class).abs().max()) < 1e-4


def test_the_nominal_prior_costs_what_the_page_says_and_the_true_one_nothing():
    c, low = 0.7, -2.0
    denoiser = GaussianDenoiser(
        mean=torch.zeros(1, dtype=D64), covariance=torch.tensor(c, dtype=D64), interpolant=VP
    )
    # the mean over the data of a quadratic, at the two nodes of Gauss-Hermite
    y = math.sqrt(c) * torch.tensor([[1.0], [-1.0]], dtype=D64)
    truth = -0.5 * (1 + math.log(2 * math.pi * c))
    v = 1 + (c - 1) / (1 + math.exp(-low))

    def exact_prior(z):
        return (-0.5 * (z**2 / v + math.log(2 * math.pi * v))).sum(1)

    nominal = float(ode(logsnr_min=low)(denoiser, y).log_density.mean())
    exact = float(ode(logsnr_min=low)(denoiser, y, log_prior=exact_prior).log_density.mean())
    assert exact == pytest.approx(truth, abs=1e-6)
    assert truth - nominal == pytest.approx((v - 1) ** 2 / 4, rel=0.05)


def test_one_number_in_every_process():
    y = torch.linspace(-1.0, 1.0, 5, dtype=D64)[:, None]
    values = [ode()(mixture_1d(process), y).log_density for process in PROCESSES.values()]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=0, atol=1e-9)


def test_fixed_steps_converge_with_order_four():
    y = torch.linspace(-1.2, 1.2, 7, dtype=D64)[:, None]
    denoiser = mixture_1d(VP)
    ends = {"logsnr_min": -10.0, "logsnr_max": 10.0}
    truth = ode(rtol=1e-11, atol=1e-11, **ends)(denoiser, y).log_density
    errors = []
    for steps in (40, 80, 160):
        found = ode(steps=steps, **ends)(denoiser, y)
        errors.append(float((found.log_density - truth).abs().max()))
        assert found.calls.tolist() == [4 * steps] * 7
    assert errors[-1] < 1e-5 and math.log2(errors[-2] / errors[-1]) > 3.6


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "heun"])
def test_tighter_tolerances_err_less_and_calls_are_counted(method):
    y = torch.tensor([[0.4]], dtype=D64)
    denoiser = mixture_1d(VP)
    truth = float(denoiser.log_density(y, torch.tensor(math.inf, dtype=D64)))
    errors, calls = [], []
    for tolerance in (1e-2, 1e-4):  # of a step, not of the whole way
        counting = CountingDenoiser(denoiser)
        found = ode(rtol=tolerance, atol=tolerance, method=method)(counting, y)
        assert abs(counting.calls - int(found.calls)) <= 1
        errors.append(abs(float(found.log_density) - truth))
        calls.append(counting.calls)
    assert errors[1] < min(0.1 * errors[0], 2e-3) and calls[1] > calls[0]


# ---- the divergence ------------------------------------------------------------------------------------------


def correlated(dim=6):
    g = torch.Generator().manual_seed(2)
    return GaussianMixtureDenoiser(
        means=torch.randn(4, dim, generator=g, dtype=D64),
        variances=torch.full((4,), 0.3, dtype=D64),
        weights=torch.ones(4, dtype=D64),
        interpolant=VP,
    )


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinsons_mean_is_the_exact_divergence(noise):
    denoiser, n = correlated(), 4000
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(3), dtype=D64)
    level = torch.tensor([0.5], dtype=D64)
    jacobian = torch.autograd.functional.jacobian(lambda x: denoiser(x, level)[0], x)[:, 0]
    trace = float(jacobian.diagonal().sum())
    z = x.expand(n, 6).clone().requires_grad_()
    probes = draw_probes(noise, 1, z.shape, rng(n))
    estimates = divergence_of(denoiser(z, level.expand(n)), z, probes)
    error = float(estimates.std()) / math.sqrt(n)
    assert error > 0 and abs(float(estimates.mean()) - trace) < 4 * error and error < 0.02 * trace
    # and its variance is the one known: 2 (|J|² - |diag|²) for signs, 2 |J|² for normal numbers (J symmetric)
    square = float(jacobian.square().sum())
    expected = 2 * (square - (float(jacobian.diagonal().square().sum()) if noise == "rademacher" else 0.0))
    assert float(estimates.var()) == pytest.approx(expected, rel=0.15)


def test_the_estimated_density_has_the_exact_one_as_its_mean():
    denoiser, n = correlated(), 600
    y = torch.randn(1, 6, generator=torch.Generator().manual_seed(4), dtype=D64)
    exact = ode(rtol=1e-6, atol=1e-6)(denoiser, y)
    many = ode(divergence="hutchinson", rtol=1e-6, atol=1e-6)(denoiser, y.expand(n, 6), rng=rng(n))
    error = float(many.log_density.std()) / math.sqrt(n)
    assert 0 < error and abs(float(many.log_density.mean() - exact.log_density)) < 4 * error
    torch.testing.assert_close(many.latent, exact.latent.expand(n, 6), rtol=0, atol=1e-4)
    # four probes a solve: a quarter of the variance
    four = ode(divergence="hutchinson", probes=4, steps=60)(denoiser, y.expand(n, 6), rng=rng(n))
    assert float(four.log_density.var() / many.log_density.var()) == pytest.approx(0.25, rel=0.3)


def test_normal_probes_are_compared_with_their_own_length():
    # else near clean data, where J is nearly the identity, their length would be all that is measured
    denoiser, n = correlated(), 200
    y = torch.randn(1, 6, generator=torch.Generator().manual_seed(4), dtype=D64).expand(n, 6)
    spread = {
        noise: float(
            ode(divergence="hutchinson", noise=noise, steps=60)(denoiser, y, rng=rng(n)).log_density.std()
        )
        for noise in ("rademacher", "gaussian")
    }
    assert spread["rademacher"] < spread["gaussian"] < 4 * spread["rademacher"]


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_probes_have_mean_zero_and_unit_covariance(noise):
    v = (
        draw_probes(noise, 2, torch.Size((3000, 2)), rng(3000)).permute(1, 0, 2).flatten(1)
    )  # four numbers a sample
    assert float(v.mean(0).abs().max()) < 4 / math.sqrt(3000)
    torch.testing.assert_close(v.T @ v / 3000, torch.eye(4, dtype=D64), rtol=0, atol=0.1)
    assert noise == "gaussian" or set(v.flatten().tolist()) == {-1.0, 1.0}


def test_signs_are_exact_where_dimensions_do_not_meet():
    denoiser = GaussianDenoiser(
        mean=torch.zeros(3, dtype=D64), covariance=torch.tensor([0.2, 1.0, 3.0], dtype=D64), interpolant=VP
    )
    y = torch.tensor([[0.1, -0.5, 2.0]], dtype=D64)
    exact = ode()(denoiser, y).log_density
    signs = ode(divergence="hutchinson")(denoiser, y, rng=rng(1)).log_density
    torch.testing.assert_close(signs, exact, rtol=0, atol=1e-9)


def test_a_sample_does_not_see_its_neighbours():
    denoiser = correlated()
    y = torch.randn(5, 6, generator=torch.Generator().manual_seed(5), dtype=D64)
    solver = ode(divergence="hutchinson", rtol=1e-5, atol=1e-5)
    whole = solver(denoiser, y, rng=rng(5))
    apart = torch.cat([solver(denoiser, y[k : k + 1], rng=rng(1, k)).log_density for k in range(5)])
    torch.testing.assert_close(whole.log_density, apart, rtol=0, atol=1e-9)
    assert len(set(whole.calls.tolist())) > 1  # each with steps of its own


def test_images_and_single_precision():
    means = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(6))
    single = GaussianMixtureDenoiser(
        means=means, variances=torch.full((3,), 0.2), weights=torch.ones(3), interpolant=VP
    )
    y = means + 0.1
    truth = single.log_density(y.double(), torch.tensor(math.inf, dtype=D64))
    found = ode(rtol=1e-5, atol=1e-5, logsnr_max=14.0)(single, y)
    assert found.latent.shape == (3, 1, 2, 2) and found.log_density.dtype == D64
    assert float((found.log_density - truth).abs().max()) / 4 < 1e-4


def test_the_standard_normal():
    z = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(7), dtype=D64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(standard_normal(z), expected)


def test_misuse_is_named():
    for wrong in (
        {"logsnr_min": 3.0, "logsnr_max": 2.0}, {"logsnr_max": math.inf}, {"rtol": 0.0, "atol": 0.0}, {"rtol": -1.0},
        {"method": "rk45"}, {"divergence": "none"}, {"noise": "uniform"}, {"probes": 0}, {"steps": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            ode(**wrong)
    y = torch.zeros(2, 1, dtype=D64)
    with pytest.raises(ValueError, match="rng="):
        ode(divergence="hutchinson")(mixture_1d(VP), y)
    with pytest.raises(RuntimeError, match="REACHED_MAX_STEPS"):
        ode(max_steps=2)(mixture_1d(VP), y)
