r"""Which example is the k-th of a run: a pure function.

    epoch = k div n,      example(k) = permutation(seed, n, epoch)[k mod n]

So the data order depends neither on the number of processes or workers nor on where a run was interrupted, batches run
across the ends of epochs without a short one, and the whole state of a loader is the integer k. Every example is seen
once before any is seen twice.

The permutation sorts the raw words of a Philox generator, stably. NumPy promises those words for ever (NEP 19), while
`Generator.permutation` may change with a release: a run resumed years later, on another NumPy, goes on as it began.

References:
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024 (the habit of an index-
    addressed endless sampler, in their code).
    Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", 2014 (the hash in `coin`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

Positions = Sequence[int] | np.ndarray


@lru_cache(maxsize=4)
def _permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    # four of them: a batch may span two epochs, and two sets may be read in turn
    words = np.random.Philox(np.random.SeedSequence([seed, n, epoch])).random_raw(n)
    permutation = np.argsort(words, kind="stable")
    permutation.flags.writeable = False  # it is cached, and handed out by reference
    return permutation


def order(seed: int, n: int, positions: Positions) -> np.ndarray:
    """Return the example indices, int64 in 0 .. n - 1, at global positions `positions` of a run, in their shape.

    Args:
        seed: The run's seed, non-negative.
        n: Number of examples.
        positions: Non-negative global sample indices, in any order.

    Raises:
        ValueError: If there are no examples, or the seed or a position is negative.
    """
    if n < 1:
        raise ValueError("there is no order of zero examples")
    positions = np.asarray(positions, dtype=np.int64)
    epochs, within = np.divmod(positions, n)
    if positions.size and int(epochs.min()) == int(epochs.max()):  # the usual batch, in a third of the time
        return _permutation(seed, n, int(epochs.flat[0]))[within]
    out = np.empty_like(positions)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        out[rows] = _permutation(seed, n, int(epoch))[within[rows]]
    return out


def coin(seed: int, positions: Positions) -> np.ndarray:
    """Return one fair random bit for each global position, a function of `(seed, position)`; bool, same shape.

    The finaliser of SplitMix64 on position plus a stride times the seed: one multiplication-and-shift hash, vectorised,
    where a generator for each example would cost more than reading it.
    """
    with np.errstate(over="ignore"):
        z = np.asarray(positions, dtype=np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) & np.uint64(1)).astype(bool)


class GlobalBatches(Sampler[list[int]]):
    """Endless batches of global positions: the rows of each global batch that one process holds.

    Micro-batch j of A accumulated ones takes rows jB/A .. (j+1)B/A of the global batch of B, and of those process r
    of R takes every R-th from the r-th on. Iterating again begins at `start` again: there is no hidden state.

    Args:
        start: Position at which to begin, the images seen before; a multiple of B, like every step's random key.
        batch_size: B, of the whole run.
        rank: r.
        world: R.
        accumulate: A.

    Raises:
        ValueError: If the batch does not divide evenly, the start is not the start of a batch, or no such rank is.
    """

    def __init__(
        self, *, start: int, batch_size: int, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> None:
        if batch_size < 1 or batch_size % (world * accumulate):
            raise ValueError(
                f"a batch of {batch_size} does not divide among {world} processes and {accumulate} micro-batches"
            )
        if start < 0 or start % batch_size:
            raise ValueError(f"position {start} is not the start of a batch of {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"there is no rank {rank} among {world} processes")
        self.start, self.batch_size = start, batch_size
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.batch_size // self.accumulate
        first = self.start
        while True:
            for micro in range(self.accumulate):
                begin = first + micro * rows
                yield list(range(begin + self.rank, begin + rows, self.world))
            first += self.batch_size
