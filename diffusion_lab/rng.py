"""Randomness with an address.

Nothing in the house draws from the global random state. Each draw has a key, and a key means the same numbers for ever:

* training noise, noise levels and label dropout belong to `(seed, step, tag, position in the global batch)`;
* the noise of a generated image belongs to that image's own seed.

Hence the results do not depend on the number of processes, on accumulation, on the sampling batch size, or on where a
run was interrupted. Training draws are made for the whole global batch and then sliced, because a stream per example
would cost a Python call each; sampling draws have a stream per example, because there the batch has no meaning.

Keys are hashed with BLAKE2 into the generator's seed. The CPU generator (Mersenne twister) keeps 32 bits of it,
which is ample for steps; sample seeds are used as they are, so two different sample seeds below 2**32 never share a
stream.

The habit is that of EDM2's training loop and image generator: Karras et al., "Analyzing and Improving the Training
Dynamics of Diffusion Models", 2024.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# numbers drawn at once for a sample: 16 steps of an 8x8 image, one step of a 32x32 one
DRAW_AHEAD = 1024


def derive_seed(*key: int | str) -> int:
    """Hash a key of integers and strings into a non-negative 63-bit seed; the same key gives the same seed anywhere."""
    digest = hashlib.blake2b("\x1f".join(f"{type(k).__name__}:{k}" for k in key).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def step_rng(seed: int, step: int, tag: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for one purpose (`tag`) at one training step."""
    return torch.Generator(device).manual_seed(derive_seed("step", seed, step, tag))


class StepRNG:
    """The random numbers of one global batch, as seen by one process.

    Every method draws for all `total` examples of the global batch and returns the rows `positions`.

    Args:
        seed: The run's seed.
        step: Index of the optimizer step.
        positions: Rows of the global batch that this process holds now: a slice such as `slice(rank, None, world)`, or
            a 1-D LongTensor.
        total: Number of examples in the global batch.
        device: Where the numbers are drawn. They differ between CPU and GPU generators.

    Raises:
        ValueError: If `total` is not positive.
    """

    def __init__(
        self,
        *,
        seed: int,
        step: int,
        positions: slice | Tensor,
        total: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if total < 1:
            raise ValueError(f"StepRNG needs a global batch of at least one example, got total={total}")
        self.seed, self.step, self.total, self.device = seed, step, total, torch.device(device)
        self.positions = positions if isinstance(positions, slice) else positions.to(self.device)

    def _generator(self, tag: str) -> torch.Generator:
        return step_rng(self.seed, self.step, tag, self.device)

    def randn(self, tag: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of shape `(n, *shape)`, `shape` being that of one example."""
        full = torch.randn(
            (self.total, *shape), generator=self._generator(tag), device=self.device, dtype=dtype
        )
        return full[self.positions]

    def rand(self, tag: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """Independent uniform numbers in [0, 1), shape `(n,)`."""
        full = torch.rand(self.total, generator=self._generator(tag), device=self.device, dtype=dtype)
        return full[self.positions]

    def stratified(self, tag: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """Low-discrepancy uniform numbers `(u0 + i / total) mod 1`, one shared offset, shape `(n,)`.

        Kingma et al., "Variational Diffusion Models", 2021, appendix I.1: each number is uniform on [0, 1), and
        together they cover it evenly, which cuts the variance of the loss over a batch.
        """
        u0 = torch.rand((), generator=self._generator(tag), device=self.device, dtype=dtype)
        grid = torch.arange(self.total, device=self.device, dtype=dtype) / self.total
        return torch.remainder(u0 + grid, 1.0)[self.positions]

    def randperm(self, tag: str) -> Tensor:
        """A random order of the global batch, int64 in [0, total), each number once, shape `(n,)`."""
        full = torch.randperm(self.total, generator=self._generator(tag), device=self.device)
        return full[self.positions]

    def bernoulli(self, tag: str, p: float) -> Tensor:
        """Independent booleans, true with probability `p`, shape `(n,)`."""
        return self.rand(tag) < p


class SampleRNG:
    """One stream of random numbers for each generated sample.

    The numbers of a sample depend on its own seed and on what was drawn before, never on its neighbours: drawing
    for seeds 0..7 at once equals, bitwise, drawing for 0..2 and 3..7 apart. Numbers are drawn on the CPU and moved, so
    a GPU produces the same start noise.

    Args:
        seeds: One integer a sample. Seeds in [0, 2**32) have distinct streams.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = [int(s) for s in seeds]
        self._generators = [torch.Generator("cpu").manual_seed(s) for s in self.seeds]
        self._drawn: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self.seeds)

    def randn(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers `(len(self), *shape)`, `shape` being that of one sample."""
        key = (tuple(shape), dtype)
        if not self._drawn.get(key):
            # a call for each sample is what streams cost; for small samples several steps' noise is drawn by one
            ahead = max(1, min(16, DRAW_AHEAD // max(1, math.prod(shape))))
            out = torch.empty((len(self), ahead, *shape), dtype=dtype)
            for row, generator in zip(out.unbind(0), self._generators, strict=True):
                row.normal_(generator=generator)
            self._drawn[key] = [draw.contiguous() for draw in reversed(out.unbind(1))]
        return self._drawn[key].pop().to(device)

    def rand(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform numbers in [0, 1), `(len(self), *shape)`."""
        out = torch.empty((len(self), *shape), dtype=dtype)
        for row, generator in zip(out, self._generators, strict=True):
            row.uniform_(generator=generator)
        return out.to(device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of `x`, whose first axis is the batch.

        Raises:
            ValueError: If the batch of `x` is not the number of seeds.
        """
        if x.shape[0] != len(self):
            raise ValueError(f"SampleRNG holds {len(self)} seeds but the batch has {x.shape[0]} samples")
        return self.randn(x.shape[1:], dtype=x.dtype, device=x.device)
