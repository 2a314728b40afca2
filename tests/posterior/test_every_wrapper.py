"""What holds for every posterior sampler: where it runs, what it depends on, and what it leaves behind."""

import math
import threading
from functools import partial

import pytest
import torch
from measured import cosine_levels, draw, mixture_images, normal
from problems import D64, INTERPOLANTS

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.measurements import GaussianBlur, Inpaint, PhaseRetrieval, SuperResolution
from diffusion_lab.networks import UNet
from diffusion_lab.posterior import DPS, MCG, ExactTweedie, PiGDM, ReconstructionGuidance, Replacement
from diffusion_lab.posterior.common import conjugate_gradients
from diffusion_lab.samplers import DDIM, DDPM, DPMSolverPP2M, Generation, Heun
from diffusion_lab.typing import MEASUREMENT, SEED, conditional_of

GRID = cosine_levels(6, ends=8.0)
PURE = torch.cat([torch.tensor([-math.inf], dtype=D64), GRID[1:]])
MASK, BLUR = Inpaint(mask="random", fraction=0.5), GaussianBlur(size=3, std=0.7)
SHAPE = (1, 4, 4)

WRAPPERS = {
    "replacement": (partial(Replacement, operator=MASK), MASK),
    "reconstruction": (partial(ReconstructionGuidance, operator=BLUR, weight=1.5), BLUR),
    "reconstruction_replace": (partial(ReconstructionGuidance, operator=MASK, replace=True), MASK),
    "reconstruction_noise": (partial(ReconstructionGuidance, operator=BLUR, noise=0.1), BLUR),
    "dps": (partial(DPS, operator=PhaseRetrieval(), step=0.05, grid=GRID), PhaseRetrieval()),
    "pigdm": (partial(PiGDM, operator=BLUR, noise=0.1), BLUR),
    "mcg": (partial(MCG, operator=BLUR, step=0.05, grid=GRID), BLUR),
    "mcg_mask": (partial(MCG, operator=MASK, step=0.05, grid=GRID), MASK),
    "tweedie": (partial(ExactTweedie, operator=BLUR, noise=0.1, iterations=3), BLUR),
    "tweedie_jvp": (partial(ExactTweedie, operator=BLUR, noise=0.1, iterations=3, products="jvp"), BLUR),
}
SAMPLERS = {"ddim": DDIM(), "ddpm": DDPM(), "heun": Heun(), "dpmpp_2m": DPMSolverPP2M()}
wrappers = pytest.mark.parametrize("name", WRAPPERS)


def told(operator, batch, dtype=D64):
    y = operator(normal(batch, *SHAPE, seed=1, dtype=dtype))
    return {MEASUREMENT: y, SEED: torch.arange(batch)}


def combinations():
    """Every sampler, interpolant and precision; by default one of the three is varied at a time."""
    for by, sampler in SAMPLERS.items():
        for process, interpolant in INTERPOLANTS.items():
            for precision, dtype in {"float32": torch.float32, "float64": D64}.items():
                usual = (by == "ddim") + (process == "vp") + (precision == "float32")
                marks = [] if usual >= 2 else [pytest.mark.slow]
                yield pytest.param(sampler, interpolant, dtype, marks=marks, id=f"{by}-{process}-{precision}")


@wrappers
@pytest.mark.parametrize("sampler, interpolant, dtype", combinations())
def test_a_batch_of_eight_is_three_and_five(name, sampler, interpolant, dtype):
    factory, A = WRAPPERS[name]
    denoiser, y = factory(mixture_images(interpolant)), told(A, 8, dtype)[MEASUREMENT]
    parts = [range(8), range(3), range(3, 8)]
    whole, first, second = (
        draw(denoiser, sampler, GRID, y[seeds[0] : seeds[-1] + 1], SHAPE, seeds, dtype) for seeds in parts
    )
    assert whole.dtype == dtype and bool(torch.isfinite(whole).all())
    assert torch.equal(whole, torch.cat([first, second]))


