"""MNIST from its four IDX files, checked by their SHA-256, fetched where there is a network.

An IDX file is a big-endian header (two zero bytes, a type code, the number of axes, the length of each axis) and then
the raw bytes. The checksums are those of the decompressed files, so gzipped and plain copies are both accepted.

Source:
    LeCun, Cortes & Burges, "The MNIST Database of Handwritten Digits", 1998; 60,000 + 10,000 images, 28x28.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch

from diffusion_lab.data.base import DataModule
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import InMemory, Source

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def read_idx(payload: bytes, path: Path) -> np.ndarray:
    """Return the uint8 array of an IDX file.

    Raises:
        DataError: If the bytes are not a complete IDX file of unsigned bytes.
    """
    axes = payload[3] if payload[:3] == b"\x00\x00\x08" and len(payload) > 3 else 0
    shape = tuple(int.from_bytes(payload[4 + 4 * k : 8 + 4 * k], "big") for k in range(axes))
    body = payload[4 + 4 * axes :]
    # a cut header reads as axes of length 0; math.prod does not overflow
    if axes not in (1, 2, 3) or len(payload) < 4 + 4 * axes or len(body) != math.prod(shape):
        raise DataError(f"{path} is not a complete IDX file of bytes")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


class MNIST(DataModule):
    """MNIST, `(1, 28, 28)`, 10 classes.

    Args:
        root: Folder with the four files, or with a folder `mnist` that holds them; where they are downloaded to.
            None means the environment variable DIFFUSION_LAB_DATA.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.
        download: Whether to fetch missing files.
    """

    name = "mnist"
    shape = (1, 28, 28)
    num_classes = 10

    def __init__(
        self,
        *,
        root: str | None = None,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if root is None and not os.environ.get("DIFFUSION_LAB_DATA"):
            raise DataError("where is MNIST? name its folder by dataset.root=<folder> or DIFFUSION_LAB_DATA")
        self.root, self.download = Path(root or os.environ["DIFFUSION_LAB_DATA"]), download

    def setup(self, stage: str | None = None) -> None:
        """Open both splits: a missing test set is said now, not after the training that it was to score."""
        super().setup(stage)
        self._source("test")

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        images, labels = (self._array(name) for name in FILES[split])
        return InMemory(torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64)))

    def _array(self, name: str) -> np.ndarray:
        places = [
            folder / file for folder in (self.root, self.root / "mnist") for file in (f"{name}.gz", name)
        ]
        path = next((place for place in places if place.is_file()), None) or self._fetch(name)
        try:
            payload = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is damaged ({error}): delete it and fetch it again") from error
        if hashlib.sha256(payload).hexdigest() != SHA256[name]:
            raise DataError(f"{path} is not the MNIST file it is named after (its SHA-256 differs)")
        return read_idx(payload, path)

    def _fetch(self, name: str) -> Path:
        missing = (
            f"MNIST's {name}.gz is not in {self.root} (or its folder mnist): put the four IDX files there, or name "
            "their folder by dataset.root=<folder> or the environment variable DIFFUSION_LAB_DATA"
        )
        if not self.download:
            raise DataError(missing)
        target = self.root / f"{name}.gz"
        try:
            with urllib.request.urlopen(f"{MIRROR}{name}.gz", timeout=10) as reply:
                payload = reply.read()
            if hashlib.sha256(gzip.decompress(payload)).hexdigest() != SHA256[name]:
                raise DataError(f"{missing}; the download was not the right file")
            aside = target.with_suffix(f".{os.getpid()}.part")
            self.root.mkdir(parents=True, exist_ok=True)  # only now: a failed download leaves nothing behind
            aside.write_bytes(payload)
            aside.replace(target)
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:  # URLError is an OSError
            raise DataError(f"{missing}; the download failed too ({error})") from error
        return target
