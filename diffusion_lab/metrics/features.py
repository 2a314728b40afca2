r"""What a distance between image sets is measured in: maps from bytes to feature vectors, each with a name and a hash.

    uint8 (N, C, H, W)  --extractor-->  float32 (N, d)

Bytes only: real images and samples then pass the same quantisation, and nobody can feed [0, 1] where [-1, 1] is
meant.

| extractor | features | weights |
| --- | --- | --- |
| `Pixels` | the pixels in [-1, 1] | none |
| `Coordinates` | points of a vector space as they are (the one that takes floats) | none |
| `DigitsCNN` | 32 of a classifier of 8x8 digits | in the package |
| `UpsampledDigitsCNN` | the same, of larger digits averaged back to 8x8 | in the package |
| `MNISTCNN` | 64 of a classifier of MNIST | in the package |
| `Inception` (`metrics/inception.py`) | 2048 of the Inception network of the FID | a file |
| `DINOv2`, `CLIP` (`metrics/vision_transformers.py`) | 1024, 768 of the transformers of FD-DINOv2 and CMMD | a folder |

An extractor may have more outputs than its features, from the same pass: `logits`, the scores of classes, and
`spatial`, features that still know where they are. `extract` asks for them by name. A `Classifier` is one whose classes
are those of the data; `diffusion_lab.metrics.train_classifier` makes the weights of ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.images import to_float
from diffusion_lab.metrics.inception import Inception
from diffusion_lab.metrics.small_cnn import SmallCNN

__all__ = [
    "FEATURES",
    "LOGITS",
    "SPATIAL",
    "Classifier",
    "Coordinates",
    "DigitsCNN",
    "FeatureExtractor",
    "Inception",
    "MNISTCNN",
    "ManyOutputs",
    "Pixels",
    "UpsampledDigitsCNN",
    "extract",
    "offered",
]

FEATURES, LOGITS, SPATIAL = "features", "logits", "spatial"

WEIGHTS = Path(__file__).parent / "weights"


@runtime_checkable
class FeatureExtractor(Protocol):
    """A map from images to feature vectors that knows its identity."""

    name: str
    """Short name for tables, such as `digits-cnn`."""
    dim: int | None
    """Length of a feature vector; None where it is that of the data."""
    sha256: str
    """Hash of the weights file, or of the definition where there are no weights."""
    resize: str
    """How images are resized before the features, "none" where they are not."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features `(N, d)`, float32, of images `(N, C, H, W)` uint8."""
        ...


@runtime_checkable
class Classifier(FeatureExtractor, Protocol):
    """A feature extractor that also says which class it sees."""

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features `(N, d)` and class logits `(N, K)` from one pass."""
        ...


@runtime_checkable
class ManyOutputs(FeatureExtractor, Protocol):
    """A feature extractor with outputs besides the features."""

    outputs: tuple[str, ...]
    """Their names, `features` among them."""

    def extract(self, images: Tensor, outputs: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the outputs asked for, `(N, d)` each, from one pass over images `(N, C, H, W)` uint8."""
        ...


def offered(extractor: FeatureExtractor) -> tuple[str, ...]:
    """Return the names of an extractor's outputs."""
    if isinstance(extractor, ManyOutputs):
        return extractor.outputs
    return (FEATURES, LOGITS) if isinstance(extractor, Classifier) else (FEATURES,)