@wrappers
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("interpolant", ["vp", "rf"])
def test_pure_noise_is_a_legal_start(name, sampler, interpolant):
    factory, A = WRAPPERS[name]
    denoiser = factory(mixture_images(INTERPOLANTS[interpolant]))
    for dtype in (torch.float32, D64):
        end = draw(denoiser, sampler, PURE, told(A, 2, dtype)[MEASUREMENT], SHAPE, range(2), dtype)
        assert bool(torch.isfinite(end).all())


@wrappers
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_finite_at_extreme_levels(name, interpolant):
    factory, A = WRAPPERS[name]
    for dtype in (torch.float32, D64):
        for level in (-25.0, 25.0, 40.0):
            logsnr = torch.full((2,), level, dtype=dtype)
            alpha, sigma = interpolant(logsnr[0])
            x = alpha * normal(2, *SHAPE, dtype=dtype) + sigma * normal(2, *SHAPE, seed=2, dtype=dtype)
            x0 = factory(mixture_images(interpolant))(x, logsnr, told(A, 2, dtype))
            assert bool(torch.isfinite(x0).all()) and x0.dtype == dtype


@wrappers
def test_the_recipe_of_the_house(name):
    # float32, with the seeds that Generation puts in
    factory, A = WRAPPERS[name]
    recipe = Generation(sampler=DDIM(), grid=GRID, guidance=factory, shape=SHAPE)
    denoiser, y = mixture_images(INTERPOLANTS["vp"]), told(A, 8, torch.float32)[MEASUREMENT]
    whole = recipe(denoiser, seeds=range(8), cond={MEASUREMENT: y})
    parts = [recipe(denoiser, seeds=range(8)[s], cond={MEASUREMENT: y[s]}) for s in (slice(3), slice(3, 8))]
    assert whole.dtype == torch.float32 and torch.equal(whole, torch.cat(parts))
    # the same cost for a denoiser that answers zero, by which it is counted
    products = 3 if name == "tweedie_jvp" else 0
    assert 6 <= recipe.nfe(INTERPOLANTS["vp"], {MEASUREMENT: y[:1]}) <= 6 * (1 + products)


@wrappers
def test_no_graph_is_left_and_no_state_is_touched(name):
    factory, A = WRAPPERS[name]
    weight = torch.tensor(1.0, dtype=D64, requires_grad=True)
    inside = mixture_images(INTERPOLANTS["vp"])

    class Trained:
        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            return weight * inside(x, logsnr)

    x, before = normal(2, *SHAPE), torch.random.get_rng_state()
    wrapped, cond = factory(Trained()), told(A, 2)
    with torch.no_grad():
        x0 = wrapped(x, GRID[3].expand(2), cond)
    assert not x0.requires_grad and not x.requires_grad and weight.grad is None
    if name != "replacement":
        # whoever differentiates the model through its guidance says so by an x that wants a gradient
        assert not wrapped(x, GRID[3].expand(2), cond).requires_grad
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(cond) == {MEASUREMENT, SEED}
    with torch.inference_mode():
        inference = wrapped(x.clone(), GRID[3].expand(2).clone(), {k: v.clone() for k, v in cond.items()})
    assert torch.equal(inference, x0)


@wrappers
def test_it_says_what_it_is(name):
    factory, A = WRAPPERS[name]
    denoiser = mixture_images(INTERPOLANTS["vp"])
    wrapped = factory(denoiser)
    assert wrapped.interpolant is denoiser.interpolant and conditional_of(wrapped) is denoiser
    with pytest.raises(ValueError, match="needs cond\\['measurement'\\]"):
        wrapped(normal(2, *SHAPE), GRID[3].expand(2), None)
    with pytest.raises(ValueError, match=f"has shape .*{type(A).__name__} makes"):
        wrapped(normal(2, *SHAPE), GRID[3].expand(2), {**told(A, 2), MEASUREMENT: torch.zeros(2, 3)})


