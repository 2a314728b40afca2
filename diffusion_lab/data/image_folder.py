"""Your own pictures: a folder of PNG, JPEG or WebP files, or a folder of such folders, one a class.

    <root>/<class>/**/*.png      with labels, classes in alphabetical order
    <root>/*.png                 without labels
    <root>/train-*.tar           the same as shards, which `python -m diffusion_lab.data.convert` makes of such a folder

Where <root> has a folder `train`, that is the training split, and `test` or `val` beside it the other; otherwise every
tenth file, in alphabetical order, is for testing. Files and folders whose name begins with a dot are passed over.

How a picture becomes pixels is in `pictures.py`: centre crop and antialiased resizing, ADM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.data.base import DataModule
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import Source
from diffusion_lab.data.pictures import (
    BROKEN,
    SUFFIXES,
    Preparation,
    centre_crop,
    eight_bits,
    read_picture,
    read_pictures,
)
from diffusion_lab.data.shards.manifest import read_classes
from diffusion_lab.data.shards.paths import has_shards
from diffusion_lab.data.shards.reader import open_shards

__all__ = ["BROKEN", "SUFFIXES", "ImageFolder", "Pictures", "centre_crop", "eight_bits", "read_picture"]


class Pictures:
    """A source of files that are decoded when read.

    Args:
        paths: Files.
        labels: One for each file, or None.
        preparation: How they become pixels.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int] | None, preparation: Preparation) -> None:
        self.paths, self.preparation = list(paths), preparation
        self.labels = None if labels is None else torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """See `Source`."""
        images = read_pictures([self.paths[k] for k in indices], self.preparation)
        return images, None if self.labels is None else self.labels[torch.from_numpy(indices)]


class ImageFolder(DataModule):
    """Pictures below a folder, or shards in it.

    Args:
        root: The folder.
        shape: `(channels, size, size)`; 1 channel for grey, 3 for colour.
        num_classes: Number of class folders; 0 to ignore classes.
        how_to_get: Added to the message where the folder is missing.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.
        flip: See `DataModule`.

    Raises:
        ValueError: If the shape is not that of a square grey or colour image.
    """

    def __init__(
        self,
        *,
        root: str,
        shape: Sequence[int],
        num_classes: int,
        how_to_get: str | None = None,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip)
        channels, size, width = shape
        if channels not in (1, 3) or size != width:
            raise ValueError(f"image_folder needs a shape (1 or 3, side, side), got {tuple(shape)}")
        self.root, self.shape, self.num_classes = Path(root), (channels, size, size), num_classes
        self.preparation = Preparation(size=size, channels=channels)
        self.how_to_get = how_to_get
        self.name = self.root.name or "image_folder"

    def missing(self, what: str) -> DataError:
        """Return the error that says what is missing, and how to get it."""
        return DataError(f"{what}: {self.how_to_get or 'set dataset.root'}")

    def _classes(self, folder: Path) -> list[str]:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(names) != self.num_classes:
            raise DataError(f"{folder} has {len(names)} class folders, but num_classes={self.num_classes}")
        return names

    def _labels(self, folder: Path, paths: Sequence[Path]) -> list[int]:
        classes = {name: k for k, name in enumerate(self.class_names)}
        if self._classes(folder) != list(classes):
            raise DataError(f"{folder} has other class folders than {self.folder('train')}")
        stray = next((p for p in paths if p.parent == folder), None)
        if stray is not None:
            raise DataError(f"{stray} is in no class folder, but num_classes={self.num_classes}")
        return [classes[p.relative_to(folder).parts[0]] for p in paths]

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the class folders."""
        if not self.num_classes:
            return []
        if has_shards(self.root):
            return read_classes(self.root) or super().class_names
        return self._classes(self.folder("train"))

    def folder(self, split: str) -> Path:
        """Return the folder of a split: its own, or the one that both share."""
        if not self.root.is_dir():
            raise self.missing(f"there is no folder {self.root}")
        names = {p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")}
        test = next((name for name in ("test", "val") if name in names), None)
        if "train" in names and test is not None:
            return self.root / ("train" if split == "train" else test)
        # alone it is the training split, not one class of a thousand
        return self.root / "train" if names == {"train"} and self.num_classes != 1 else self.root

    @staticmethod
    def wanted(path: Path) -> bool:
        """Whether a path below the folder is a picture's; `._0.png` and `.thumbnails/0.png` are not."""
        return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)

    def shards(self, split: str) -> Source:
        """Return the shards of the folder as a source."""
        return open_shards(
            self.root,
            split,
            shape=self.shape,
            num_classes=self.num_classes,
            preparation=self.preparation,
        )

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        if has_shards(self.root):
            return self.shards(split)
        folder = self.folder(split)
        paths = sorted(p for p in folder.rglob("*") if self.wanted(p.relative_to(folder)) and p.is_file())
        if self.folder("train") == self.folder("test"):
            paths = [p for k, p in enumerate(paths) if (k % 10 == 9) == (split == "test")]
        if not paths:
            raise self.missing(
                f"{folder} holds no images for the {split} split ({', '.join(sorted(SUFFIXES))})"
            )
        labels = self._labels(folder, paths) if self.num_classes else None
        return Pictures(paths, labels, self.preparation)
