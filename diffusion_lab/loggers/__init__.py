"""Loggers, all on the axis of images seen.

Metrics go straight to the loggers, `logger.log_metrics(metrics, step=images_seen)`, because Lightning's
`self.log` counts optimizer steps and costs time at every one of them. TensorBoard and W&B are imported only
when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_lab.loggers.csv import CSVMetrics
from diffusion_lab.loggers.quiet import hush_lightning

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from PIL.Image import Image

    from diffusion_lab.loggers.tensorboard import TensorBoard
    from diffusion_lab.loggers.wandb import WandB

__all__ = [
    "CSVMetrics",
    "TensorBoard",
    "WandB",
    "close_loggers",
    "hush_lightning",
    "log_image",
    "log_metrics",
    "rewind",
]


def __getattr__(name: str) -> Any:
    if name == "WandB":
        from diffusion_lab.loggers.wandb import WandB

        return WandB
    if name == "TensorBoard":
        from diffusion_lab.loggers.tensorboard import TensorBoard

        return TensorBoard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def log_metrics(loggers: Iterable[Logger], metrics: Mapping[str, float], images_seen: int) -> None:
    """Send metrics to every logger; only the first process writes."""
    for logger in loggers:
        logger.log_metrics(dict(metrics), step=images_seen)


def log_image(loggers: Iterable[Logger], name: str, image: Image, images_seen: int) -> None:
    """Send a picture to every logger that takes pictures."""
    for logger in loggers:
        take = getattr(logger, "log_picture", None)
        if take is not None:
            take(name, image, images_seen)


def rewind(loggers: Iterable[Logger], images_seen: int) -> None:
    """Tell every logger that can forget to drop what lies beyond `images_seen`."""
    for logger in loggers:
        forget = getattr(logger, "rewind", None)
        if forget is not None:
            forget(images_seen)


def close_loggers(loggers: Iterable[Logger]) -> None:
    """Write everything out and end the W&B run, so that the next job of this process starts its own.

    Call it after each job, also after a failed one.
    """
    for logger in loggers:
        logger.save()
        close = getattr(logger, "close", None)
        if close is not None:
            close()
        else:
            logger.finalize("success")
