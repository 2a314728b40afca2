"""Your own pictures: a folder of PNG, JPEG or WebP files, or a folder of such folders, one a class.

    <root>/<class>/**/*.png      with labels, classes in alphabetical order
    <root>/*.png                 without labels

Where <root> has folders `train` and `test`, those are the splits; otherwise every tenth file, in alphabetical order, is
for testing. Files and folders whose name begins with a dot are passed over.

A picture is turned upright (EXIF), laid on white where it is transparent, reduced to 8 bits, and centre-cropped to a
square, resized with antialiasing: Pillow's box filter while it more than halves, then bicubic (ADM's preprocessing).

References:
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021 (preprocessing).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion_lab.data.base import DataModule
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import Source

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

# what Pillow's decoders raise over damaged files
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Return the centre square of `picture`, resized to `size` pixels a side; mode as given, "L" or "RGB"."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    wide = tuple(max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((wide[0], wide[1]), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """Return `picture` upright, without transparency, in `mode`, "L" or "RGB".

    Raises:
        ValueError: If its pixels are 32-bit integers or floats, whose range nobody knows.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        # convert() clips such grey levels at 255, which turns all but the darkest white
        picture = Image.fromarray(np.round(np.asarray(picture) / 257.0).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}, not 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def read_picture(path: Path, size: int, channels: int) -> Tensor:
    """Return a picture as uint8 `(channels, size, size)`.

    Raises:
        DataError: If it cannot be decoded; names the file.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(centre_crop(eight_bits(picture, "L" if channels == 1 else "RGB"), size))
    except BROKEN as error:
        raise DataError(f"{path} is not a readable image: {' '.join(str(error).split())}") from error
    return torch.from_numpy(np.array(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)))


class Pictures:
    """A source of files that are decoded when read.

    Args:
        paths: Files.
        labels: One for each file, or None.
        size: Side in pixels.
        channels: 1 or 3.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int] | None, size: int, channels: int) -> None:
        self.paths, self.size, self.channels = list(paths), size, channels
        self.labels = None if labels is None else torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """See `Source`."""
        images = torch.stack([read_picture(self.paths[k], self.size, self.channels) for k in indices])
        return images, None if self.labels is None else self.labels[torch.from_numpy(indices)]


class ImageFolder(DataModule):
    """Pictures below a folder.

    Args:
        root: The folder.
        shape: `(channels, size, size)`; 1 channel for grey, 3 for colour.
        num_classes: Number of class folders; 0 to ignore classes.
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
        self.name = self.root.name or "image_folder"

    def _classes(self, folder: Path) -> list[str]:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(names) != self.num_classes:
            raise DataError(f"{folder} has {len(names)} class folders, but num_classes={self.num_classes}")
        return names

    def _labels(self, folder: Path, paths: Sequence[Path]) -> list[int]:
        classes = {name: k for k, name in enumerate(self.class_names)}
        if self._classes(folder) != list(classes):
            raise DataError(f"{folder} has other class folders than {self._folder('train')}")
        stray = next((p for p in paths if p.parent == folder), None)
        if stray is not None:
            raise DataError(f"{stray} is in no class folder, but num_classes={self.num_classes}")
        return [classes[p.relative_to(folder).parts[0]] for p in paths]

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the class folders."""
        return self._classes(self._folder("train")) if self.num_classes else []

    def _folder(self, split: str) -> Path:
        if not self.root.is_dir():
            raise DataError(f"there is no folder {self.root}: set dataset.root")
        own = self.root / split
        return own if own.is_dir() and (self.root / "test").is_dir() else self.root

    @staticmethod
    def _wanted(path: Path) -> bool:
        """Whether a path below the folder is a picture's; `._0.png` and `.thumbnails/0.png` are not."""
        return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        folder = self._folder(split)
        paths = sorted(p for p in folder.rglob("*") if self._wanted(p.relative_to(folder)) and p.is_file())
        if folder == self.root:
            paths = [p for k, p in enumerate(paths) if (k % 10 == 9) == (split == "test")]
        if not paths:
            raise DataError(f"{folder} holds no images for the {split} split ({', '.join(sorted(SUFFIXES))})")
        labels = self._labels(folder, paths) if self.num_classes else None
        return Pictures(paths, labels, self.shape[1], self.shape[0])
