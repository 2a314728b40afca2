"""Numbers about image sets, each with the protocol under which it was measured.

    uint8 images --features--> vectors --collect--> summaries --measures--> numbers --protocol--> Record

`quality.evaluate_images` does all of it in one pass.
"""

from diffusion_lab.metrics.collect import Collected, collect
from diffusion_lab.metrics.features import (
    MNISTCNN,
    Classifier,
    Coordinates,
    DigitsCNN,
    FeatureExtractor,
    Inception,
    Pixels,
)
from diffusion_lab.metrics.frechet import frechet_distance, frechet_from_stats
from diffusion_lab.metrics.neighbours import precision_recall
from diffusion_lab.metrics.protocol import FID50K, Protocol, Record, Source, describe_seeds, standard_protocol
from diffusion_lab.metrics.quality import Real, evaluate_images, judge
from diffusion_lab.metrics.reference import collect_kept
from diffusion_lab.metrics.stats import GaussianStats, gaussian_stats
from diffusion_lab.metrics.vision_transformers import CLIP, DINOv2

__all__ = [
    "CLIP",
    "DINOv2",
    "FID50K",
    "MNISTCNN",
    "Classifier",
    "Collected",
    "Coordinates",
    "DigitsCNN",
    "FeatureExtractor",
    "GaussianStats",
    "Inception",
    "Pixels",
    "Protocol",
    "Record",
    "Real",
    "Source",
    "collect",
    "collect_kept",
    "describe_seeds",
    "evaluate_images",
    "frechet_distance",
    "frechet_from_stats",
    "gaussian_stats",
    "judge",
    "precision_recall",
    "standard_protocol",
]
