"""Handwritten digits that ship with scikit-learn: real images, offline, small enough for a laptop CPU.

1,797 scans of digits by 43 people, reduced to 8x8 counts of 0 to 16 dark sub-pixels; about 180 a class. Counts become
bytes as round(255 count / 16), so 17 of the 256 levels occur.

Larger sides repeat each pixel in a block: the same images with more pixels, on which what changes with resolution
(schedules, networks) can be tried where it takes minutes.

The split is fixed: every fifth image (index % 5 == 0, 360 images) is the test set, the other 1,437 are for training.

Source:
    Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, its test
    part; licence CC BY 4.0. Read through scikit-learn (BSD-3).
"""

from __future__ import annotations

import numpy as np
import torch

from diffusion_lab.data.base import DataModule
from diffusion_lab.data.loader import InMemory, Source


class Digits(DataModule):
    """scikit-learn's digits, `(1, size, size)`, 10 classes.

    Args:
        size: Side in pixels, a multiple of 8.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.

    Raises:
        ValueError: If `size` is not a multiple of 8.
    """

    num_classes = 10

    def __init__(self, *, size: int = 8, batch_size: int, seed: int, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if size < 8 or size % 8:
            raise ValueError(f"digits have sides that are multiples of 8, got size={size}")
        self.size, self.shape = size, (1, size, size)
        self.name = "digits" if size == 8 else f"digits{size}"

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        # imported here because scikit-learn takes a second to load and other data sets do without
        from sklearn.datasets import load_digits

        digits = load_digits()
        test = np.arange(len(digits.target)) % 5 == 0
        keep = test if split == "test" else ~test
        images = np.round(255.0 * digits.images[keep] / 16.0).astype(np.uint8)
        images = images.repeat(self.size // 8, axis=1).repeat(self.size // 8, axis=2)
        return InMemory(
            torch.from_numpy(images)[:, None], torch.from_numpy(digits.target[keep].astype(np.int64))
        )
