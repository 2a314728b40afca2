"""Sampling during training: shared out among processes, the same images whatever their number.

Sample i has seed `first_seed + i` and, for labelled data, the label i mod K. Process r of R makes the samples
r, r + R, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.errors import RunError
from diffusion_lab.sharded import unsharded
from diffusion_lab.typing import Cond, DenoiserFn


def chosen(module: DiffusionModule, ema: str | None) -> str:
    """Return the name of the weights that `ema` means: for None the first average, "raw" where there is none.

    Raises:
        RunError: If there is none of that name.
    """
    denoisers = module.denoisers()
    if ema is None:
        return next(iter(module.averages), "raw")
    if ema not in denoisers:
        raise RunError(f"no average is called {ema!r}; there are: {', '.join(denoisers)}")
    return ema


def pick(module: DiffusionModule, ema: str | None) -> DenoiserFn:
    """Return the denoiser with the weights that `ema` means, see `chosen`."""
    return module.denoisers()[chosen(module, ema)]


@contextmanager
def evaluating(denoiser: DenoiserFn) -> Iterator[None]:
    """Switch dropout off and gradients, hold sharded weights whole, and put things back as they were.

    If the denoiser is sharded, every process must enter and leave; between, each calls it as often as it likes.
    """
    module = denoiser if isinstance(denoiser, nn.Module) else None
    training = module is not None and module.training
    if module is not None:
        module.eval()
    try:
        with torch.no_grad(), unsharded(module) if module is not None else nullcontext():
            yield
    finally:
        if module is not None and training:
            module.train()


def labels_for(indices: Sequence[int], num_classes: int) -> Tensor | None:
    """Labels of the samples with these indices: the classes in turn; None for data without labels."""
    return torch.tensor([i % num_classes for i in indices], dtype=torch.int64) if num_classes > 0 else None


def conditions(
    trainer: pl.Trainer, seeds: Sequence[int], labels: Tensor | None, device: torch.device
) -> Cond | None:
    """Make the conditions of samples: their labels, and what the data set gives besides (`DataModule.conditions`)."""
    given = {} if labels is None else {"label": labels}
    more = getattr(getattr(trainer, "datamodule", None), "conditions", None)
    if more is not None:
        given = {**given, **more(seeds, labels)}
    return {name: value.to(device) for name, value in given.items()} or None


def share(n: int, trainer: pl.Trainer) -> list[int]:
    """Indices in 0..n-1 that this process makes."""
    return list(range(trainer.global_rank, n, trainer.world_size))


def gather(samples: Tensor, n: int, trainer: pl.Trainer) -> Tensor:
    """Put the shares of all processes back in order; every process must call this, and gets all `n` samples.

    Args:
        samples: This process's share `(share, *D)`.
        n: Number of samples of all shares.
        trainer: The trainer.
    """
    if trainer.world_size == 1:
        return samples
    longest = -(-n // trainer.world_size)
    padded = samples.new_zeros((longest, *samples.shape[1:]))
    padded[: samples.shape[0]] = samples
    everyone = [torch.empty_like(padded) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(everyone, padded)
    return torch.stack(everyone, dim=1).flatten(0, 1)[:n]
