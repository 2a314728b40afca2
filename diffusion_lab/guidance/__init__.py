"""Guidance: denoisers that wrap denoisers, so that they compose with each other and with every sampler."""

from diffusion_lab.guidance.autoguidance import AutoGuidance
from diffusion_lab.guidance.cads import CADS
from diffusion_lab.guidance.classifier_free import ClassifierFree
from diffusion_lab.guidance.composition import Composition
from diffusion_lab.guidance.distilled import Distilled
from diffusion_lab.guidance.eps_scaling import EpsScaling
from diffusion_lab.guidance.predictor_corrector import PredictorCorrectorGuidance
from diffusion_lab.guidance.projected import Projected
from diffusion_lab.guidance.rescale import Rescale
from diffusion_lab.guidance.skip_layer import SkipLayer
from diffusion_lab.guidance.thresholding import DynamicThreshold, StaticThreshold
from diffusion_lab.guidance.time_shift import TimeShift
from diffusion_lab.guidance.unguided import Unguided, unguided

__all__ = [
    "CADS",
    "AutoGuidance",
    "ClassifierFree",
    "Composition",
    "Distilled",
    "DynamicThreshold",
    "EpsScaling",
    "PredictorCorrectorGuidance",
    "Projected",
    "Rescale",
    "SkipLayer",
    "StaticThreshold",
    "TimeShift",
    "Unguided",
    "unguided",
]