@pytest.mark.parametrize(
    "factory",
    [
        partial(Replacement, operator=MASK),
        partial(ReconstructionGuidance, operator=MASK),
        partial(ReconstructionGuidance, operator=MASK, replace=True),
        partial(DPS, operator=MASK, step=0.1, grid=GRID),
        partial(MCG, operator=MASK, step=0.1, grid=GRID),
        partial(PiGDM, operator=MASK, noise=0.1),
        partial(ExactTweedie, operator=MASK, noise=0.1),
    ],
)
def test_what_is_written_on_missing_pixels_is_not_read(factory):
    wrapped, cond = factory(mixture_images(INTERPOLANTS["vp"])), told(MASK, 2)
    x, logsnr = normal(2, *SHAPE), GRID[3].expand(2)
    missing = 1.0 - MASK.known(x)
    spoiled = {**cond, MEASUREMENT: cond[MEASUREMENT] + 7.0 * missing}
    assert torch.equal(wrapped(x, logsnr, spoiled), wrapped(x, logsnr, cond))


@wrappers
def test_builds_on_another_guidance(name):
    factory, A = WRAPPERS[name]
    if name == "mcg":
        # where its solver stops is a matter of rounding
        factory = partial(factory, iterations=200, tolerance=1e-13)
    denoiser = mixture_images(INTERPOLANTS["vp"])

    class TwoFaced:
        """Conditional it is the denoiser, unconditional half of it."""

        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            given = (
                1.0 if cond is None or "label" not in cond else 0.5 + 0.5 * (cond["label"] >= 0).to(x.dtype)
            )
            return torch.as_tensor(given, dtype=x.dtype).reshape(-1, 1, 1, 1) * denoiser(x, logsnr)

    class Doubled:
        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            return 1.5 * denoiser(x, logsnr)

    x, logsnr = normal(2, *SHAPE), GRID[3].expand(2)
    cond = {**told(A, 2), "label": torch.zeros(2, dtype=torch.int64)}
    # 0.5 + 2 (1 - 0.5) = 1.5
    inner = factory(TwoFaced(), inner=partial(ClassifierFree, scale=2.0))(x, logsnr, cond)
    torch.testing.assert_close(inner, factory(Doubled())(x, logsnr, cond), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["reconstruction", "dps", "pigdm", "mcg", "mcg_mask", "tweedie"])
def test_a_gradient_of_a_gradient_is_the_true_one(name):
    factory, A = WRAPPERS[name]
    if name in ("pigdm", "mcg", "tweedie"):
        factory = partial(factory, iterations=200, tolerance=1e-13)
    wrapped, cond = factory(mixture_images(INTERPOLANTS["vp"])), told(A, 1)
    logsnr, u, v = GRID[4].expand(1), normal(1, *SHAPE, seed=5), normal(1, *SHAPE, seed=6)
    x = normal(1, *SHAPE).requires_grad_()
    (g,) = torch.autograd.grad((wrapped(x, logsnr, cond) * v).sum(), x)
    h, at = 1e-5, x.detach()
    slope = ((wrapped(at + h * u, logsnr, cond) - wrapped(at - h * u, logsnr, cond)) * v).sum() / (2 * h)
    torch.testing.assert_close((g * u).sum(), slope, rtol=1e-5, atol=1e-6)


@wrappers
def test_through_a_network(name):
    factory, A = WRAPPERS[name]
    if name != "dps":
        A = Inpaint() if A is MASK else SuperResolution(factor=2)
    factory = partial(factory, operator=A)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(
            in_channels=1, size=8, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16
        )
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.05)
    denoiser = NetworkDenoiser(network=network, interpolant=INTERPOLANTS["vp"], prediction=V())
    recipe = Generation(sampler=DDIM(), grid=GRID[-5:], guidance=factory, shape=(1, 8, 8))
    y = A(normal(2, 1, 8, 8, seed=1, dtype=torch.float32))
    end = recipe(denoiser, seeds=[0, 1], cond={MEASUREMENT: y})
    assert bool(torch.isfinite(end).all()) and all(p.grad is None for p in network.parameters())
    plain = Generation(sampler=DDIM(), grid=GRID[-5:], guidance=lambda d: d, shape=(1, 8, 8))
    plain = plain(denoiser, seeds=[0, 1])
    # it follows the measurement
    assert float((y - A(end)).square().mean()) < float((y - A(plain)).square().mean())


