"""Covariance-aware sampling: exact steps on Gaussian data, the estimate, its legal range, networks with attention."""

import itertools
import math
from dataclasses import dataclass

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE
from torch.func import jacrev

from diffusion_lab.denoisers import GaussianDenoiser, GaussianMixtureDenoiser, NetworkDenoiser, V
from diffusion_lab.forward_mode import is_dual
from diffusion_lab.networks import UNet
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, CountingDenoiser
from diffusion_lab.samplers.base import BoundDenoiser
from diffusion_lab.samplers.covariance import CovarianceAware, jacobian_product
from diffusion_lab.samplers.covariance_structures import (
    Blocks,
    CovarianceStructure,
    Lanczos,
    Scalar,
    WholeImage,
    band_means,
    signs_like,
)
from diffusion_lab.samplers.dct import block_idct, dct, dct_matrix, idct
from diffusion_lab.samplers.grids import uniform_logsnr, uniform_u

NAMES = ("full", "block", "scalar", "lanczos")
VP = INTERPOLANTS["vp"]
LEVEL, NEXT = torch.tensor(-1.5, dtype=D64), torch.tensor(2.5, dtype=D64)


class Noises:
    """Stands for SampleRNG: given signs and given noises in turn."""

    def __init__(self, signs=None, noises=None):
        self.signs, self.noises = signs, None if noises is None else iter(noises)

    def rand(self, shape, dtype=torch.float32, device="cpu"):
        full = self.signs if self.signs.ndim > len(shape) else self.signs[None]
        return torch.where(full > 0, 0.25, 0.75)

    def randn_like(self, x):
        return next(self.noises)


def spectrum(*shape, seed=0):
    return 0.1 + 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


class Coloured:
    """Exact denoiser of Gaussian data with independent entries of variance `S` in a basis."""

    def __init__(self, structure, S, interpolant=VP):
        self.structure, self.S, self.interpolant = structure, S, interpolant

    def __call__(self, x, logsnr, cond=None):
        alpha, sigma = self.interpolant(logsnr.reshape(-1)[0])
        y = self.structure.to_basis(x)
        return self.structure.from_basis(alpha * self.S / (alpha**2 * self.S + sigma**2) * y)


def posterior_variance(S, logsnr):
    return 1 / (1 / S + torch.exp(logsnr))


# each structure with data of its own covariance, as exact as it assumes
CASES = {
    "full": (WholeImage(), spectrum(3, 6, 8), (3, 6, 8)),
    "channels": (WholeImage(channels=True), spectrum(1, 6, 8), (3, 6, 8)),
    "bands": (WholeImage(bands=True), band_means(spectrum(3, 6, 8)), (3, 6, 8)),
    "block": (Blocks(size=4), spectrum(3, 1, 1, 4, 4), (3, 8, 4)),
    "block_channels": (Blocks(size=2, channels=True), spectrum(1, 1, 1, 2, 2), (3, 4, 6)),
    "scalar": (Scalar(), spectrum(1, 1, 1), (3, 6, 8)),
    "vector": (WholeImage(), spectrum(7), (7,)),
    "block_of_a_vector": (Blocks(size=3), spectrum(7), (7,)),
    "scalar_of_a_vector": (Scalar(), spectrum(1), (7,)),
}
cases = pytest.mark.parametrize(("structure", "S", "shape"), CASES.values(), ids=CASES.keys())


def basis(structure, shape):
    """Rows: the vectors of the basis, as samples."""
    n = math.prod(shape)
    like = structure.to_basis(torch.zeros(1, *shape, dtype=D64))
    return structure.from_basis(torch.eye(n, dtype=D64).reshape(n, *like.shape[1:]))


# ---- the laws of every sampler ---------------------------------------------------------------------------------------


