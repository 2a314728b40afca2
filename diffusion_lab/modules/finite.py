"""Stop a run whose loss or gradient is no longer a number, without making the GPU wait.

Each step hands over one small tensor [gradient norm, loss] before its update is applied.

* On the CPU it is read at once, so the bad update is never applied.
* On a GPU reading it would make the host wait for the backward pass, and then the GPU for the host. So the values are
  copied to pinned memory in the background and read one step later, when they have long arrived. At most one
  bad update is then in memory, and nothing of it reaches the disk: whoever writes, samples or scores calls
  `flush` first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.modules.errors import NonFiniteLoss


@dataclass(frozen=True, kw_only=True)
class _Pending:
    step: int
    images_seen: int
    values: Tensor
    arrived: torch.cuda.Event | None
    terms: tuple[LossTerms, ...]


class FiniteGuard:
    """Checks that the values of every step are finite, at once on the CPU and one step late on a GPU."""

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def push(self, values: Tensor, *, step: int, images_seen: int, terms: Sequence[LossTerms]) -> None:
        """Hand over the values of a step.

        Args:
            values: `(2,)`: norm of the gradient, mean loss; the same on every process, so that all stop together.
            step: Index of the optimizer step about to be applied.
            images_seen: Images seen before it.
            terms: The losses of its micro-batches on this process.

        Raises:
            NonFiniteLoss: If values that have arrived are not finite.
        """
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            values = host
        self._pending.append(
            _Pending(step=step, images_seen=images_seen, values=values, arrived=arrived, terms=tuple(terms))
        )
        self._check(keep=0 if arrived is None else 1)

    def flush(self) -> None:
        """Wait for all values handed over and check them. Raises NonFiniteLoss."""
        self._check(keep=0)

    def _check(self, keep: int) -> None:
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            if pending.arrived is not None:
                pending.arrived.synchronize()
            norm, loss = pending.values.tolist()
            finite = float("-inf") < norm < float("inf") and float("-inf") < loss < float("inf")
            if not finite:
                self._pending.clear()
                what = "the gradient" if float("-inf") < loss < float("inf") else "the loss"
                raise NonFiniteLoss(
                    what,
                    step=pending.step,
                    images_seen=pending.images_seen,
                    logsnr=worst_logsnr(pending.terms),
                )


def worst_logsnr(terms: Sequence[LossTerms]) -> float:
    """Noise level of the example with the largest loss, where NaN counts as largest.

    With several processes the bad example may sit on any of them, so they compare; every process must call this.
    """
    if not terms:
        return float("nan")
    loss = torch.cat([t.per_example.detach().double().flatten() for t in terms])
    logsnr = torch.cat([t.logsnr.detach().double().flatten() for t in terms])
    loss = torch.nan_to_num(loss, nan=float("inf"), posinf=float("inf"))
    worst = int(loss.argmax())
    found = torch.stack([loss[worst], logsnr[worst]])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone = [torch.empty_like(found) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, found)
        found = max(everyone, key=lambda pair: float(pair[0]))
    return float(found[1])
