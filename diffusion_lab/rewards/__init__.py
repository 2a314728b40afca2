"""Rewards: numbers for clean samples, by which particle methods steer."""

from diffusion_lab.rewards.base import Reward
from diffusion_lab.rewards.brightness import Brightness
from diffusion_lab.rewards.classifier import ClassLogProbability
from diffusion_lab.rewards.digit import DigitProbability
from diffusion_lab.rewards.measurement import MeasurementLikelihood
from diffusion_lab.rewards.none import NoReward

__all__ = [
    "Brightness",
    "ClassLogProbability",
    "DigitProbability",
    "MeasurementLikelihood",
    "NoReward",
    "Reward",
]
