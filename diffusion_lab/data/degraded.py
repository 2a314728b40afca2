r"""Pairs made of one data set: each image with a spoilt copy of itself, the source of a bridge or a condition.

    image = enlarge(A(x0)) + noise n,      n standard normal, pixels in [-1, 1]

A is any measurement that makes images (`measurements/`); where it makes them smaller, pixels are repeated. Noise comes
last and everywhere, also where a mask has blanked: a law that fills all dimensions is one that an ODE can spread.

In training n is a function of the run's seed and the example's position. A sample made later belongs to one test image,
which it shares with every sample of the same seed and class, and n is a function of its seed:

    without labels    test image  s mod N                          s the sample's seed
    with              the (s div K) mod N_c-th test image of class c,     K classes

References:
    Albergo, Goldstein, Boffi, Ranganath & Vanden-Eijnden, "Stochastic Interpolants with Data-Dependent Couplings",
        2024, section 4 (super-resolution and inpainting from spoilt copies with noise added).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_lab.data.base import DataModule
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import Batch, Examples, Source
from diffusion_lab.images import to_float
from diffusion_lab.measurements import Operator
from diffusion_lab.rng import SampleRNG, derive_seed


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """How an image is spoilt.

    Attributes:
        operator: A; it must make images of as many channels as it is given, and no larger.
        noise: Standard deviation of what is added, at least 0.

    Raises:
        ValueError: If `noise` is negative, or (at call) the operator makes no such images.
    """

    operator: Operator
    noise: float

    def __post_init__(self) -> None:
        if not self.noise >= 0.0:
            raise ValueError(f"a degradation needs noise >= 0, got {self.noise}")

    def __call__(self, x0: Tensor, streams: Sequence[int]) -> Tensor:
        """Return spoilt copies of `x0` `(B, C, H, W)`, floats in [-1, 1]; each with the noise of its own stream."""
        y = self.operator(x0)
        if y.ndim != 4 or y.shape[1] != x0.shape[1] or y.shape[2] > x0.shape[2] or y.shape[3] > x0.shape[3]:
            raise ValueError(
                f"{type(self.operator).__name__} makes {tuple(y.shape[1:])} of images {tuple(x0.shape[1:])}: "
                "a degradation must make images of as many channels, and no larger"
            )
        if y.shape[2:] != x0.shape[2:]:
            y = interpolate(y, size=x0.shape[2:], mode="nearest")
        return y + self.noise * SampleRNG(streams).randn(x0.shape[1:]) if self.noise > 0.0 else y


def _floats(images: Tensor) -> Tensor:
    return to_float(images) if images.dtype == torch.uint8 else images.float()


class DegradedExamples(Examples):
    """The run's endless sequence of examples, with the spoilt copy of each under `image`.

    Args:
        source: See `Examples`.
        seed: See `Examples`.
        flip: See `Examples`; the copy is one of the mirrored image.
        degradation: How they are spoilt.
    """

    def __init__(self, *, source: Source, seed: int, flip: bool = False, degradation: Degradation) -> None:
        super().__init__(source=source, seed=seed, flip=flip)
        self.degradation = degradation

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Return `{"x0", "label", "image" (B, *D) float}`; see `Examples`."""
        batch = super().__getitems__(positions)
        streams = [derive_seed("degraded", self.seed, int(k)) % 2**32 for k in positions]
        return {**batch, "image": self.degradation(_floats(batch["x0"]), streams)}


class Degraded(DataModule):
    """A data set of images, each with a spoilt copy.

    Args:
        data: The data set.
        operator: See `Degradation`.
        noise: See `Degradation`.

    Raises:
        ValueError: If `noise` is negative, the operator does not fit the images, or the data are no images.
    """

    def __init__(self, *, data: DataModule, operator: Operator, noise: float) -> None:
        super().__init__(
            batch_size=data.batch_size, seed=data.seed, num_workers=data.num_workers, flip=data.flip
        )
        self.data, self.degradation = data, Degradation(operator=operator, noise=noise)
        self.name, self.shape, self.num_classes = data.name, data.shape, data.num_classes
        if not getattr(data, "pixels", True):
            raise ValueError(f"{type(data).__name__} holds no pixels to spoil")
        # what does not fit says so now
        self.degradation(torch.zeros(1, *self.shape), [0])

    @property
    def class_names(self) -> Sequence[str]:
        """See `DataModule.class_names`."""
        return self.data.class_names

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        return self.data.source(split)

    def examples(self) -> Examples:
        """See `DataModule.examples`."""
        return DegradedExamples(
            source=self._source("train"), seed=self.seed, flip=self.flip, degradation=self.degradation
        )

    def originals(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        """See `DataModule.originals`."""
        rows = self._rows(seeds, labels)
        return _floats(self._source("test").read(rows)[0])

    def conditions(self, seeds: Sequence[int], labels: Tensor | None) -> dict[str, Tensor]:
        """See `DataModule.conditions`: spoilt copies of test images, under `image`."""
        streams = [derive_seed("degraded sample", int(seed)) % 2**32 for seed in seeds]
        return {"image": self.degradation(self.originals(seeds, labels), streams)}

    def _rows(self, seeds: Sequence[int], labels: Tensor | None) -> np.ndarray:
        """Test images that samples belong to."""
        at = np.asarray(list(seeds), dtype=np.int64)
        if labels is None or self.num_classes == 0:
            return at % len(self._source("test"))
        wanted, by_class = labels.cpu().numpy(), self._by_class()
        missing = next((int(c) for c in wanted if not len(by_class[c])), None)
        if missing is not None:
            raise DataError(f"{self.name} has no test image of class {missing} to start from")
        turn = at // self.num_classes
        pairs = zip(wanted, turn, strict=True)
        return np.asarray([by_class[c][k % len(by_class[c])] for c, k in pairs], dtype=np.int64)

    def _by_class(self) -> list[np.ndarray]:
        """Test images of every class; kept, for it means reading all of them once."""
        if not hasattr(self, "_places"):
            label = self.test_images()[1]
            assert label is not None
            self._places = [np.flatnonzero(label.numpy() == c) for c in range(self.num_classes)]
        return self._places
