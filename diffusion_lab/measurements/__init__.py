"""Measurements y = A(x0) + noise: what posterior samplers are told about an image."""

from diffusion_lab.measurements.averages import Colourise, SuperResolution
from diffusion_lab.measurements.base import Masking, Operator, adjoint, measure
from diffusion_lab.measurements.blur import GaussianBlur, MotionBlur
from diffusion_lab.measurements.inpaint import Inpaint
from diffusion_lab.measurements.jpeg import JPEGLike
from diffusion_lab.measurements.linear import Linear
from diffusion_lab.measurements.phase import PhaseRetrieval

__all__ = [
    "Colourise",
    "GaussianBlur",
    "Inpaint",
    "JPEGLike",
    "Linear",
    "Masking",
    "MotionBlur",
    "Operator",
    "PhaseRetrieval",
    "SuperResolution",
    "adjoint",
    "measure",
]
