"""What holds for every sampler: one answer in every interpolant, whatever the batch; clear errors; true counts."""

import math

import pytest
import torch
from problems import ALL_SAMPLERS, D64, DETERMINISTIC, INTERPOLANTS, PURE_COSINE, STOCHASTIC, mixture_1d

from diffusion_lab.guidance import Unguided
from diffusion_lab.process import Cosine, Karras
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, Euler, Generation, Heun, Sampler, Stepper
from diffusion_lab.samplers.grids import from_sigmas, karras, uniform_logsnr, uniform_u

GRID = uniform_u(Cosine(logsnr_min=-18, logsnr_max=12), 15)
every = pytest.mark.parametrize("sampler", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS.keys())


def run(sampler, interpolant, seeds=range(6), grid=GRID, dtype=D64, cond=None, on_step=None):
    rng = SampleRNG(seeds)
    x = interpolant(grid[0])[1] * rng.randn((1,), dtype=dtype)
    denoiser = mixture_1d(interpolant)
    return sampler(denoiser, x, grid, cond=cond, rng=rng, on_step=on_step)


@every
def test_same_samples_in_every_interpolant(sampler):
    ends = [run(sampler, interpolant) for interpolant in INTERPOLANTS.values()]
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_batch_of_eight_is_three_and_five(sampler, dtype):
    vp = INTERPOLANTS["vp"]
    whole = run(sampler, vp, range(8), dtype=dtype)
    parts = torch.cat([run(sampler, vp, range(3), dtype=dtype), run(sampler, vp, range(3, 8), dtype=dtype)])
    assert torch.equal(whole, parts) and whole.dtype == dtype


@every
def test_last_step_is_the_denoisers_output(sampler):
    seen = []
    end = run(
        sampler, INTERPOLANTS["ve"], on_step=lambda k, logsnr, x, x0: seen.append((k, float(logsnr), x0))
    )
    assert [k for k, _, _ in seen] == list(range(15)) and seen[-1][1] == math.inf
    assert torch.equal(end, seen[-1][2])


@every
@pytest.mark.parametrize("interpolant", ["vp", "rf"])
def test_pure_noise_is_a_legal_start(sampler, interpolant):
    end = run(sampler, INTERPOLANTS[interpolant], grid=uniform_u(PURE_COSINE, 8))
    assert bool(torch.isfinite(end).all())


@every
def test_conditions_reach_the_denoiser(sampler):
    ends = [
        run(sampler, INTERPOLANTS["vp"], cond={"label": torch.full((6,), k)}, grid=uniform_u(PURE_COSINE, 60))
        for k in (0, 1)
    ]
    # class 0 is N(-1, .2^2), class 1 N(.8, .35^2)
    assert bool((ends[0] < -0.2).all()) and bool((ends[1] > -0.5).all())


@every
def test_a_sampler_object_keeps_nothing(sampler):
    assert isinstance(sampler, Sampler) and isinstance(sampler, Stepper)
    assert torch.equal(run(sampler, INTERPOLANTS["vp"]), run(sampler, INTERPOLANTS["vp"]))


@pytest.mark.parametrize("sampler", STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_noise_needs_a_source(sampler):
    with pytest.raises(ValueError, match="draws noise"):
        sampler(mixture_1d(INTERPOLANTS["vp"]), torch.zeros(2, 1, dtype=D64), GRID)


def test_identities():
    vp = INTERPOLANTS["vp"]
    assert torch.equal(run(Euler(), vp), run(DDIM(), vp))
    # eta = 1 is ancestral sampling with the lower variance
    torch.testing.assert_close(run(DDIM(eta=1.0), vp), run(DDPM(interpolation=0.0), vp), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "calls"), [("ddim", 15), ("euler", 15), ("heun", 29), ("dpmpp_2m", 15), ("ddpm_lower", 15)]
)
def test_calls_are_counted_truly(name, calls):
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]))
    ALL_SAMPLERS[name](counting, torch.zeros(2, 1, dtype=D64), GRID, rng=SampleRNG([0, 1]))
    assert counting.calls == calls
    recipe = Generation(sampler=ALL_SAMPLERS[name], grid=GRID, guidance=Unguided, shape=(1,))
    assert recipe.nfe(INTERPOLANTS["vp"]) == calls


