"""Leave in good order when the machine is taken away.

A signal handler may do next to nothing: a collective inside one deadlocks when every process gets the signal
(what SLURM, Kubernetes and Ctrl-C in a terminal do), and hangs when only one does. So the handler sets a
flag. After each batch the processes agree on the flag, and all stop together; the checkpoint is then written
by the ordinary end of training, and the program ends with status 0.

The agreement goes over the host (gloo), never over the GPU's stream, so that nobody waits for the GPU.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.modules.diffusion import DiffusionModule


class Preemption(StepCallback):
    """Turns SIGTERM and SIGUSR1 into a checkpoint and a clean end.

    Args:
        signals: Names of the signals to obey.

    Attributes:
        stopped: Whether this run was ended by a signal (on any process).
        received: The first signal that this very process was sent; None where there was none.

    Raises:
        ValueError: If a signal's name is unknown.
    """

    def __init__(self, *, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> None:
        super().__init__()
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise ValueError(f"unknown signal {unknown[0]!r}")
        self.signals = [signal.Signals[name] for name in signals]
        self.stopped = False
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}
        self._group: torch.distributed.ProcessGroup | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the handlers that were there before Lightning's."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in self.signals}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; Lightning installed its own just before, and they must not run."""
        for number in self._previous:
            signal.signal(number, self._handle)
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Agree, and stop if anyone was told to."""
        received = self.received is not None
        if self._group is not None:
            flag = torch.tensor([float(received)])
            torch.distributed.all_reduce(flag, group=self._group)
            received = bool(flag.item())
        if received:
            self.stopped = True
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the previous handlers back, only now: the checkpoint of `on_train_end` must not be cut off."""
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Put the previous handlers back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}
        if self._group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._group)
        self._group = None


def was_preempted(callbacks: Sequence[Callback]) -> bool:
    """Whether a run with these callbacks was ended by a signal."""
    return any(isinstance(c, Preemption) and c.stopped for c in callbacks)
