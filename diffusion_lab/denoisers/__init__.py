"""Denoisers: callables `(x, logsnr, cond) -> E[x0 | x]`, by a network or in closed form."""

from diffusion_lab.denoisers.analytic import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
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

__all__ = [
    "Both",
    "EDM",
    "EmpiricalDenoiser",
    "Eps",
    "EpsResidual",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "LearnedVarianceDenoiser",
    "NetworkDenoiser",
    "Output",
    "Prediction",
    "Score",
    "V",
    "VarianceOutput",
    "Velocity",
    "X0",
    "eps_error_scale",
    "target",
    "x0_from",
]
