r"""Sets of images that are read piece by piece: in memory, an array on the disk, a folder of pictures, a split.

    ImageSet:    len, shape, labels, read(rows) -> images uint8 (B, C, H, W)

Only `Held` holds a whole set. Of a folder only the headers are read at first, so that a picture of another size or
another kind than its neighbours is named before anything is computed. Pictures are taken as they are: whoever compares
images must not resize them on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import Source
from diffusion_lab.data.pictures import BROKEN, FORMATS, SUFFIXES, channels_first, eight_bits, reason

LOSSLESS = {".png", ".bmp"}
AT_ONCE = 4096
GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")


class ImageSet(Protocol):
    """Images, or points, that can be read by row."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    @property
    def name(self) -> str:
        """What messages call the set."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one, `(C, H, W)` or `(D,)`."""
        ...

    @property
    def quantised(self) -> bool:
        """Whether they are bytes."""
        ...

    @property
    def quantisation(self) -> str:
        """What is to be said of the bytes where a format was lossy; else ""."""
        ...

    @property
    def labels(self) -> Tensor | None:
        """All labels `(N,)` int64, or None."""
        ...

    def read(self, rows: Tensor) -> Tensor:
        """Return the images of the rows `(B,)`: uint8 `(B, C, H, W)`, or floats `(B, D)`.

        Raises:
            DataError: If one cannot be read.
        """
        ...


class Held:
    """A set in memory.

    Args:
        images: `(N, C, H, W)` uint8, or points.
        labels: `(N,)`, or None.
        name: What messages call it.
    """

    quantisation = ""

    def __init__(self, images: Tensor, labels: Tensor | None = None, name: str = "images") -> None:
        self.images, self.labels, self.name = images, labels, name

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `ImageSet`."""
        return tuple(self.images.shape[1:])

    @property
    def quantised(self) -> bool:
        """See `ImageSet`."""
        return self.images.dtype == torch.uint8

    def read(self, rows: Tensor) -> Tensor:
        """See `ImageSet`."""
        return self.images[rows]


class Mapped:
    """Images in an array on the disk, channels last, or points.

    Args:
        array: `(N, H, W, C)` uint8, or `(N, D)` floats; in general a memory map.
        labels: `(N,)`, or None.
        name: What messages call it.

    Raises:
        DataError: If the array holds no images.
    """

    quantisation = ""

    def __init__(self, array: np.ndarray, labels: Tensor | None, name: str) -> None:
        self.array, self.labels, self.name = array, labels, name
        if array.ndim == 4 and array.dtype != np.uint8:
            raise DataError(
                f"{name}: images must be uint8, these are {array.dtype}; of floats in [0, 1] they are "
                "(x * 255).round().astype(np.uint8), of [-1, 1] ((x + 1) * 127.5).round().astype(np.uint8)"
            )
        if array.ndim == 3:
            raise DataError(
                f"{name}: images (N, H, W, C) are needed, there are {array.shape}; of grey ones (N, H, W) save "
                "images[..., None]"
            )
        if array.ndim not in (2, 4):
            raise DataError(f"{name}: images (N, H, W, C) are needed, there are {array.shape}")
        if array.ndim == 4 and array.shape[3] not in (1, 3):
            raise DataError(f"{name}: images have 1 or 3 channels in the last place, these are {array.shape}")
        if labels is not None and len(labels) != len(array):
            raise DataError(f"{name}: {len(array)} images have {len(labels)} labels")
        if labels is not None and labels.ndim != 1:
            raise DataError(f"{name}: labels are one number an image, these are {tuple(labels.shape)}")

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `ImageSet`."""
        rest = self.array.shape[1:]
        return (rest[2], rest[0], rest[1]) if len(rest) == 3 else tuple(rest)

    @property
    def quantised(self) -> bool:
        """See `ImageSet`."""
        return bool(self.array.dtype == np.uint8)

    def read(self, rows: Tensor) -> Tensor:
        """See `ImageSet`."""
        found = self.array[rows.numpy()]
        # in this machine's order of bytes
        part = torch.from_numpy(np.array(found, dtype=found.dtype.newbyteorder("=")))
        if part.ndim != 4:
            return part
        # a grey image counts as contiguous with channels last too, and a network's last bits depend on the strides
        return part.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