# the other structures have their files in conf/sampler, which test_samplers.py takes through the laws
@pytest.mark.parametrize(
    "options",
    [
        {"structure": "lanczos", "products": 2},
        {"prior_variance": 0.9, "limit": 1.0},
        {"noise": 0.5, "bands": True, "channels": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_laws_with_options(options):
    laws.check_everything(CovarianceAware(**options))


@pytest.mark.parametrize(
    "sampler",
    [
        CovarianceAware(),
        pytest.param(CovarianceAware(structure="scalar", prior_variance=0.9), marks=pytest.mark.slow),
        pytest.param(CovarianceAware(structure="lanczos", products=2), marks=pytest.mark.slow),
    ],
    ids=["full", "scalar", "lanczos"],
)
def test_marginals(sampler):
    laws.check_marginals(sampler)


@pytest.mark.parametrize("structure", [WholeImage(bands=True), Blocks(size=4), Scalar(), Lanczos(products=2)])
def test_an_image_does_not_depend_on_its_batch(structure):
    problem = Coloured(WholeImage(), spectrum(3, 8, 8).float())
    sampler, grid = CovarianceAware(structure=structure, prior_variance=1.0), uniform_u(PURE_COSINE, 4)

    def run(seeds):
        rng = SampleRNG(seeds)
        return sampler(problem, rng.randn((3, 8, 8)), grid, rng=rng)

    parts = torch.cat([run(range(3)), run(range(3, 8))])
    assert parts.dtype == torch.float32
    torch.testing.assert_close(run(range(8)), parts, rtol=0, atol=1e-5)


# ---- exactness on Gaussian data --------------------------------------------------------------------------------------


@cases
def test_one_probe_gives_the_posterior_variance(structure, S, shape):
    for name, interpolant in INTERPOLANTS.items():
        problem, (alpha, sigma) = Coloured(structure, S, interpolant), interpolant(LEVEL)
        x, seen = alpha * torch.ones(4, *shape, dtype=D64), []

        def product(u, problem=problem, x=x, scale=sigma**2 / alpha):
            x0, Ju = jacobian_product(problem, x, LEVEL, u)
            return x0, scale * Ju

        structure.draw(product, x, SampleRNG(range(4)), lambda d, seen=seen: seen.append(d) or d.clamp_min(0))
        expected = posterior_variance(S, LEVEL).expand_as(seen[0])
        torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=0, msg=name)


@cases
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_grid_ends_with_the_variance_of_the_data(structure, S, shape, steps):
    """A step is linear in x and in its noise: gains and noises are read off, and variances propagated, exactly."""
    sampler = CovarianceAware(structure=structure, prior_variance=S, final_noise=True)
    vectors = basis(structure, shape)
    n = len(vectors)
    signs = signs_like(structure.to_basis(vectors), SampleRNG(range(n)))
    for name, grid in (("vp", uniform_u(PURE_COSINE, steps)), ("ve", uniform_logsnr(-3.0, 4.0, steps))):
        problem = Coloured(structure, S, INTERPOLANTS[name])
        total = S.expand_as(structure.to_basis(vectors)[0]).flatten()
        alpha, sigma = problem.interpolant(grid[0])
        variance = alpha**2 * total + sigma**2
        for now, then in itertools.pairwise(grid):
            denoiser = BoundDenoiser(problem, None)
            moved, _ = sampler.step(denoiser, vectors, now, then, None, Noises(signs, [0 * vectors]))
            added, _ = sampler.step(denoiser, 0 * vectors, now, then, None, Noises(signs, [vectors]))
            gain, noise = (structure.to_basis(out).reshape(n, n) for out in (moved, added))
            for matrix in (gain, noise):
                torch.testing.assert_close(matrix, torch.diag(matrix.diag()), rtol=0, atol=1e-12)
            variance = gain.diag() ** 2 * variance + noise.diag() ** 2
            alpha, sigma = problem.interpolant(then)
            torch.testing.assert_close(variance, alpha**2 * total + sigma**2, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance, total, rtol=1e-12, atol=0)


def test_sampled_variance_is_that_of_the_data():
    S, n = spectrum(1, 4, 4), 4000
    sampler = CovarianceAware(prior_variance=S, final_noise=True)
    rng = SampleRNG(range(n))
    x = sampler(
        Coloured(WholeImage(), S), rng.randn((1, 4, 4), dtype=D64), uniform_u(PURE_COSINE, 2), rng=rng
    )
    found = (dct(x, axes=2) ** 2).mean(0)
    # sixteen relative errors with standard deviation sqrt(2 / n) = 0.022
    assert float((found / S - 1).abs().max()) < 4 * math.sqrt(2 / n)


def covariance(n, seed=1):
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=D64)
    return A @ A.T / n + 0.05 * torch.eye(n, dtype=D64)


def test_probes_average_to_the_diagonal_and_the_trace():
    """All 64 sign vectors of a space of six dimensions: the expectation itself."""
    S = covariance(6)
    problem = GaussianDenoiser(mean=torch.zeros(6, dtype=D64), covariance=S, interpolant=VP)
    alpha, sigma = VP(LEVEL)
    posterior = torch.linalg.inv(torch.linalg.inv(S) + torch.exp(LEVEL) * torch.eye(6, dtype=D64))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=D64)
    x, zero = torch.ones(64, 6, dtype=D64), torch.zeros(64, 6, dtype=D64)
    for structure in (WholeImage(), Scalar()):
        seen = []

        def product(u):
            x0, Ju = jacobian_product(problem, x, LEVEL, u)
            return x0, sigma**2 / alpha * Ju

        structure.draw(
            product, x, Noises(signs, [zero]), lambda d, seen=seen: seen.append(d) or d.clamp_min(0)
        )
        C = dct_matrix(6)
        diagonal = (C @ posterior @ C.T).diag()
        expected = diagonal if type(structure) is WholeImage else diagonal.mean()[None]
        torch.testing.assert_close(seen[0].mean(0), expected, rtol=1e-12, atol=0)
        assert float(seen[0].std(0).max()) > 1e-3, "this covariance is not diagonal in cosines"


