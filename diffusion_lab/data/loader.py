"""From a set of examples to an endless stream of batches, without Lightning.

    GlobalBatches --positions--> Examples: order, read, flip --> {"x0", "label"}

A batch is fetched as a whole (`__getitems__`), so an in-memory set costs a few indexing calls a batch and no collation.
Every batch is a function of the seed and its positions, so workers and prefetching change nothing but the speed.

A source that had to replace unreadable examples says which in `skipped`; the batch carries that, under the same name,
from the worker to whoever counts (`DataModule`). Most batches have no such entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_lab.data.order import GlobalBatches, coin, order

Batch = dict[str, Any]


class Source(Protocol):
    """Examples that can be read by index."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return `(x0, label)`: uint8 `(B, C, H, W)` or float `(B, *D)`, and int64 `(B,)` or None."""
        ...


class InMemory:
    """A source held in two tensors.

    Args:
        x0: Examples `(N, *D)`, uint8 images or floats.
        label: `(N,)` int64, or None.
    """

    def __init__(self, x0: Tensor, label: Tensor | None) -> None:
        self.x0, self.label = x0, label

    def __len__(self) -> int:
        return self.x0.shape[0]

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """See `Source`; what is returned is a copy."""
        rows = torch.from_numpy(indices)
        return self.x0[rows], None if self.label is None else self.label[rows]


class Examples(Dataset[Batch]):
    """The run's endless sequence of examples, addressed by global position.

    Args:
        source: Where examples are read.
        seed: The run's seed.
        flip: Whether each appearance of an example is mirrored left to right with probability one half.
    """

    def __init__(self, *, source: Source, seed: int, flip: bool = False) -> None:
        self.source, self.seed, self.flip = source, seed, flip

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Return the batch at `positions`: `{"x0": (B, *D), "label": (B,)}`, the label only where there are labels."""
        at = np.asarray(positions, dtype=np.int64)
        x0, label = self.source.read(order(self.seed, len(self.source), at))
        if self.flip:
            mirrored = torch.from_numpy(coin(self.seed, at))
            x0 = torch.where(mirrored.view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
        batch: Batch = {"x0": x0} if label is None else {"x0": x0, "label": label}
        skipped = getattr(self.source, "skipped", None)
        return {**batch, "skipped": list(skipped)} if skipped else batch


def _whole(batch: Any) -> Any:
    """Collate nothing: `Examples` returns whole batches."""
    return batch


def endless_loader(
    examples: Examples, batches: GlobalBatches, *, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Return the loader of `batches`; it has no length and never ends.

    Args:
        examples: What the positions address.
        batches: Lists of positions.
        num_workers: Loader processes; the batches do not depend on it.
        pin_memory: Whether batches land in page-locked memory, for the copy to a GPU.
    """
    return DataLoader(
        examples,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_whole,
        pin_memory=pin_memory,
        # a loader draws a seed for its workers, which we have no use for: not from the global random state
        generator=torch.Generator(),
    )
