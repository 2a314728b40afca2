"""What holds for every sampler: one answer in every interpolant, whatever the batch; clear errors; true counts."""

import itertools
import math
from itertools import pairwise

import laws
import pytest
import torch
from laws import GRID, run
from problems import ALL_SAMPLERS, D64, DETERMINISTIC, INTERPOLANTS, PURE_COSINE, STOCHASTIC, mixture_1d

from diffusion_lab.guidance import Unguided
from diffusion_lab.process import Karras
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, DPMSolverPP2M, Euler, Generation, Heun
from diffusion_lab.samplers.adaptive_rk import AdaptiveRK
from diffusion_lab.samplers.grids import from_sigmas, karras, uniform_logsnr, uniform_u

every = pytest.mark.parametrize("sampler", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS.keys())


@every
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law, sampler):
    if law is laws.check_last_step_is_the_denoisers_output and isinstance(sampler, AdaptiveRK):
        pytest.skip("it chooses its own levels and reports the ends of the grid; see test_adaptive_rk.py")
    law(sampler)


@pytest.mark.parametrize("sampler", STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_noise_needs_a_source(sampler):
    with pytest.raises(ValueError, match="draws noise"):
        sampler(mixture_1d(INTERPOLANTS["vp"]), torch.zeros(2, 1, dtype=D64), GRID)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_any_split_of_the_batch_gives_the_same_bits(interpolant, dtype):
    # vectorised functions that round the end of a vector otherwise than its middle show in uneven parts
    for first in range(0, 200, 20):
        whole = run(DDIM(), interpolant, range(first, first + 20), dtype=dtype)
        cuts = [0, 1, 3, 6, 11, 20]
        parts = [
            run(DDIM(), interpolant, range(first + a, first + b), dtype=dtype) for a, b in pairwise(cuts)
        ]
        assert torch.equal(whole, torch.cat(parts))


def test_identities():
    vp = INTERPOLANTS["vp"]
    assert torch.equal(run(Euler(), vp), run(DDIM(), vp))
    # eta = 1 is ancestral sampling with the lower variance
    torch.testing.assert_close(run(DDIM(eta=1.0), vp), run(DDPM(interpolation=0.0), vp), rtol=0, atol=1e-12)


class Ramp:
    """x0 = 0.3 + 0.2 logsnr, whatever x: every step can be written out by hand."""

    interpolant = INTERPOLANTS["vp"]

    def __call__(self, x, logsnr, cond=None):
        return (0.3 + 0.2 * logsnr)[:, None].expand_as(x)


class Unit:
    """Stands in for SampleRNG; its noise is one."""

    def randn_like(self, x):
        return torch.ones_like(x)


def levels_and_states(sampler, start, levels):
    """Values of one sample after each step along `levels`, which end at +inf; the last of them is left out."""
    seen = []
    x, grid = torch.tensor([[start]], dtype=D64), torch.tensor([*levels, math.inf], dtype=D64)
    sampler(Ramp(), x, grid, rng=Unit(), on_step=lambda k, logsnr, x, x0: seen.append(float(x)))
    return seen[:-1]


@pytest.mark.parametrize("eta", [0.3, 0.5, 1.0])
def test_ddim_eta_is_songs_formula(eta):
    # Song et al. 2021, eqs. 12 and 16, in their alpha, the square of ours
    levels, x, expected = (-2.0, 0.5, 1.1), 0.7, []
    for now, then in itertools.pairwise(levels):
        a, a_next, x0 = 1 / (1 + math.exp(-now)), 1 / (1 + math.exp(-then)), 0.3 + 0.2 * now
        n = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - n**2) * eps + n
        expected.append(x)
    assert levels_and_states(DDIM(eta=eta), 0.7, levels) == pytest.approx(expected, abs=1e-13)


def test_dpmpp_2m_is_lus_formula_on_unequal_steps():
    # Lu et al. 2022, algorithm 2, in their half log-SNR
    levels = (-3.0, -1.6, 0.5, 0.9)
    lam = [level / 2 for level in levels]
    alpha = [1 / math.sqrt(1 + math.exp(-2 * lam_i)) for lam_i in lam]
    sigma = [a * math.exp(-lam_i) for a, lam_i in zip(alpha, lam, strict=True)]
    x0 = [0.3 + 0.4 * lam_i for lam_i in lam]
    x, expected = 0.7, []
    for i in (1, 2, 3):
        h, D = lam[i] - lam[i - 1], x0[i - 1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * x0[i - 1] - 1 / (2 * r) * x0[i - 2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * D
        expected.append(x)
    assert levels_and_states(DPMSolverPP2M(), 0.7, levels) == pytest.approx(expected, abs=1e-13)


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