def extract(extractor: FeatureExtractor, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Return outputs of an extractor from one pass.

    Args:
        extractor: The extractor.
        images: `(N, C, H, W)` uint8, or points.
        outputs: Names of outputs.

    Returns:
        Each output `(N, d)`.

    Raises:
        ValueError: If the extractor has no such output.
    """
    unknown = [name for name in outputs if name not in offered(extractor)]
    if unknown:
        raise ValueError(f"{extractor.name} has the outputs {', '.join(offered(extractor))}, no {unknown[0]}")
    if isinstance(extractor, ManyOutputs):
        return dict(extractor.extract(images, outputs))
    if LOGITS in outputs and isinstance(extractor, Classifier):
        features, logits = extractor.features_and_logits(images)
        return {FEATURES: features, LOGITS: logits}
    return {FEATURES: extractor(images)}


class Pixels(nn.Module):
    """The pixels themselves, in [-1, 1], so that a distance is in the units of x0."""

    name = "pixels"
    dim: int | None = None
    resize = "none"
    sha256 = hashlib.sha256(b"pixels: level / 127.5 - 1, flattened").hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, C H W)` of uint8 `(N, C, H, W)`.

        Raises:
            TypeError: If the images are not uint8.
        """
        return to_float(images).flatten(1)


class Coordinates(nn.Module):
    """Data that are no images: points `(N, D)` of any floating-point dtype, taken as they are."""

    name = "coordinates"
    dim: int | None = None
    resize = "none"
    sha256 = hashlib.sha256(b"coordinates: the points as they are").hexdigest()

    def forward(self, points: Tensor) -> Tensor:
        """Return the points.

        Raises:
            TypeError: If they are not floats: bytes are images, and have other extractors.
        """
        if not points.is_floating_point():
            raise TypeError(f"coordinates are floats, not {points.dtype}; for images use pixels")
        return points.flatten(1)


class CNNFeatures(nn.Module):
    """Features of a `SmallCNN` from a safetensors file; `metadata` says how it was trained and how good it is.

    Args:
        name: Name for tables.
        weights_path: The file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a file of `train_classifier`.
    """

    def __init__(self, *, name: str, weights_path: Path) -> None:
        super().__init__()
        self.name = name
        self.resize = "none"
        if not weights_path.is_file():
            raise FileNotFoundError(
                f"no weights of {name} at {weights_path}; python -m diffusion_lab.metrics.train_classifier makes them"
            )
        self.sha256 = hashlib.sha256(weights_path.read_bytes()).hexdigest()
        try:
            with safe_open(weights_path, framework="pt") as file:
                self.metadata: dict[str, str] = json.loads((file.metadata() or {})["training"])
                state = {key: file.get_tensor(key) for key in file.keys()}
            architecture = json.loads(self.metadata["architecture"])
            self.network = SmallCNN(**architecture)
            self.network.load_state_dict(state)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{weights_path} does not hold a classifier of {name}: {error}") from error
        self.dim: int | None = architecture["dim"]
        self.requires_grad_(False)

    @property
    def test_accuracy(self) -> float:
        """Share of the real test images that the classifier recognises."""
        return float(self.metadata["test_accuracy"])

    def forward(self, images: Tensor) -> Tensor:
        """Return the features `(N, dim)` of uint8 `(N, 1, size, size)`."""
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features `(N, dim)` and logits `(N, 10)`.

        Raises:
            TypeError: If the images are not uint8.
            ValueError: If their shape is another one; nothing is resized here.
        """
        size = self.network.size
        if images.ndim != 4 or tuple(images.shape[1:]) != (1, size, size):
            raise ValueError(
                f"{self.name} takes images (N, 1, {size}, {size}), not {tuple(images.shape)}: choose another metrics=, "
                "such as inception"
            )
        with torch.no_grad():
            return self.network(to_float(images))


class DigitsCNN(CNNFeatures):
    """32 features of a classifier of scikit-learn's 8x8 digits, trained on their train split.

    So few that the 360 images of the test split give a covariance of full rank.

    Args:
        weights_path: Another weights file than the packaged one.
    """

    def __init__(self, *, weights_path: str | Path | None = None) -> None:
        path = WEIGHTS / "digits_cnn.safetensors" if weights_path is None else Path(weights_path)
        super().__init__(name="digits-cnn", weights_path=path)


class MNISTCNN(CNNFeatures):
    """64 features of a classifier of MNIST, 28x28, trained on its 60,000 training images.

    Args:
        weights_path: Another weights file than the packaged one.
    """

    def __init__(self, *, weights_path: str | Path | None = None) -> None:
        path = WEIGHTS / "mnist_cnn.safetensors" if weights_path is None else Path(weights_path)
        super().__init__(name="mnist-cnn", weights_path=path)


class UpsampledDigitsCNN(DigitsCNN):
    """The features of `DigitsCNN` for digits of a larger side: blocks of pixels are averaged back to 8x8 first.

    Args:
        weights_path: Another weights file than the packaged one.
    """

    def __init__(self, *, weights_path: str | Path | None = None) -> None:
        super().__init__(weights_path=weights_path)
        self.name, self.resize = "digits-cnn", "block means, to 8x8"

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features `(N, dim)` and logits `(N, 10)`.

        Raises:
            TypeError: If the images are not uint8.
            ValueError: If they are not square with a side that is a multiple of 8.
        """
        size = self.network.size
        side = images.shape[-1]
        if images.ndim != 4 or tuple(images.shape[1:]) != (1, side, side) or side % size:
            raise ValueError(
                f"{self.name} takes square images (N, 1, {size} k, {size} k), not {tuple(images.shape)}"
            )
        with torch.no_grad():
            return self.network(F.avg_pool2d(to_float(images), side // size))
