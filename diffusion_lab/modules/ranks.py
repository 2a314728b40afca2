"""What processes of one run tell each other."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; every process must call this."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def is_first() -> bool:
    """Whether this process is the one that writes; alone it is."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not there or torch.distributed.get_rank() == 0
