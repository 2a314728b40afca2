"""Data sets as they are handed out in one file: CIFAR's archives and NumPy's .npz.

    cifar-10-python.tar.gz     pickles of arrays; read by an unpickler that knows arrays and nothing else
    cifar-10-binary.tar.gz     records of one byte of label and 3072 of pixels
    *.npz                      pictures as arrays, or as JPEG files one after the other:
                               data (bytes), lengths, labels, classes

Folders with the unpacked files are read as well. Nothing but arrays of numbers, lists and text comes out of a pickle,
whatever is in it.

Source:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.pictures import reason

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz", "cifar-10-python.tar", "cifar-10-binary.tar")
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_LARGEST = 64 << 20
_BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, OSError, EOFError, ValueError, KeyError,
    TypeError, IndexError, AttributeError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """Pictures with their labels.

    Attributes:
        n: How many.
        labels: int64 `(n,)`, or None.
        classes: Class names, or None.
        pixels: uint8 `(n, H, W, C)` or `(n, H, W)`; None where they are files.
        file: Returns the k-th picture as a JPEG file; None where they are pixels.
    """

    n: int
    labels: np.ndarray | None
    classes: Sequence[str] | None = None
    pixels: np.ndarray | None = None
    file: Callable[[int], bytes] | None = None


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


class _OnlyArrays(pickle.Unpickler):
    """Builds NumPy arrays, and refuses every other name that a pickle may call."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "_reconstruct": np.empty(0).__reduce__()[0],
            "ndarray": np.ndarray,
            "dtype": np.dtype,
        }
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"it calls {module}.{name}, which no CIFAR batch does")


def find_cifar(root: Path) -> Path | None:
    """Return the archive or the unpacked folder of CIFAR-10 in a folder or above its files, or None."""
    for name in (*_ARCHIVES, *_FOLDERS):
        if (root / name).exists():
            return root / name
    return root if is_cifar(root) else None


def is_cifar(path: Path) -> bool:
    """Whether a path is an archive of CIFAR-10 by its name, or a folder of its batches."""
    if path.is_dir():
        return any((path / f"test_batch{end}").is_file() for end in ("", ".bin"))
    return path.name in _ARCHIVES


def read_cifar(path: Path, split: str) -> Bundle:
    """Read a split of CIFAR-10: 50,000 or 10,000 pictures.

    Args:
        path: An archive, or the unpacked folder.
        split: "train" or "test".

    Raises:
        DataError: If it is damaged or incomplete; names the file.
    """
    try:
        parts = [_batch(payload, binary) for payload, binary in _payloads(path, _BATCHES[split])]
    except _BROKEN as error:
        raise DataError(f"{path} is not a whole CIFAR-10: {reason(error)}") from error
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    pixels = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Bundle(n=len(labels), labels=labels, classes=CIFAR_CLASSES, pixels=pixels)


def _payloads(path: Path, names: Sequence[str]) -> list[tuple[bytes, bool]]:
    """Return the contents of the batches, in order, and whether each is of the binary kind."""
    found: dict[str, bytes] = {}
    wanted = {f"{name}{end}" for name in names for end in ("", ".bin")}
    if path.is_dir():
        found = {name: (path / name).read_bytes() for name in wanted if (path / name).is_file()}
    else:
        with tarfile.open(path, "r:*") as tar:
            for info in tar:
                name = info.name.rpartition("/")[2]
                if info.isreg() and name in wanted and info.size <= _LARGEST:
                    content = tar.extractfile(info)
                    assert content is not None
                    found[name] = content.read()
    missing = next((name for name in names if not {name, f"{name}.bin"} & set(found)), None)
    if missing is not None:
        raise ValueError(f"it has no {missing}")
    return [(found[n], False) if n in found else (found[f"{n}.bin"], True) for n in names]


def _batch(payload: bytes, binary: bool) -> tuple[np.ndarray, np.ndarray]:
    if binary:
        records = np.frombuffer(payload, dtype=np.uint8).reshape(-1, 3073)
        images, labels = records[:, 1:], records[:, 0].astype(np.int64)
    else:
        content = _OnlyArrays(io.BytesIO(payload), encoding="bytes").load()
        images, labels = np.asarray(content[b"data"]), np.asarray(content[b"labels"], dtype=np.int64)
    whole = images.dtype == np.uint8 and images.shape == (len(labels), 3072) and len(labels) > 0
    if not whole or labels.min() < 0 or labels.max() > 9:
        raise ValueError("a batch does not hold 32x32 colour pictures with labels 0 to 9")
    return images, labels


# ---- NumPy -----------------------------------------------------------------------------------------------------------


def read_npz(path: Path) -> Bundle:
    """Read pictures out of a .npz; nothing is unpickled.

    Pictures are uint8 `(N, H, W, 3)`, `(N, 3, H, W)`, `(N, 1, H, W)` or `(N, H, W)`, called images, data, x, x_train or
    arr_0; labels are integers `(N,)`, called labels, label, y, y_train or arr_1.

    Raises:
        DataError: If it is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = set(stored.files)
            labels = _first(stored, ("labels", "label", "y", "y_train", "arr_1"))
            classes = [str(name) for name in stored["classes"]] if "classes" in names else None
            if {"data", "lengths"} <= names:
                return _jpegs(stored["data"], stored["lengths"], labels, classes)
            images = _first(stored, ("images", "image", "data", "x", "x_train", "arr_0"))
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable .npz of pictures: {reason(error)}") from error
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"{path} holds no pictures (uint8, (N, H, W, 3)) called images, data, x or arr_0")
    if images.ndim == 4 and images.shape[-1] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim == 4 and images.shape[-1] != 3:
        raise DataError(f"{path} holds pictures with {images.shape[-1]} channels, not 1 or 3")
    return Bundle(n=len(images), labels=_checked(labels, len(images), path), classes=classes, pixels=images)


def _first(stored: Any, names: Sequence[str]) -> np.ndarray | None:
    return next((stored[name] for name in names if name in stored.files), None)


def _checked(labels: np.ndarray | None, n: int, where: Path | str) -> np.ndarray | None:
    if labels is None:
        return None
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or (n and labels.min() < 0):
        raise DataError(f"{where}: its labels must be {n} natural numbers")
    return labels.astype(np.int64)


def _jpegs(
    data: np.ndarray, lengths: np.ndarray, labels: np.ndarray | None, classes: Sequence[str] | None
) -> Bundle:
    ends = np.cumsum(lengths.astype(np.int64))
    if data.dtype != np.uint8 or data.ndim != 1 or lengths.ndim != 1 or (len(ends) and ends[-1] != len(data)):
        raise ValueError("the lengths do not add up to the bytes")
    joined = data.tobytes()

    def file(k: int) -> bytes:
        return joined[int(ends[k]) - int(lengths[k]) : int(ends[k])]

    return Bundle(n=len(ends), labels=_checked(labels, len(ends), "the file"), classes=classes, file=file)
