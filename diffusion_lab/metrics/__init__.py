"""Numbers about image sets, each with the protocol under which it was measured.

    uint8 images --features--> vectors --stats--> mean, covariance --frechet--> distance --protocol--> Record

`quality.evaluate` and `quality.evaluate_images` do all of it in one pass.
"""

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
from diffusion_lab.metrics.protocol import FID50K, Protocol, Record, Source, describe_seeds, standard_protocol
from diffusion_lab.metrics.quality import evaluate, evaluate_images
from diffusion_lab.metrics.reference import Reference, reference_statistics
from diffusion_lab.metrics.stats import GaussianStats, gaussian_stats

__all__ = [
    "FID50K",
    "MNISTCNN",
    "Classifier",
    "Coordinates",
    "DigitsCNN",
    "FeatureExtractor",
    "GaussianStats",
    "Inception",
    "Pixels",
    "Protocol",
    "Record",
    "Reference",
    "Source",
    "describe_seeds",
    "evaluate",
    "evaluate_images",
    "frechet_distance",
    "frechet_from_stats",
    "gaussian_stats",
    "reference_statistics",
    "standard_protocol",
]
