"""CIFAR-10 in whatever shape it lies there, and its lossy copies.

    <root>/cifar-10-python.tar.gz, cifar-10-binary.tar.gz or the unpacked folder      read into memory (184 MB)
    <root>/{train,test}-*.tar                                                         shards
    <root>/{train,test}/<class>/*.png                                                 a folder of pictures

`CIFAR10JPEG` reads copies that went through JPEG at quality 75: good for trying things out. They are not the data
set of the papers, so no score on them is one on CIFAR-10, and their name says so wherever it is recorded.

Source:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; 50,000 + 10,000 pictures, 32x32.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffusion_lab.data.archives import CIFAR_CLASSES, CIFAR_URL, find_cifar, read_cifar, read_npz
from diffusion_lab.data.base import DataModule
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.image_folder import ImageFolder
from diffusion_lab.data.loader import InMemory, Source
from diffusion_lab.data.pictures import BROKEN, Preparation, channels_first, reason
from diffusion_lab.data.progress import progress
from diffusion_lab.data.shards.paths import has_shards


class CIFAR10(ImageFolder):
    """CIFAR-10, `(3, 32, 32)`, 10 classes.

    Args:
        root: Folder with the archive, the shards or the pictures.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`; none are needed for an archive.
        flip: See `DataModule`.
    """

    def __init__(
        self, *, root: str, batch_size: int, seed: int, num_workers: int = 0, flip: bool = False
    ) -> None:
        super().__init__(
            root=root,
            shape=(3, 32, 32),
            num_classes=10,
            how_to_get=f"curl -O {CIFAR_URL}, and put it there, or set dataset.root or DIFFUSION_LAB_DATA",
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            flip=flip,
        )
        self.name = "cifar10"

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes: of the folders, or the published ones."""
        return CIFAR_CLASSES if has_shards(self.root) or find_cifar(self.root) else super().class_names

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        found = find_cifar(self.root)
        if found is None or has_shards(self.root):
            return super().source(split)
        bundle = read_cifar(found, split)
        assert bundle.pixels is not None
        return InMemory(channels_first(bundle.pixels), torch.from_numpy(bundle.labels))


class CIFAR10JPEG(DataModule):
    """CIFAR-10 as JPEG of quality 75, `(3, 32, 32)`, 10 classes, decoded into memory (184 MB).

    Args:
        root: Folder with cifar10-jpeg-train.npz and cifar10-jpeg-test.npz. None means the environment variable
            DIFFUSION_LAB_DATA.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.
        flip: See `DataModule`.
    """

    name = "cifar10-jpeg75-lossy"
    shape = (3, 32, 32)
    num_classes = 10

    def __init__(
        self,
        *,
        root: str | None = None,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip)
        self.root = Path(root or os.environ.get("DIFFUSION_LAB_DATA") or "data")

    def setup(self, stage: str | None = None) -> None:
        """Open both splits: a missing test set is said now, not after the training that it was to score."""
        for split in ("train", "test"):
            self._path(split)
        super().setup(stage)

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes."""
        return CIFAR_CLASSES

    def _path(self, split: str) -> Path:
        path = self.root / f"cifar10-jpeg-{split}.npz"
        if not path.is_file():
            raise DataError(
                f"there is no {path}: name its folder by dataset.root or DIFFUSION_LAB_DATA, or take dataset=cifar10"
            )
        return path

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        path, prepare = self._path(split), Preparation(size=32, channels=3)
        bundle = read_npz(path)
        if bundle.file is None or bundle.labels is None:
            raise DataError(f"{path} holds no JPEG files with labels")
        pixels = np.empty((bundle.n, 32, 32, 3), dtype=np.uint8)
        with progress(f"decoding {split}", bundle.n, unit="images") as tell:
            for k in range(bundle.n):
                try:
                    pixels[k] = prepare(io.BytesIO(bundle.file(k)))
                except BROKEN as error:
                    raise DataError(f"{path}: picture {k} is not readable: {reason(error)}") from error
                tell(k + 1)
        return InMemory(channels_first(pixels), torch.from_numpy(bundle.labels))
