"""Denoisers: callables `(x, logsnr, cond) -> E[x0 | x]`, by a network or in closed form."""

from diffusion_lab.denoisers.analytic import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lab.denoisers.guided import GUIDANCE_SCALE, GuidedDenoiser
from diffusion_lab.denoisers.learned_variance import LearnedVarianceDenoiser, VarianceOutput
from diffusion_lab.denoisers.network import NetworkDenoiser, Output
from diffusion_lab.denoisers.prediction import (
    EDM,
    X0,
    Both,
    Eps,
    EpsResidual,
    Prediction,
    Score,
    V,
    Velocity,
    eps_error_scale,
    target,
    x0_from,
)
from diffusion_lab.denoisers.shortcut import ShortcutDenoiser
from diffusion_lab.denoisers.told import ToldDenoiser

__all__ = [
    "GUIDANCE_SCALE",
    "Both",
    "EDM",
    "EmpiricalDenoiser",
    "Eps",
    "EpsResidual",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "GuidedDenoiser",
    "LearnedVarianceDenoiser",
    "NetworkDenoiser",
    "Output",
    "Prediction",
    "Score",
    "ShortcutDenoiser",
    "ToldDenoiser",
    "V",
    "VarianceOutput",
    "Velocity",
    "X0",
    "eps_error_scale",
    "target",
    "x0_from",
]