def test_scalar_is_the_mean_of_full():
    S = spectrum(2, 4, 4)
    problem, x, signs = Coloured(WholeImage(), S), torch.zeros(1, 2, 4, 4, dtype=D64), spectrum(2, 4, 4) - 1
    xi = torch.randn(1, 2, 4, 4, dtype=D64, generator=torch.Generator().manual_seed(5))
    sampler = CovarianceAware(structure="scalar")
    found, _ = sampler.step(BoundDenoiser(problem, None), x, LEVEL, NEXT, None, Noises(signs, [xi]))
    c = VP(NEXT)[0] * (1 - torch.exp((LEVEL - NEXT) / 2))
    # x = 0 has the mean 0, and cosines of equal variance are white noise
    torch.testing.assert_close(
        found, c * posterior_variance(S, LEVEL).mean().sqrt() * xi, rtol=1e-12, atol=1e-15
    )


def test_coefficient_of_the_noise_is_ddims():
    for interpolant in INTERPOLANTS.values():
        problem = Coloured(WholeImage(), torch.ones(5, dtype=D64), interpolant)
        xi = torch.ones(1, 5, dtype=D64)
        (a, s), (a2, s2) = interpolant(LEVEL), interpolant(NEXT)
        found, _ = CovarianceAware(noise=0.5).step(
            BoundDenoiser(problem, None), 0 * xi, LEVEL, NEXT, None, Noises(torch.ones(5), [xi])
        )
        expected = 0.5 * (a2 - a * s2 / s) * posterior_variance(torch.ones(()), LEVEL).sqrt()
        torch.testing.assert_close(found, expected * xi, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dim", "products"), [(6, 6), (6, 9), (1, 3)])
def test_lanczos_is_exact_with_as_many_products_as_dimensions(dim, products):
    S = covariance(dim)
    problem = GaussianDenoiser(mean=torch.zeros(dim, dtype=D64), covariance=S, interpolant=VP)
    xi = torch.randn(5, dim, dtype=D64, generator=torch.Generator().manual_seed(2))
    x = torch.zeros(5, dim, dtype=D64)
    counting = CountingDenoiser(problem)
    found, _ = CovarianceAware(structure="lanczos", products=products).step(
        BoundDenoiser(counting, None), x, LEVEL, NEXT, None, Noises(noises=[xi])
    )
    assert counting.calls == dim
    values, vectors = torch.linalg.eigh(S)
    root = vectors @ torch.diag(posterior_variance(values, LEVEL).sqrt()) @ vectors.T
    c = VP(NEXT)[0] * (1 - torch.exp((LEVEL - NEXT) / 2))
    torch.testing.assert_close(found, c * xi @ root, rtol=0, atol=1e-12)


def test_lanczos_converges_and_survives_an_exhausted_space():
    # two different eigenvalues: two products are enough, and the third finds rounding errors; one: it finds zeros
    S = torch.diag(torch.tensor([0.3, 0.3, 2.0, 2.0, 0.3], dtype=D64))
    xi, seen = torch.randn(1, 5, dtype=D64, generator=torch.Generator().manual_seed(2)), []
    for products in (1, 2, 3, 5):
        _, n = Lanczos(products=products).draw(
            lambda u: (u, u @ S), xi, Noises(noises=[xi]), lambda d: d.clamp_min(0)
        )
        seen.append(float((n - xi @ S.sqrt()).abs().max()))
    assert seen[0] > 0.05 and max(seen[1:]) < 1e-12, seen
    _, n = Lanczos(products=5).draw(lambda u: (u, 4 * u), xi, Noises(noises=[xi]), lambda d: d.clamp_min(0))
    torch.testing.assert_close(n, 2 * xi, rtol=0, atol=1e-14)


def test_lanczos_clips_the_eigenvalues():
    S, xi = torch.diag(torch.tensor([-1.0, 3.0, 9.0], dtype=D64)), torch.tensor([[1.0, -2.0, 0.5]], dtype=D64)
    _, n = Lanczos(products=3).draw(lambda u: (u, u @ S), xi, Noises(noises=[xi]), lambda d: d.clamp(0, 4))
    torch.testing.assert_close(n, xi * torch.tensor([0.0, 3.0, 4.0], dtype=D64).sqrt(), rtol=0, atol=1e-13)


# ---- the estimate's legal range --------------------------------------------------------------------------------------


class Linear:
    """A denoiser with a given, possibly impossible, Jacobian, diagonal in cosines: J = alpha d / sigma^2."""

    interpolant = VP

    def __init__(self, d):
        self.d = d

    def __call__(self, x, logsnr, cond=None):
        alpha, sigma = VP(logsnr.reshape(-1)[0])
        axes = 2 if x.ndim == 4 else 1
        return idct(alpha / sigma**2 * self.d * dct(x, axes), axes)


def added_variance(sampler, d, shape):
    """Per entry of the cosine basis, in units of c^2."""
    xi = idct(torch.ones(1, *shape, dtype=D64), 2 if len(shape) == 3 else 1)
    found, _ = sampler.step(
        BoundDenoiser(Linear(d), None), 0 * xi, LEVEL, NEXT, None, Noises(torch.ones(shape), [xi])
    )
    c = VP(NEXT)[0] * (1 - torch.exp((LEVEL - NEXT) / 2))
    return (dct(found, 2 if len(shape) == 3 else 1) / c)[0] ** 2


def test_negative_estimates_are_cut_off_after_averaging():
    d = torch.tensor([3.0, -1.0], dtype=D64).reshape(2, 1, 1)
    close = dict(rtol=0, atol=1e-14)
    apart = added_variance(CovarianceAware(channels=False), d, (2, 1, 1)).flatten()
    torch.testing.assert_close(apart, torch.tensor([3.0, 0.0], dtype=D64), **close)
    shared = added_variance(CovarianceAware(channels=True), d, (2, 1, 1)).flatten()
    torch.testing.assert_close(shared, torch.ones(2, dtype=D64), **close)


def test_large_estimates_are_cut_off():
    d, rho = torch.full((2,), 1e6, dtype=D64), torch.exp(-LEVEL)
    found = added_variance(CovarianceAware(limit=2.0), d, (2,))
    torch.testing.assert_close(found, (2 * rho).expand(2), rtol=1e-12, atol=0)
    S = torch.tensor([0.5, 3.0], dtype=D64)
    found = added_variance(CovarianceAware(limit=2.0, prior_variance=S), d, (2,))
    torch.testing.assert_close(found, 2 * S * rho / (S + rho), rtol=1e-12, atol=0)


def test_modes_far_apart_exceed_the_linear_estimate_at_single_points_only():
    """Why `limit` is not 1: half-way between two points V is a quarter of their squared distance."""
    two = GaussianMixtureDenoiser(
        means=torch.tensor([[-1.0], [1.0]], dtype=D64),
        variances=torch.full((2,), 1e-6, dtype=D64),
        weights=torch.ones(2, dtype=D64),
        interpolant=VP,
    )
    level = torch.tensor(3.0, dtype=D64)
    alpha, sigma = VP(level)
    x = torch.zeros(1, 1, dtype=D64)
    _, Ju = jacobian_product(BoundDenoiser(two, None), x, level, torch.ones_like(x))
    V = float(sigma**2 / alpha * Ju)
    assert abs(V - 1) < 1e-4 and V > 4 * float(torch.exp(-level))


# ---- DDIM, the ends, calls -------------------------------------------------------------------------------------------


def test_without_noise_it_is_ddim_at_ddims_price():
    counting = CountingDenoiser(Coloured(WholeImage(), spectrum(1, 4, 4)))
    x, grid = (
        torch.randn(3, 1, 4, 4, dtype=D64, generator=torch.Generator().manual_seed(1)),
        uniform_u(PURE_COSINE, 6),
    )
    for structure in NAMES:
        found = CovarianceAware(structure=structure, block=2, noise=0.0)(counting, x, grid)
        assert torch.equal(found, DDIM()(counting.denoiser, x, grid))
    assert counting.calls == 6 * len(NAMES)


@pytest.mark.parametrize("prior", [None, 1.5])
def test_pure_noise(prior):
    start, shape = torch.tensor(-math.inf, dtype=D64), (3, 1, 4, 4)
    problem = BoundDenoiser(Coloured(WholeImage(), spectrum(1, 4, 4)), None)
    x, xi = (torch.randn(shape, dtype=D64, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    ddim, _ = DDIM().step(problem, x, start, NEXT, None, None)
    found, _ = CovarianceAware(prior_variance=prior).step(problem, x, start, NEXT, None, Noises(noises=[xi]))
    expected = ddim if prior is None else ddim + VP(NEXT)[0] * math.sqrt(prior) * xi
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def derivatives(structure, grid, products=3, **options):
    """Calls of the denoiser over a grid, with and without a derivative."""
    plain, dual = [], []

    class Watching(Coloured):
        def __call__(self, x, logsnr, cond=None):
            (dual if is_dual(x) else plain).append(float(logsnr[0]))
            return super().__call__(x, logsnr, cond)

    rng = SampleRNG([0])
    sampler = CovarianceAware(structure=structure, block=2, products=products, **options)
    sampler(Watching(WholeImage(), spectrum(1, 4, 4)), rng.randn((1, 4, 4), dtype=D64), grid, rng=rng)
    return len(plain), len(dual)


def test_one_derivative_a_step_and_none_where_no_noise_is_added():
    grid = uniform_logsnr(-4.0, 4.0, 5)
    for structure in ("full", "block", "scalar"):
        assert derivatives(structure, grid) == (1, 4)
    assert derivatives("full", grid, final_noise=True) == (0, 5)
    assert derivatives("full", uniform_u(PURE_COSINE, 5)) == (2, 3)
    assert derivatives("lanczos", grid) == (1, 12)


def test_on_step_sees_plain_tensors():
    outputs, rng = [], SampleRNG([0, 1])
    problem = Coloured(WholeImage(), spectrum(1, 4, 4))
    x = rng.randn((1, 4, 4), dtype=D64)
    CovarianceAware()(
        problem, x, uniform_logsnr(-4.0, 4.0, 3), rng=rng, on_step=lambda k, l, x, x0: outputs.extend((x, x0))
    )
    assert len(outputs) == 6
    for out in outputs:
        assert not is_dual(out)
        assert out.numpy().shape == x.shape
    torch.testing.assert_close(outputs[1], problem(x, torch.full((2,), -4.0, dtype=D64)), rtol=0, atol=1e-14)


def test_the_conditional_denoiser_is_the_one_differentiated():
    """A clipped, guided x0 has another Jacobian than V needs; its value is still what DDIM keeps."""
    inner = Coloured(WholeImage(), torch.ones(5, dtype=D64))

    class Clipped(GaussianDenoiser):
        conditional = inner

    clipped = BoundDenoiser(Clipped(mean=torch.ones(5), covariance=torch.zeros(5), interpolant=VP), None)
    xi = torch.ones(1, 5, dtype=D64)
    found, _ = CovarianceAware().step(clipped, 0 * xi, LEVEL, NEXT, None, Noises(torch.ones(5), [xi]))
    ddim, _ = DDIM().step(clipped, 0 * xi, LEVEL, NEXT, None, None)
    c = VP(NEXT)[0] * (1 - torch.exp((LEVEL - NEXT) / 2))
    expected = ddim + c * posterior_variance(torch.ones(()), LEVEL).sqrt() * xi
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert clipped.last is not None and torch.equal(clipped.last, torch.ones(1, 5, dtype=D64))


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    unet = UNet(
        in_channels=1,
        size=8,
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        attention=(4,),
        head_channels=8,
        num_classes=3,
    )
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in unet.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(max(1, p[0].numel())))
    return NetworkDenoiser(network=unet.eval(), interpolant=VP, prediction=V()).double()


def test_derivative_of_a_network_with_attention(network):
    x, u = (torch.randn(3, 1, 8, 8, dtype=D64, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    bound, h = BoundDenoiser(network, {"label": torch.arange(3)}), 1e-4
    with torch.no_grad():
        x0, Ju = jacobian_product(bound, x, LEVEL, u)
        difference = (bound(x + h * u, LEVEL) - bound(x - h * u, LEVEL)) / (2 * h)
        # a central difference errs by h^2 / 6 times a third derivative, and by rounding over h
        torch.testing.assert_close(Ju, difference, rtol=0, atol=1e-7 * float(Ju.abs().max()))
        torch.testing.assert_close(x0, bound(x, LEVEL), rtol=0, atol=1e-13)


def test_attention_matters_in_that_derivative(network):
    """The derivative through attention alone: a change of one pixel reaches all others."""
    x, u = (
        torch.randn(1, 1, 8, 8, dtype=D64, generator=torch.Generator().manual_seed(1)),
        torch.zeros(1, 1, 8, 8),
    )
    u[..., 0, 0] = 1
    _, Ju = jacobian_product(BoundDenoiser(network, None), x, LEVEL, u.double())
    assert bool((Ju != 0).all())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("structure", NAMES)
def test_samples_a_network(network, structure, mode):
    network, rng = network.float(), SampleRNG([0, 1])
    try:
        with mode():
            x = CovarianceAware(structure=structure, block=4)(
                network,
                rng.randn((1, 8, 8)),
                uniform_u(PURE_COSINE, 4),
                cond={"label": torch.tensor([0, 2])},
                rng=rng,
            )
    finally:
        network.double()
    assert x.dtype == torch.float32 and bool(torch.isfinite(x).all()) and not x.requires_grad


def test_derivative_is_the_whole_jacobians():
    S = covariance(4)
    problem = GaussianDenoiser(mean=torch.zeros(4, dtype=D64), covariance=S, interpolant=VP)
    x, u = torch.ones(1, 4, dtype=D64), torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=D64)
    J = jacrev(lambda x: problem(x, LEVEL))(x)[0, :, 0]
    torch.testing.assert_close(jacobian_product(problem, x, LEVEL, u)[1], u @ J.T, rtol=0, atol=1e-13)


# ---- structures ------------------------------------------------------------------------------------------------------


def test_band_means():
    d = spectrum(2, 4, 8)
    out = band_means(d)
    torch.testing.assert_close(out.mean(), d.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(band_means(out), out, rtol=1e-12, atol=0)
    # radii of (k, l) in 4 x 8 are those of (2 k, l): the first ring holds (0, 1) alone, the second (0, 2) and (1, 0..1)
    assert torch.allclose(out[:, 0, 0], d[:, 0, 0]) and torch.allclose(out[:, 0, 1], d[:, 0, 1])
    torch.testing.assert_close(out[:, 1, 0], (d[:, 0, 2] + d[:, 1, 0] + d[:, 1, 1]) / 3, rtol=1e-12, atol=0)


def test_variances_of_data():
    S, n = spectrum(1, 1, 1, 2, 2), 20_000
    y = S.sqrt() * torch.randn(n, 3, 2, 3, 2, 2, dtype=D64, generator=torch.Generator().manual_seed(0))
    found = Blocks(size=2, channels=True).variances(block_idct(y) + 1)
    assert found.shape == (1, 1, 1, 2, 2)
    assert float((found / S - 1).abs().max()) < 4 * math.sqrt(2 / (18 * n))


def test_signs_are_fair_and_the_same_in_every_precision():
    one, two = (
        signs_like(torch.zeros(2, 500, dtype=dtype), SampleRNG([0, 1])) for dtype in (torch.float32, D64)
    )
    assert torch.equal(one.double(), two) and set(two.flatten().tolist()) == {-1.0, 1.0}
    assert float(two.mean(1).abs().max()) < 4 / math.sqrt(500) and not torch.equal(two[0], two[1])


@dataclass(frozen=True)
class Pixels(WholeImage):
    """A structure of somebody else's: V diagonal in the pixels themselves."""

    def to_basis(self, x):
        return x

    def from_basis(self, y):
        return y


def test_a_new_structure_is_one_small_class():
    structure = Pixels()
    assert isinstance(structure, CovarianceStructure)
    S = spectrum(1, 4, 4)
    found = CovarianceAware(structure=structure, prior_variance=S, final_noise=True)
    x = torch.zeros(1, 1, 4, 4, dtype=D64)
    end = torch.tensor(math.inf, dtype=D64)
    noise, _ = found.step(
        BoundDenoiser(Coloured(structure, S), None),
        x,
        LEVEL,
        end,
        None,
        Noises(spectrum(1, 4, 4) - 1, [x + 1]),
    )
    torch.testing.assert_close(noise[0], posterior_variance(S, LEVEL).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "diagonal"},
        {"noise": -1.0},
        {"limit": -1.0},
        {"prior_variance": -0.1},
        {"structure": "lanczos", "products": 0},
    ],
    ids=["name", "noise", "limit", "prior", "products"],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        CovarianceAware(**options)


def test_blocks_must_fit():
    rng = SampleRNG([0])
    with pytest.raises(ValueError, match="blocks of side 3"):
        CovarianceAware(structure="block", block=3)(
            Coloured(WholeImage(), spectrum(1, 8, 8)),
            rng.randn((1, 8, 8), dtype=D64),
            uniform_logsnr(-3.0, 3.0, 3),
            rng=rng,
        )
