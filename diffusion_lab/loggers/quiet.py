"""Silence what Lightning says that is an advert, or a hint that does not apply here.

The house has no validation loop, an endless loader and its own counters; warnings about their absence would
only teach users to ignore warnings. Everything else gets through.
"""

from __future__ import annotations

import logging
import warnings

ADVERTS = (
    "litlogger",
    "litmodels",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "Initializing distributed",
    "distributed_backend=",
    "`Trainer.fit` stopped",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
    "No `val_dataloader`",
)

HINTS = (
    r".*does not have many workers.*",
    r".*`IterableDataset` has `__len__` defined.*",
    r".*you defined a `validation_step` but have no `val_dataloader`.*",
    r".*but have no `val_dataloader`.*",
    r".*`max_epochs` was not set.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*The `srun` command is available.*",
    r".*You are using `torch.load` with `weights_only=False`.*",
    r".*Starting from v1.9.0, `tensorboardX` has been removed.*",
    r".*in eval mode at the start of training.*",
)

LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.distributed",
    "lightning.pytorch",
    "lightning.fabric",
)


class _NoAdverts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(advert in message for advert in ADVERTS)


def hush_lightning() -> None:
    """Install the filters; call once before making a Trainer. Calling again changes nothing."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _NoAdverts) for f in logger.filters):
            logger.addFilter(_NoAdverts())
    for hint in HINTS:
        warnings.filterwarnings("ignore", message=hint)
