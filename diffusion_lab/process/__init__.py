"""The noise process: interpolants, schedules and Gaussian maps. Pure functions of torch tensors.

u in [0, 1] --schedule--> logsnr --interpolant--> (alpha, sigma) --marginal--> x = alpha x0 + sigma eps
"""

from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.process.gaussian import (
    add_noise,
    ddim_step,
    eps_from_x0,
    inverse_ddim_step,
    marginal,
    posterior,
)
from diffusion_lab.process.interpolants import (
    Interpolant,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)
from diffusion_lab.process.schedules import (
    Cosine,
    InterpolatedCosine,
    Karras,
    LinearBeta,
    LinearLogSNR,
    LogitNormal,
    LogNormal,
    Schedule,
    ShiftedCosine,
    Sigmoid,
)

__all__ = [
    "Cosine",
    "Interpolant",
    "InterpolatedCosine",
    "Karras",
    "LinearBeta",
    "LinearLogSNR",
    "LogNormal",
    "LogitNormal",
    "RectifiedFlow",
    "Schedule",
    "ShiftedCosine",
    "Sigmoid",
    "VarianceExploding",
    "VariancePreserving",
    "broadcast_right",
    "add_noise",
    "ddim_step",
    "eps_from_x0",
    "expand_logsnr",
    "inverse_ddim_step",
    "marginal",
    "posterior",
]
