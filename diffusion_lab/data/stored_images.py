r"""Open sets of images that are stored somewhere, and say which they are.

    open_images(path), split_of(data, split) -> ImageSet      identity(images) -> SHA-256

An uncompressed array in an .npz is mapped into memory.

The identity of a set is a hash of all its bytes; of a data set that is read from the disk, of the number of images and
of `SAMPLED` of them, spread over it: to read all would take as long as to look at them.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.image_sets import Held, ImageSet, Mapped, PictureFiles, Some, Split
from diffusion_lab.data.loader import InMemory
from diffusion_lab.data.pictures import SUFFIXES, reason
from diffusion_lab.images import spread

SAMPLED = 4096
AT_ONCE = 1024


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


def _labels(labels: np.ndarray, file: Path) -> Tensor:
    if labels.dtype.kind not in "iu":
        raise DataError(f"{file}: labels must be integers, these are {labels.dtype}")
    found = torch.from_numpy(labels.astype(np.int64))
    return found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found


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
