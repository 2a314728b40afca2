"""Noise schedules, one family a file; `base.py` says what a schedule is."""

from diffusion_lab.process.schedules.adaptive import AdaptiveSchedule
from diffusion_lab.process.schedules.base import Schedule
from diffusion_lab.process.schedules.cosine import Cosine, InterpolatedCosine, ShiftedCosine
from diffusion_lab.process.schedules.karras import Karras, LogitNormal, LogNormal
from diffusion_lab.process.schedules.learned import LearnedCurve, LearnedLinear, LearnedSchedule
from diffusion_lab.process.schedules.linear import LinearBeta, LinearLogSNR
from diffusion_lab.process.schedules.offset_cosine import OffsetCosine
from diffusion_lab.process.schedules.sd3 import ModeSampling, ShiftedFlow
from diffusion_lab.process.schedules.sigmoid import Sigmoid

__all__ = [
    "AdaptiveSchedule",
    "Cosine",
    "InterpolatedCosine",
    "Karras",
    "LearnedCurve",
    "LearnedLinear",
    "LearnedSchedule",
    "LinearBeta",
    "LinearLogSNR",
    "LogNormal",
    "LogitNormal",
    "OffsetCosine",
    "ModeSampling",
    "Schedule",
    "ShiftedCosine",
    "ShiftedFlow",
    "Sigmoid",
]