class PictureFiles:
    """The pictures below a folder, as they are: all of one size, all grey or all in colour.

    Args:
        root: The folder.
        skip_corrupt: Leave out pictures that cannot be read; each is decoded once more for that.
        on_skip: Called with the line that names a picture left out.

    Raises:
        DataError: If there are none, one cannot be read, or they differ.
    """

    labels: Tensor | None = None
    quantised = True

    def __init__(
        self, root: Path, *, skip_corrupt: bool = False, on_skip: Callable[[str], None] | None = None
    ) -> None:
        self.name = str(root)
        found = sorted(
            path
            for path in root.rglob("*")
            if path.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
            and path.is_file()
        )
        if not found:
            raise DataError(f"{root}: no pictures there ({', '.join(sorted(SUFFIXES))})")
        lossy = sorted({path.suffix.lower() for path in found} - LOSSLESS)
        self.quantisation = f"uint8, lossy ({', '.join(lossy)})" if lossy else ""
        self.paths: list[Path] = []
        kinds: dict[tuple[int, ...], Path] = {}
        for path in found:
            try:
                shape = self._decode(path).shape if skip_corrupt else _header(path)
            except BROKEN as error:
                line = f"{path} is not a readable image: {reason(error)}"
                if not skip_corrupt:
                    raise DataError(f"{line} (skip_corrupt=true leaves such pictures out)") from error
                if on_skip is not None:
                    on_skip(line)
                continue
            kinds.setdefault((shape[2] if len(shape) == 3 else 1, *shape[:2]), path)
            self.paths.append(path)
        if not self.paths:
            raise DataError(f"{root}: none of its {len(found)} pictures can be read")
        if len(kinds) > 1:
            (one, first), (two, second), *_ = kinds.items()
            raise DataError(
                f"{root}: pictures differ: {first.name} is {said(one)}, {second.name} is {said(two)}"
            )
        ((self.shape, _),) = kinds.items()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Tensor) -> Tensor:
        """See `ImageSet`."""
        pixels = []
        for row in rows.tolist():
            try:
                pixels.append(self._decode(self.paths[row]))
            except BROKEN as error:
                raise DataError(
                    f"{self.paths[row]} is not a readable image: {reason(error)} (skip_corrupt=true leaves such "
                    "pictures out)"
                ) from error
        return channels_first(np.stack(pixels))

    @staticmethod
    def _decode(path: Path) -> np.ndarray:
        with Image.open(path, formats=FORMATS) as opened:
            return np.asarray(eight_bits(opened, "L" if opened.mode in GREY else "RGB"))


class Split:
    """A split of a data set that reads its examples from the disk.

    Args:
        source: The split.
        name: What messages call it.
    """

    quantisation = ""

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.name = source, name
        first, label = source.read(np.arange(1))
        self.shape, self.quantised = tuple(first.shape[1:]), first.dtype == torch.uint8
        self._labelled = label is not None
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Tensor | None:
        """See `ImageSet`; to know all of them, all examples are read."""
        if self._labelled and self._labels is None:
            rows = np.arange(len(self))
            found = [self.source.read(part)[1] for part in np.array_split(rows, max(1, len(rows) // AT_ONCE))]
            self._labels = torch.cat([part for part in found if part is not None])
        return self._labels

    def read(self, rows: Tensor) -> Tensor:
        """See `ImageSet`."""
        return self.source.read(rows.numpy())[0]


class Some:
    """Some rows of a set.

    Args:
        images: The set.
        rows: The rows `(M,)`.
        name: What messages call them; None for the name of the set.
    """

    def __init__(self, images: ImageSet, rows: Tensor, name: str | None = None) -> None:
        self.images, self.rows, self.name = images, rows, name or images.name
        self.shape, self.quantised, self.quantisation = images.shape, images.quantised, images.quantisation

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor | None:
        """See `ImageSet`."""
        labels = self.images.labels
        return None if labels is None else labels[self.rows]

    def read(self, rows: Tensor) -> Tensor:
        """See `ImageSet`."""
        return self.images.read(self.rows[rows])


def some(images: ImageSet, rows: Tensor, name: str | None = None) -> ImageSet:
    """Return rows of a set as a set.

    Args:
        images: The set.
        rows: The rows `(M,)`.
        name: What messages call them; None for the name of the set.
    """
    if isinstance(images, Held):
        return Held(
            images.images[rows], None if images.labels is None else images.labels[rows], name or images.name
        )
    return Some(images, rows, name)


def said(shape: Sequence[int]) -> str:
    """Return the shape of an image in words."""
    if len(shape) != 3:
        return f"points of {' x '.join(map(str, shape))} numbers"
    return f"{'grey' if shape[0] == 1 else 'RGB'} {shape[2]}x{shape[1]}"


def _header(path: Path) -> tuple[int, ...]:
    """Return height, width and channels that a picture will have, its header alone being read."""
    with Image.open(path, formats=FORMATS) as opened:
        turned = opened.getexif().get(0x0112, 1) >= 5
        width, height = (opened.height, opened.width) if turned else opened.size
        return (height, width) if opened.mode in GREY else (height, width, 3)
