"""Guidance: denoisers that wrap denoisers, so that they compose with each other and with every sampler."""

from diffusion_lab.guidance.classifier_free import ClassifierFree
from diffusion_lab.guidance.unguided import Unguided, unguided

__all__ = ["ClassifierFree", "Unguided", "unguided"]
