r"""Sets of images that are read piece by piece: an array in a file, a folder of pictures, a split of a data set.

    open_images(path) -> ImageSet:    len, shape, read(rows) -> (images uint8 (B, C, H, W), labels or None)

Nothing here holds a whole set. An uncompressed array in an .npz is mapped into memory; of a folder only the headers are
read at first, so that a picture of another size or another kind than its neighbours is named before anything is
computed. Pictures are taken as they are: whoever compares images must not resize them on the way.

The identity of a set is a hash of all its bytes; of a data set that is read from the disk, of the number of images and
of `SAMPLED` of them, spread over it: to read all would take as long as to look at them.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import InMemory, Source
from diffusion_lab.data.pictures import BROKEN, FORMATS, SUFFIXES, channels_first, eight_bits, reason
from diffusion_lab.images import spread

LOSSLESS = {".png", ".bmp"}
SAMPLED = 4096
AT_ONCE = 1024
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

    Attributes:
        quantisation: What is to be said of the pixels, where a format is lossy; else "".

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
            found = [self.source.read(part)[1] for part in np.array_split(rows, max(1, len(rows) // SAMPLED))]
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
        self.shape, self.quantised = images.shape, images.quantised

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


def split_of(data: Any, split: str) -> ImageSet:
    """Return a split of a data module as a set.

    Args:
        data: The data module.
        split: "train" or "test".

    Raises:
        DataError: If the data are missing or damaged.
    """
    source = data.stored(split)
    if isinstance(source, InMemory):
        images, labels = data.train_images() if split == "train" else data.test_images()
        return Held(images, labels, split)
    return Split(source, split)


def open_images(
    path: Path, *, skip_corrupt: bool = False, on_skip: Callable[[str], None] | None = None
) -> ImageSet:
    """Open a folder of sample.py, an .npz or .npy, or a folder of pictures.

    Args:
        path: Where they are. An .npz holds `images` (or `arr_0`, as ADM's files do) and perhaps `labels` (`arr_1`).
        skip_corrupt: See `PictureFiles`.
        on_skip: See `PictureFiles`.

    Raises:
        DataError: If there are no images, or they cannot be read.
    """
    if path.is_dir() and not (path / "samples.npz").is_file():
        if (path / "parts").is_dir():
            raise DataError(f"{path}: no samples.npz there (an unfinished job is there)")
        return PictureFiles(path, skip_corrupt=skip_corrupt, on_skip=on_skip)
    file = path / "samples.npz" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: no such file or folder")
    if file.suffix.lower() in SUFFIXES:
        raise DataError(f"{path}: a single picture; name its folder")
    with file.open("rb") as opened:
        # NumPy would take anything else for a pickle, and advise to allow that
        if not opened.read(6).startswith((b"PK", b"\x93NUMPY")):
            raise DataError(f"{file}: an .npz with an array `images` is needed, or a folder of pictures")
    try:
        if file.suffix == ".npy":
            return Mapped(np.load(file, mmap_mode="r", allow_pickle=False), None, str(file))
        with np.load(file, allow_pickle=False) as stored:
            keys = list(stored.files)
            images = next((key for key in ("images", "arr_0") if key in keys), None)
            if images is None:
                raise DataError(f"{file}: an array `images` is needed, there are {', '.join(keys) or 'none'}")
            of_labels = next((key for key in ("labels", "arr_1") if key in keys), None)
            labels = None if of_labels is None else _labels(stored[of_labels], file)
        mapped = _member(file, f"{images}.npy")
        if mapped is None:
            with np.load(file, allow_pickle=False) as stored:
                mapped = stored[images]
    except DataError:
        raise
    except (ValueError, KeyError, OSError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: an .npz with an array `images` is needed: {reason(error)}") from error
    return Mapped(mapped, labels, str(path))


def identity(images: ImageSet) -> str:
    """Return the SHA-256 of a set, see the top of this file."""
    n, base = len(images), images.images if isinstance(images, Some) else images
    whole = n <= SAMPLED or not isinstance(base, Split)
    rows = torch.arange(n) if whole else spread(n, SAMPLED)
    first = images.read(rows[:1])
    digest = hashlib.sha256(f"{first.dtype} {(n, *images.shape)}".encode() + (b"" if whole else b" some"))
    if isinstance(images, PictureFiles):
        # the files as they are: to decode all of them twice would double the time of a pass
        for path in images.paths:
            digest.update(path.read_bytes())
        return digest.hexdigest()
    for part in rows.split(AT_ONCE):
        digest.update(images.read(part).contiguous().numpy().tobytes())
    return digest.hexdigest()


def said(shape: Sequence[int]) -> str:
    """Return the shape of an image in words."""
    if len(shape) != 3:
        return f"points of {' x '.join(map(str, shape))} numbers"
    return f"{'grey' if shape[0] == 1 else 'RGB'} {shape[2]}x{shape[1]}"


def _labels(labels: np.ndarray, file: Path) -> Tensor:
    if labels.dtype.kind not in "iu":
        raise DataError(f"{file}: labels must be integers, these are {labels.dtype}")
    found = torch.from_numpy(labels.astype(np.int64))
    return found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found


def _header(path: Path) -> tuple[int, ...]:
    """Return height, width and channels that a picture will have, its header alone being read."""
    with Image.open(path, formats=FORMATS) as opened:
        turned = opened.getexif().get(0x0112, 1) >= 5
        width, height = (opened.height, opened.width) if turned else opened.size
        return (height, width) if opened.mode in GREY else (height, width, 3)


def _member(file: Path, name: str) -> np.ndarray | None:
    """Map an uncompressed array inside a zip file into memory; None where it is compressed."""
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with file.open("rb") as raw:
            raw.seek(info.header_offset)
            local = raw.read(30)
            # the local header repeats name and extra field, the latter with a length of its own
            start = info.header_offset + 30 + int.from_bytes(local[26:28], "little")
            start += int.from_bytes(local[28:30], "little")
            raw.seek(start)
            version = np.lib.format.read_magic(raw)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(raw)
            if dtype.hasobject:
                raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
            offset = raw.tell()
            if offset + int(np.prod(shape)) * dtype.itemsize > file.stat().st_size:
                raise ValueError("the file is cut off")
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")
