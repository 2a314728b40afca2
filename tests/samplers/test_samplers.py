"""What holds for every sampler: one answer in every interpolant, whatever the batch; clear errors; true counts."""

import math

import laws
import pytest
import torch
from laws import GRID, run
from problems import ALL_SAMPLERS, D64, DETERMINISTIC, INTERPOLANTS, PURE_COSINE, STOCHASTIC, mixture_1d

from diffusion_lab.guidance import Unguided
from diffusion_lab.process import Karras
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, Euler, Generation, Heun
from diffusion_lab.samplers.grids import from_sigmas, karras, uniform_logsnr, uniform_u

every = pytest.mark.parametrize("sampler", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS.keys())


@every
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law, sampler):
    law(sampler)


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
