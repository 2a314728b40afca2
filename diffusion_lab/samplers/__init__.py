"""Samplers: from noise to samples along a grid of log-SNRs, with any denoiser and any interpolant."""

from diffusion_lab.samplers.base import Sampler, State, Stepper
from diffusion_lab.samplers.counting import BlankDenoiser, CountingDenoiser
from diffusion_lab.samplers.ddim import DDIM
from diffusion_lab.samplers.ddpm import DDPM
from diffusion_lab.samplers.dpmpp_2m import DPMSolverPP2M
from diffusion_lab.samplers.euler import Euler, Heun
from diffusion_lab.samplers.generate import Generation

__all__ = [
    "DDIM",
    "DDPM",
    "BlankDenoiser",
    "CountingDenoiser",
    "DPMSolverPP2M",
    "Euler",
    "Generation",
    "Heun",
    "Sampler",
    "State",
    "Stepper",
]
