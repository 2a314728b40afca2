"""Posterior sampling: denoisers that are told a measurement y = A(x0) + noise of the sample they are to make.

Only `ExactTweedie` is calibrated where x0 given x is Gaussian; `PiGDM` is for white Gaussian data of known variance.
What the others are biased by, each module says. `Particles` and `FeynmanKacCorrector` steer many copies of a sample, by
a reward (a measurement's likelihood among them) or the weights that guidance lacks; both are exact as copies grow.
"""

from diffusion_lab.posterior.dps import DPS
from diffusion_lab.posterior.feynman_kac import FeynmanKacCorrector
from diffusion_lab.posterior.mcg import MCG
from diffusion_lab.posterior.particles import Particles
from diffusion_lab.posterior.pigdm import PiGDM
from diffusion_lab.posterior.reconstruction import ReconstructionGuidance
from diffusion_lab.posterior.red_diff import REDDiff
from diffusion_lab.posterior.replacement import Replacement
from diffusion_lab.posterior.tweedie import ExactTweedie

__all__ = [
    "DPS",
    "MCG",
    "ExactTweedie",
    "FeynmanKacCorrector",
    "Particles",
    "PiGDM",
    "REDDiff",
    "ReconstructionGuidance",
    "Replacement",
]
