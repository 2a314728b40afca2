"""From batches to Lightning: one data module for every data set.

    loader.py --batch--> device, bytes to floats --> {"x0": float in [-1, 1], "label"}

A data set supplies two `Source`s, train and test; everything else is here. The whole state is one integer,
`images_seen`: how many batches workers had prefetched when the run stopped does not matter. Unreadable examples that a
source replaced are counted when their batch is trained on, so prefetching does not show in the count either.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion_lab.data.loader import Batch, Examples, InMemory, Source, endless_loader
from diffusion_lab.data.order import GlobalBatches
from diffusion_lab.data.progress import progress
from diffusion_lab.images import to_float

__all__ = ["Batch", "DataModule", "Examples", "InMemory", "Source"]

AT_ONCE = 1024
"""Examples that are read at once where all are read."""
MOST_TOLD = 10
"""Unreadable examples that are named on the terminal; all are counted."""


class DataModule(pl.LightningDataModule, ABC):
    """Base of every data set.

    Args:
        batch_size: Examples of one optimizer step, over all processes and micro-batches.
        seed: The run's seed.
        num_workers: Loader processes; the batches do not depend on it.
        flip: Random left-right mirroring of training images.

    Attributes:
        name: What records call the data set.
        shape: Shape of one example.
        num_classes: Number of classes; 0 where there are no labels.
        pixels: Whether examples `(C, H, W)` are images; latents are not, and their samples are stored as floats.
        skipped: Unreadable examples that were replaced in the batches of this process, until somebody sets it to 0.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int = 0
    pixels: bool = True

    def __init__(self, *, batch_size: int, seed: int, num_workers: int = 0, flip: bool = False) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers, self.flip = batch_size, seed, num_workers, flip
        self.images_seen = self.skipped = 0
        self._told: set[str] = set()
        self._sources: dict[str, Source] = {}

    @abstractmethod
    def source(self, split: str) -> Source:
        """Return the examples of `split`, "train" or "test".

        Raises:
            DataError: If the data are missing or damaged.
        """

    @property
    def class_names(self) -> Sequence[str]:
        """A name for each class."""
        return [str(k) for k in range(self.num_classes)]

    def _source(self, split: str) -> Source:
        if split not in self._sources:
            self._sources[split] = self.source(split)
        return self._sources[split]

    def stored(self, split: str) -> Source:
        """Return the examples of `split`, "train" or "test", opened once.

        Raises:
            DataError: If the data are missing or damaged.
        """
        return self._source(split)

    def setup(self, stage: str | None = None) -> None:
        """Open the training data, so that what is missing is said before anything is trained."""
        self._source("train")

    def train_images(self) -> tuple[Tensor, Tensor | None]:
        """Return all training examples, as stored (uint8 or float), and labels, in the data set's own order."""
        return self._whole("train")

    def test_images(self) -> tuple[Tensor, Tensor | None]:
        """Return all test examples, as stored (uint8 or float), and labels, in the data set's own order."""
        return self._whole("test")

    def _whole(self, split: str) -> tuple[Tensor, Tensor | None]:
        """Read a split, in pieces, with progress if it takes a while."""
        source = self._source(split)
        n = len(source)
        x0, label = source.read(np.arange(n if isinstance(source, InMemory) else min(n, AT_ONCE)))
        self._tell(getattr(source, "skipped", []))
        if len(x0) == n:
            return x0, label
        images = x0.new_empty((n, *x0.shape[1:]))
        labels = None if label is None else label.new_empty(n)
        with progress(f"reading {split}", n, unit="examples") as tell:
            for start in range(0, n, AT_ONCE):
                if start:
                    x0, label = source.read(np.arange(start, min(n, start + AT_ONCE)))
                    self._tell(getattr(source, "skipped", []))
                images[start : start + len(x0)] = x0
                if labels is not None and label is not None:
                    labels[start : start + len(x0)] = label
                tell(start + len(x0))
        return images, labels

    def examples(self) -> Examples:
        """Return the run's endless sequence of training examples."""
        return Examples(source=self._source("train"), seed=self.seed, flip=self.flip)

    def conditions(self, seeds: Sequence[int], labels: Tensor | None) -> dict[str, Tensor]:
        """Return what samples are conditioned on besides their labels: nothing, for most data sets.

        A data set whose batches hold further conditions overrides this, so that a model is sampled as it was trained.

        Args:
            seeds: The seed of each sample, of which its conditions are a function.
            labels: Its label `(B,)`, or None.

        Returns:
            Conditions `(B, ...)` by name, on the CPU.
        """
        return {}

    def originals(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor | None:
        """Return the examples `(B, *D)`, floats, that `conditions` were made from; None where there are none."""
        return None

    def loader(self, *, start: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> DataLoader[Batch]:
        """Return the endless training loader of one process, from global position `start` on, bytes as stored."""
        return endless_loader(
            self.examples(),
            GlobalBatches(
                start=start, batch_size=self.batch_size, rank=rank, world=world, accumulate=accumulate
            ),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader for the trainer's rank, world and accumulation, from the module's clock on."""
        trainer = self.trainer
        assert trainer is not None
        start = int(getattr(trainer.lightning_module, "images_seen", self.images_seen))
        return self.loader(
            start=start,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count and tell what the source replaced, and take it out of the batch.

        Raises:
            DataError: Of the source, if too much cannot be read.
        """
        if "skipped" not in batch:
            return batch
        lines = batch["skipped"]
        self.skipped += len(lines)
        self._tell(lines)
        note = getattr(self._sources.get("train"), "note", None)
        if note is not None:
            note(lines)  # each worker knows only its own
        return {name: value for name, value in batch.items() if name != "skipped"}

    def _tell(self, lines: Sequence[str]) -> None:
        """Name unreadable examples on the terminal, each once, and not too many."""
        for line in lines:
            if line not in self._told and len(self._told) < MOST_TOLD:
                print(
                    f"skipped an unreadable sample, another stands in for it: {line}",
                    file=sys.stderr,
                    flush=True,
                )
                self._told.add(line)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn bytes into floats in [-1, 1] on the device: a quarter of the bytes had to travel."""
        if batch["x0"].dtype == torch.uint8:
            return {**batch, "x0": to_float(batch["x0"])}
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state of the loader: one integer."""
        if self.trainer is not None and self.trainer.lightning_module is not None:
            self.images_seen = int(getattr(self.trainer.lightning_module, "images_seen", self.images_seen))
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.images_seen = int(state_dict["images_seen"])
