"""The same samplers elsewhere: diffusers' schedulers and k-diffusion's functions, on our denoiser and our grid.

Each peer is a function (denoiser, x, grid, cond, seed) -> samples, of a variance-preserving denoiser, from the same
start. What a library adds for itself (its own grid, its own final step) is set to ours where it lets one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import expand_logsnr
from diffusion_lab.typing import Cond, DenoiserFn

Peer = Callable[[DenoiserFn, Tensor, Tensor, Cond | None, int], Tensor]


def k_diffusion_sampling() -> Any:
    """Return `k_diffusion.sampling` without the package's other modules, whose requirements refuse NumPy 2."""
    if "k_diffusion" not in sys.modules:
        found = importlib.util.find_spec("k_diffusion")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("k_diffusion: run `make setup`")
        package = types.ModuleType("k_diffusion")
        package.__path__ = [str(Path(found.origin).parent)]  # type: ignore[attr-defined]
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


def k_diffusion(name: str, **options: Any) -> Peer:
    """A function of k-diffusion, which lives in the variance-exploding process."""

    def run(denoiser: DenoiserFn, x: Tensor, grid: Tensor, cond: Cond | None, seed: int) -> Tensor:
        sampling, sigmas = k_diffusion_sampling(), torch.exp(-grid / 2).to(x.dtype)
        alpha, _ = denoiser.interpolant(grid[0])

        def model(y: Tensor, sigma: Tensor) -> Tensor:
            level = -2 * torch.log(sigma)
            alpha, _ = denoiser.interpolant(level)
            return denoiser(y * alpha.reshape(-1, *[1] * (y.ndim - 1)), level, cond)

        torch.manual_seed(seed)
        with torch.no_grad():
            return getattr(sampling, name)(model, x / float(alpha), sigmas, disable=True, **options)

    return run


def diffusers(name: str, *, exploding: bool = False, repeat: int = 1, **options: Any) -> Peer:
    """A scheduler of diffusers that predicts x0; `exploding` ones live in the variance-exploding process.

    `repeat` is 2 for Heun's, which lists every level but the first twice.
    """

    def run(denoiser: DenoiserFn, x: Tensor, grid: Tensor, cond: Cond | None, seed: int) -> Tensor:
        scheduler = getattr(importlib.import_module("diffusers"), name)(prediction_type="sample", **options)
        scheduler.set_timesteps(len(grid) - 1)
        levels = grid[:-1]
        if repeat == 2:
            levels = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
        scheduler.sigmas = torch.cat([torch.exp(-levels / 2), torch.zeros(1)]).to(x.dtype)
        scheduler.timesteps = torch.arange(len(levels), dtype=torch.float64)
        scheduler.is_scale_input_called = True
        generator = torch.Generator().manual_seed(seed)
        alpha, _ = denoiser.interpolant(grid[0])
        x = x / float(alpha) if exploding else x
        takes = "generator" in scheduler.step.__code__.co_varnames
        with torch.no_grad():
            for level, t in zip(levels, scheduler.timesteps, strict=True):
                alpha, _ = denoiser.interpolant(level)
                at = x * float(alpha) if exploding else x
                x0 = denoiser(at, expand_logsnr(level, at), cond)
                extra = {"generator": generator} if takes else {}
                x = scheduler.step(x0, t, x, **extra).prev_sample
            # some schedulers divide by the last noise level, which is 0: there the denoiser's output is the answer
            return torch.where(torch.isfinite(x), x, x0)

    return run


PEERS: dict[str, dict[str, Peer]] = {
    "euler": {
        "diffusers": diffusers("EulerDiscreteScheduler", exploding=True),
        "k-diffusion": k_diffusion("sample_euler"),
    },
    "heun": {
        "diffusers": diffusers("HeunDiscreteScheduler", exploding=True, repeat=2),
        "k-diffusion": k_diffusion("sample_heun"),
    },
    "dpmpp_2m": {
        "diffusers": diffusers("DPMSolverMultistepScheduler", solver_order=2, final_sigmas_type="zero"),
        "k-diffusion": k_diffusion("sample_dpmpp_2m"),
    },
    "dpmpp_3m": {
        "diffusers": diffusers("DPMSolverMultistepScheduler", solver_order=3, final_sigmas_type="zero"),
    },
    "dpmpp_2m_sde": {
        "diffusers": diffusers(
            "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"
        ),
    },
    "unipc": {"diffusers": diffusers("UniPCMultistepScheduler", solver_order=3, final_sigmas_type="zero")},
    "deis": {"diffusers": diffusers("DEISMultistepScheduler", solver_order=3)},
    "edm": {"k-diffusion": k_diffusion("sample_heun", s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)},
    "ddpm_lower": {"k-diffusion": k_diffusion("sample_euler_ancestral")},
    "sa_solver": {
        "diffusers": diffusers(
            "SASolverScheduler", predictor_order=3, corrector_order=4, tau_func=lambda t: 1.0
        )
    },
}
"""Peers by the name of our sampler."""
