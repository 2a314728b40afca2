"""Numbers about sets of images: one file a measure, over the summaries of `metrics/collect.py`."""

from diffusion_lab.metrics.measures.accuracy import Accuracy
from diffusion_lab.metrics.measures.base import Measure, Quantity, Reading, Sets
from diffusion_lab.metrics.measures.cmmd import CMMD
from diffusion_lab.metrics.measures.frechet import Frechet
from diffusion_lab.metrics.measures.inception_score import InceptionScore
from diffusion_lab.metrics.measures.kernel import Kernel
from diffusion_lab.metrics.measures.memorisation import Memorisation
from diffusion_lab.metrics.measures.prdc import PRDC

__all__ = [
    "Accuracy",
    "CMMD",
    "Frechet",
    "InceptionScore",
    "Kernel",
    "Measure",
    "Memorisation",
    "PRDC",
    "Quantity",
    "Reading",
    "Sets",
]
