"""What can go wrong in a run for reasons the user can act on. Each message is one line, ready to be printed."""

from __future__ import annotations


class RunError(RuntimeError):
    """Base of the errors below; an entry point prints the message and exits non-zero, without a traceback."""


class DoesNotFit(RunError):
    """Parts of a run do not fit together, which showed before its first step was done."""


class CheckpointTruncated(RunError):
    """A checkpoint file is cut short or damaged: its checksum or its archive does not hold."""


class CheckpointUnsafe(RunError):
    """A checkpoint file holds something other than tensors and plain containers, so loading it could run code."""


class CheckpointNotSaved(RunError):
    """A checkpoint could not be written, for instance on a full disk. Earlier checkpoints are untouched."""


class NonFiniteLoss(RunError):
    """The loss or the gradient became infinite or NaN.

    Attributes:
        step: Index of the optimizer step whose update is bad.
        images_seen: Images seen before that step.
        logsnr: Noise level of the worst example of that step.
    """

    def __init__(self, what: str, *, step: int, images_seen: int, logsnr: float) -> None:
        super().__init__(
            f"{what} is not finite at step {step} ({images_seen} images seen), worst example at logsnr "
            f"{logsnr:.3f}; training stopped, the last good checkpoint is kept"
        )
        self.step, self.images_seen, self.logsnr = step, images_seen, logsnr
