"""Guidance: denoisers that wrap denoisers, so that they compose with each other and with every sampler."""

from diffusion_lab.guidance.classifier_free import ClassifierFree
from diffusion_lab.guidance.eps_scaling import EpsScaling
from diffusion_lab.guidance.thresholding import DynamicThreshold, StaticThreshold
from diffusion_lab.guidance.time_shift import TimeShift
from diffusion_lab.guidance.unguided import Unguided, unguided

__all__ = [
    "ClassifierFree",
    "DynamicThreshold",
    "EpsScaling",
    "StaticThreshold",
    "TimeShift",
    "Unguided",
    "unguided",
]