@pytest.mark.parametrize(
    "grid",
    [[math.inf], [0.0, 1.0], [1.0, 0.0, math.inf], [0.0, 0.0, math.inf]],
    ids=["one_level", "not_clean", "falling", "repeated"],
)
def test_malformed_grids_are_refused(grid):
    with pytest.raises(ValueError, match="grid"):
        DDIM()(mixture_1d(INTERPOLANTS["vp"]), torch.zeros(1, 1, dtype=D64), torch.tensor(grid))


@pytest.mark.parametrize("make", [lambda: DDIM(eta=1.5), lambda: DDPM(interpolation=-0.1)])
def test_bad_parameters_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_second_order_beats_first_at_equal_cost():
    vp = INTERPOLANTS["vp"]
    # EDM's grid, fine enough for all three to be on their slope: with ten steps Heun still picks wrong modes
    exact = run(Heun(), vp, grid=karras(0.002, 80.0, 7.0, 2000))
    one_call, two_calls = karras(0.002, 80.0, 7.0, 80), karras(0.002, 80.0, 7.0, 40)
    errors = {
        name: float((run(DETERMINISTIC[name], vp, grid=grid) - exact).abs().mean())
        for name, grid in (("ddim", one_call), ("dpmpp_2m", one_call), ("heun", two_calls))
    }
    assert errors["dpmpp_2m"] < 0.5 * errors["ddim"] and errors["heun"] < 0.5 * errors["ddim"], errors


# ---- grids -----------------------------------------------------------------------------------------------------------


def test_grids_are_what_they_say():
    assert torch.equal(
        uniform_u(PURE_COSINE, 2),
        torch.tensor([-math.inf, PURE_COSINE(torch.tensor(0.5, dtype=D64)), math.inf]),
    )
    assert uniform_logsnr(-4.0, 4.0, 5).tolist() == [-4, -2, 0, 2, 4, math.inf]
    edm = karras(0.002, 80.0, 7.0, 18)
    i = torch.arange(18, dtype=D64)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(torch.exp(-edm[:-1] / 2), sigma, rtol=1e-12, atol=0)
    # the schedule of the same name is the same spacing
    torch.testing.assert_close(edm[:-1], Karras()(1 - i / 17), rtol=1e-10, atol=1e-10)
    assert torch.equal(from_sigmas([2.0, 1.0, 0.0]), from_sigmas([2.0, 1.0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: uniform_u(PURE_COSINE, 0),
        lambda: uniform_logsnr(1.0, 0.0, 3),
        lambda: karras(1.0, 0.5, 7.0, 3),
        lambda: from_sigmas([1.0, 2.0]),
        lambda: from_sigmas([]),
    ],
)
def test_bad_grids_are_refused(make):
    with pytest.raises(ValueError):
        make()


# ---- generation ------------------------------------------------------------------------------------------------------


def test_generation_is_a_function_of_seed_and_condition():
    denoiser = mixture_1d(INTERPOLANTS["vp"])
    recipe = Generation(sampler=DDPM(), grid=GRID, guidance=Unguided, shape=(1,))
    whole = recipe(denoiser, seeds=range(8), cond={"label": torch.arange(8) % 2})
    part = recipe(denoiser, seeds=[5, 6], cond={"label": torch.tensor([1, 0])})
    assert whole.shape == (8, 1) and whole.dtype == torch.float32 and torch.equal(whole[5:7], part)


def test_infinite_noise_is_refused():
    recipe = Generation(sampler=DDIM(), grid=uniform_u(PURE_COSINE, 4), guidance=Unguided, shape=(1,))
    with pytest.raises(ValueError, match="-inf"):
        recipe(mixture_1d(INTERPOLANTS["ve"]), seeds=[0])