def test_two_threads_at_once():
    factory, A = WRAPPERS["tweedie_jvp"]
    denoiser, y = factory(mixture_images(INTERPOLANTS["vp"])), told(A, 2)[MEASUREMENT]
    alone = draw(denoiser, DDIM(), GRID, y, SHAPE, range(2))
    ends = [None, None]

    def work(i):
        ends[i] = draw(denoiser, DDIM(), GRID, y, SHAPE, range(2))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(end, alone) for end in ends)


MASKED = {
    "replacement": partial(Replacement, operator=MASK),
    "reconstruction": partial(ReconstructionGuidance, operator=MASK),
    "reconstruction_replace": partial(ReconstructionGuidance, operator=MASK, replace=True),
    "dps": partial(DPS, operator=MASK, step=0.05, grid=GRID),
    "pigdm": partial(PiGDM, operator=MASK, noise=0.1),
    "mcg": partial(MCG, operator=MASK, step=0.05, grid=GRID),
    "tweedie": partial(ExactTweedie, operator=MASK, noise=0.1, iterations=3),
}


@pytest.mark.parametrize("factory", MASKED.values(), ids=MASKED.keys())
@pytest.mark.parametrize("missing", [math.nan, math.inf, 7.0])
def test_what_stands_for_a_missing_pixel_does_not_matter(factory, missing):
    wrapped, cond, x = factory(mixture_images(INTERPOLANTS["vp"])), told(MASK, 2), normal(2, *SHAPE, seed=2)
    y = torch.where(MASK.known(x) > 0, cond[MEASUREMENT], missing)
    assert not torch.equal(y, cond[MEASUREMENT])
    level = GRID[2].expand(2)
    assert torch.equal(wrapped(x, level, {**cond, MEASUREMENT: y}), wrapped(x, level, cond))


# ---- the solver -----------------------------------------------------------------------------------------------------


def test_conjugate_gradients_solve_each_sample():
    root = normal(4, 6, 6)
    V, b = root @ root.mT + 0.1 * torch.eye(6, dtype=D64), normal(4, 6, seed=1)
    b[2] = 0.0
    u = conjugate_gradients(lambda u: (V @ u[..., None])[..., 0], b, iterations=60, tolerance=1e-12)
    torch.testing.assert_close(u, torch.linalg.solve(V, b), rtol=0, atol=1e-8)


def test_conjugate_gradients_stop_where_v_is_not_positive():
    V, b = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]], dtype=D64), torch.ones(3, 2, dtype=D64)
    u = conjugate_gradients(lambda u: V * u, b, iterations=10, tolerance=1e-12)
    torch.testing.assert_close(u[0], torch.tensor([1.0, 0.5], dtype=D64), rtol=0, atol=1e-12)
    # one step in the direction b, whose curvature is still positive, and none after it; and none at all
    assert torch.equal(u[1], torch.ones(2, dtype=D64)) and torch.equal(u[2], torch.zeros(2, dtype=D64))


def test_conjugate_gradients_stop_below_the_least_eigenvalue():
    V, b = torch.tensor([[1.0, 0.01]], dtype=D64), torch.tensor([[1.0, 1.0]], dtype=D64)
    solved, stopped = (
        conjugate_gradients(lambda u: V * u, b, iterations=9, tolerance=1e-12, least=least)
        for least in (0.0, 0.1)
    )
    torch.testing.assert_close(solved, b / V, rtol=1e-9, atol=0)
    assert torch.equal(stopped, b * 2 / 1.01)


def test_conjugate_gradients_count_and_stop():
    calls = []

    def product(u):
        calls.append(len(u))
        return 2.0 * u

    conjugate_gradients(product, torch.ones(2, 3), iterations=9, tolerance=1e-3)
    assert len(calls) == 1
    conjugate_gradients(product, torch.zeros(2, 3), iterations=9, tolerance=1e-3)
    assert len(calls) == 1
