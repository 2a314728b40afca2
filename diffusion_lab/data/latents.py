"""Latents of images, encoded once and kept in NumPy files: what latent diffusion trains on.

    <root>/train-x0.npy       (N, C, H, W), any float or integer type, read where it lies (memory-mapped)
    <root>/train-label.npy    (N,) integers; not needed with num_classes=0
    <root>/test-x0.npy        the same for testing; where it is missing, every tenth example is
    <root>/test-label.npy

    x0 = scale (latent - shift)         a number a channel, or one for all

so that x0 has the standard deviation that the denoiser assumes (`sigma_data`). `encode.py` makes these files from a
data set of images. A sample is a latent, too; `decode.py` makes images of samples.
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


def read_array(path: Path) -> np.ndarray:
    """Open a NumPy file without reading it into memory; nothing in it is unpickled.

    Raises:
        DataError: If it is missing or not such a file.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}: set dataset.root to the folder with the encoded data")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npy file: {error}") from error
    return array


class LatentArray:
    """A source whose examples stay on disk until they are read.

    Args:
        x0: `(N, C, H, W)`.
        label: `(N,)`, or None.
        rows: Which of them belong to the split.
        shift: Subtracted, broadcastable to `(C, 1, 1)`.
        scale: Multiplied by.
    """

    def __init__(
        self, x0: np.ndarray, label: np.ndarray | None, rows: np.ndarray, shift: Tensor, scale: Tensor
    ) -> None:
        self.x0, self.label, self.rows, self.shift, self.scale = x0, label, rows, shift, scale

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """See `Source`."""
        rows = self.rows[indices]
        # a memory-mapped file is read fastest in its own order
        order = np.argsort(rows, kind="stable")
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        x0 = torch.from_numpy(np.array(self.x0[rows[order]], dtype=np.float32))[back]
        x0 = (x0 - self.shift) * self.scale
        return x0, None if self.label is None else torch.from_numpy(self.label[rows].astype(np.int64))


class Latents(DataModule):
    """Encoded images below a folder.

    Args:
        root: The folder.
        shape: `(C, H, W)` of a latent.
        num_classes: Number of classes; 0 to read no labels.
        shift: Mean of each channel, or one number for all.
        scale: Factor of each channel, or one for all: 0.18215 for Stable Diffusion's autoencoder.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.

    Raises:
        ValueError: If `shift` or `scale` has neither one number nor one a channel.
    """

    pixels = False

    def __init__(
        self,
        *,
        root: str,
        shape: Sequence[int],
        num_classes: int,
        shift: Sequence[float],
        scale: Sequence[float],
        batch_size: int,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        for name, values in (("shift", shift), ("scale", scale)):
            if len(values) not in (1, shape[0]):
                raise ValueError(
                    f"{name} needs one number, or one for each of {shape[0]} channels, got {len(values)}"
                )
        self.root, self.shape, self.num_classes = Path(root), tuple(shape), num_classes
        self.shift, self.scale = (torch.tensor(list(v)).reshape(-1, 1, 1) for v in (shift, scale))
        self.name = self.root.name or "latents"

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        own = split == "train" or (self.root / "test-x0.npy").is_file()
        stem = split if own else "train"
        x0 = read_array(self.root / f"{stem}-x0.npy")
        if x0.shape[1:] != self.shape:
            raise DataError(
                f"{self.root / stem}-x0.npy holds examples of shape {x0.shape[1:]}, not {self.shape}"
            )
        label = read_array(self.root / f"{stem}-label.npy") if self.num_classes else None
        if label is not None and (label.shape != (len(x0),) or label.dtype.kind not in "iu"):
            raise DataError(f"{self.root / stem}-label.npy must hold {len(x0)} integers")
        rows = np.arange(len(x0))
        if not (self.root / "test-x0.npy").is_file():
            rows = rows[(rows % 10 == 9) == (split == "test")]
        return LatentArray(x0, label, rows, self.shift, self.scale)
