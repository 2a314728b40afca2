"""Noise schedules, one family a file; `base.py` says what a schedule is."""

from diffusion_lab.process.schedules.base import Schedule
from diffusion_lab.process.schedules.cosine import Cosine, InterpolatedCosine, ShiftedCosine
from diffusion_lab.process.schedules.karras import Karras, LogitNormal, LogNormal
from diffusion_lab.process.schedules.linear import LinearBeta, LinearLogSNR
from diffusion_lab.process.schedules.sigmoid import Sigmoid

__all__ = [
    "Cosine",
    "InterpolatedCosine",
    "Karras",
    "LinearBeta",
    "LinearLogSNR",
    "LogNormal",
    "LogitNormal",
    "Schedule",
    "ShiftedCosine",
    "Sigmoid",
]
