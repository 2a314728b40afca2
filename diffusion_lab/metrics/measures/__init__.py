"""Numbers about sets of images: one file a measure, over the summaries of `metrics/collect.py`."""

from diffusion_lab.metrics.measures.accuracy import Accuracy
from diffusion_lab.metrics.measures.base import Measure, Quantity, Reading, Sets
from diffusion_lab.metrics.measures.frechet import Frechet

__all__ = ["Accuracy", "Frechet", "Measure", "Quantity", "Reading", "Sets"]
