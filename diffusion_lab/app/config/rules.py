"""What no signature says about a training config, looked at before anything heavy is imported or any data are read."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from diffusion_lab.app.errors import UserError

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
"""What a run may be trained in: only the inside of the network is ever lowered."""
ALIASES = ("32", "64", "bf16", "16")
# Lightning has these too
LOWERED = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


def check_rules(cfg: DictConfig) -> None:
    """Check a composed config of `train` whose types are known to fit.

    Raises:
        UserError: If there is no such precision, or the learning rate is warmed up for longer than the run lasts.
    """
    trainer = cfg.get("trainer")
    if trainer is not None and str(trainer.get("_target_")).endswith(".Trainer"):
        check_precision(trainer.get("precision"))
    schedule = cfg.get("lr_schedule")
    if schedule is None:
        return
    warm, end = schedule.get("warmup_images"), schedule.get("max_images")
    # schedules that do not decay have no end to reach
    if isinstance(warm, int) and isinstance(end, int) and warm >= end:
        raise UserError(
            f"lr_schedule.warmup_images={warm}: the warm-up must be shorter than the run, max_images={end}; "
            f"try lr_schedule.warmup_images={end // 10}"
        )


def check_precision(precision: Any) -> None:
    """Check `trainer.precision`; None is Lightning's default.

    Raises:
        UserError: If there is no such precision, or weights would be kept in less than float32.
    """
    word = str(precision)
    if precision is None or word in (*PRECISIONS, *ALIASES):
        return
    why = "weights and coefficients keep float32 or better" if word in LOWERED else "no such precision"
    raise UserError(f"trainer.precision={word}: {why}; choose one of {', '.join(PRECISIONS)}")
