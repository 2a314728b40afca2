"""DDIM, Euler, Heun and DPM-Solver++ (2M) agree, step by step, with diffusers' schedulers and k-diffusion's functions.

All run on one grid and one exact denoiser, a mixture in four dimensions. diffusers' schedulers know the levels of a
discrete training schedule; they are replaced by ours by hand. Several compute in float32 whatever they are given, so
the tolerance is 1e-5 of the samples' scale; k-diffusion computes in float64 and agrees to 1e-12.
"""

import pytest
import torch
from problems import D64, INTERPOLANTS, mixture_4d

from diffusion_lab.samplers import DDIM, DPMSolverPP2M, Euler, Heun
from diffusion_lab.samplers.grids import karras

VP, VE = INTERPOLANTS["vp"], INTERPOLANTS["ve"]


class Noises:
    """Stands for SampleRNG: hands out given noises in turn."""

    def __init__(self, noises):
        self.noises = iter(noises)

    def randn_like(self, x):
        return next(self.noises)


def draws(n):
    return torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(1), dtype=D64)


def trajectory(sampler, problem, x, grid, noises=()):
    """The samples after each step."""
    xs = []
    sampler(problem, x, grid, rng=Noises(noises), on_step=lambda k, logsnr, x, x0: xs.append(x))
    return xs


def assert_agree(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < tolerance * max(1.0, float(b.abs().max()))


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(params=[12, 20])
def grid(request):
    """EDM's grid; of fewer than 15 steps, where diffusers lowers orders near the end, and of more."""
    return karras(0.05, 20.0, 7.0, request.param)


# ---- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_diffusers_ddim(eta, grid, diffusers):
    steps = len(grid) - 1
    # one training level for each of ours, so that the level before is the next one; then its alpha-bar is 1
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=steps, prediction_type="sample", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = torch.sigmoid(grid[:-1]).flip(0)
    problem, (first, *noises) = mixture_4d(VP), draws(steps + 1)
    x = VP(grid[0])[1] * first
    ours, theirs = trajectory(DDIM(eta=eta), problem, x, grid, noises), []
    for t, logsnr, noise in zip(scheduler.timesteps, grid, noises, strict=False):
        x = scheduler.step(
            problem(x, logsnr), int(t), x, eta=eta, variance_noise=noise if eta else None
        ).prev_sample
        theirs.append(x)
    assert_agree(ours, theirs, 1e-5)


def test_diffusers_dpmpp_2m(grid, diffusers):
    # with 12 steps the last is of first order because of "lower_order_final", with 20 because of the final zero
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, prediction_type="sample")
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas = torch.exp(-grid / 2)
    problem = mixture_4d(VP)
    x = VP(grid[0])[1] * draws(1)[0]
    ours, theirs = trajectory(DPMSolverPP2M(), problem, x, grid), []
    for t, logsnr in zip(scheduler.timesteps, grid, strict=False):
        x = scheduler.step(problem(x, logsnr), t, x).prev_sample
        theirs.append(x)
    assert_agree(ours, theirs, 1e-5)


def test_diffusers_euler(grid, diffusers):
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas = torch.exp(-grid / 2)
    problem = mixture_4d(VE)
    x = VE(grid[0])[1] * draws(1)[0]
    ours, theirs = trajectory(Euler(), problem, x, grid), []
    for t, logsnr in zip(scheduler.timesteps, grid, strict=False):
        # it hands the network x / sqrt(sigma^2 + 1), which is the variance-preserving x
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(mixture_4d(VP)(scaled, logsnr), t, x).prev_sample
        theirs.append(x)
    assert_agree(ours, theirs, 1e-5)


def test_diffusers_heun(grid, diffusers):
    """Its prediction_type "sample" takes x0 for both stages, so it is given x0; each step but the last is two calls."""
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(len(grid) - 1)
    sigmas = torch.exp(-grid / 2)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    levels = torch.cat([grid[:1], grid[1:-1].repeat_interleave(2)])
    x = VE(grid[0])[1] * draws(1)[0]
    ours, theirs = trajectory(Heun(), mixture_4d(VE), x, grid), []
    # the level of each timestep appears twice, the first as the end of a step
    scheduler.set_begin_index(0)
    for t, logsnr in zip(scheduler.timesteps, levels, strict=True):
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(mixture_4d(VP)(scaled, logsnr), t, x).prev_sample
        theirs.append(x)
    assert_agree(ours, [*theirs[1::2], theirs[-1]], 1e-5)


# ---- k-diffusion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("sample_euler", Euler()),
        ("sample_euler", DDIM()),
        ("sample_heun", Heun()),
        ("sample_dpmpp_2m", DPMSolverPP2M()),
    ],
    ids=["euler", "ddim", "heun", "dpmpp_2m"],
)
def test_k_diffusion(name, sampler, grid, sampling):
    problem, sigmas, xs = mixture_4d(VE), torch.exp(-grid / 2), []
    x = sigmas[0] * draws(1)[0]
    end = getattr(sampling, name)(
        lambda x, sigma: problem(x, -2 * torch.log(sigma)),
        x,
        sigmas,
        callback=lambda of: xs.append(of["x"]),
        disable=True,
    )
    assert_agree(trajectory(sampler, problem, x, grid), [*xs[1:], end], 1e-12)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_k_diffusion_ancestral_is_ddim_with_the_same_eta(eta, grid, sampling):
    # sigma_up = eta sigma_next sqrt(1 - sigma_next^2 / sigma^2) is DDIM's n, sigma_down its sqrt(sigma_next^2 - n^2)
    problem, sigmas, xs = mixture_4d(VE), torch.exp(-grid / 2), []
    first, *noises = draws(len(grid))
    left = iter(noises)
    end = sampling.sample_euler_ancestral(
        lambda x, sigma: problem(x, -2 * torch.log(sigma)),
        sigmas[0] * first,
        sigmas,
        callback=lambda of: xs.append(of["x"]),
        disable=True,
        eta=eta,
        noise_sampler=lambda sigma, sigma_next: next(left),
    )
    ours = trajectory(DDIM(eta=eta), problem, sigmas[0] * first, grid, noises)
    assert_agree(ours, [*xs[1:], end], 1e-12)
