"""Likelihoods: the variational bound and the probability-flow ODE, in nats and bits per dimension."""

from diffusion_lab.likelihood.bits import Interval, bits, bits_per_dim, interval
from diffusion_lab.likelihood.bound import BoundEstimate, BoundEvaluation, Cut
from diffusion_lab.likelihood.dequantisation import Dequantisation, TruncatedNormal, Uniform
from diffusion_lab.likelihood.meters import Meter
from diffusion_lab.likelihood.ode import ODELikelihood, ODEResult
from diffusion_lab.likelihood.settings import BitsPerDim
from diffusion_lab.likelihood.settings_ode import BitsPerDimODE
from diffusion_lab.likelihood.variational import VariationalDequantisation, fit_dequantisation

__all__ = [
    "BitsPerDim",
    "BitsPerDimODE",
    "BoundEstimate",
    "BoundEvaluation",
    "Cut",
    "Dequantisation",
    "Interval",
    "Meter",
    "ODELikelihood",
    "ODEResult",
    "TruncatedNormal",
    "Uniform",
    "VariationalDequantisation",
    "bits",
    "bits_per_dim",
    "fit_dequantisation",
    "interval",
]
