"""Ends a run of a sweep that is hopeless: worse, at the same place of the clock, than half of those before it.

Every so many images a run writes the newest value of its metric into a file of its own, beside those of the other
jobs of its sweep. The curves of jobs that came to their end make a study of Optuna's, whose `PercentilePruner` decides:
at the 50th percentile it is the median rule of Google Vizier (Golovin et al. 2017, section 3.1), best value so far
against the median of the others at that place. A value that is no number ends a run at once.

The metric is read from the run's metrics.csv, so anything that is logged can be used. With several processes the first
one decides for all.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from diffusion_lab.callbacks.base import StepCallback, check_interval, due
from diffusion_lab.files import write_atomically
from diffusion_lab.loggers import CSVMetrics
from diffusion_lab.modules.diffusion import DiffusionModule

Curve = dict[int, float]


class PruneHopeless(StepCallback):
    """Compares a run with the other jobs of its sweep.

    Args:
        metric: Name under which it is logged; "fd" is the first Fréchet distance; None is that one, or else "loss".
        direction: "minimize" or "maximize".
        every_images: Interval.
        warmup_images: Before that nothing is ended.
        percentile: Share of the others, in percent, that a run must be as good as.
        min_runs: How many others must have come to their end.
        folder: Where the curves are; None outside of a sweep, where this callback does nothing.
        job: The job's name there.

    Attributes:
        reason: Why the run was ended; None if it was not.

    Raises:
        ValueError: If an argument is out of range, or Optuna is needed and not installed.
    """

    def __init__(
        self,
        *,
        metric: str | None = None,
        direction: Literal["minimize", "maximize"] = "minimize",
        every_images: int = 20_000,
        warmup_images: int = 20_000,
        percentile: float = 50.0,
        min_runs: int = 3,
        folder: str | None = None,
        job: str | None = None,
    ) -> None:
        super().__init__()
        check_interval(every_images, "PruneHopeless")
        if not 0.0 <= percentile <= 100.0 or min_runs < 1 or warmup_images < 0:
            raise ValueError(
                "PruneHopeless needs a percentile in [0, 100], min_runs >= 1 and warmup_images >= 0, "
                f"got {percentile}, {min_runs}, {warmup_images}"
            )
        if direction not in ("minimize", "maximize"):
            raise ValueError(f"PruneHopeless: direction is minimize or maximize, got {direction!r}")
        if (folder is None) != (job is None):
            raise ValueError("PruneHopeless needs both folder and job, or neither")
        if folder is not None and importlib.util.find_spec("optuna") is None:
            raise ValueError(
                "PruneHopeless needs Optuna, which is not installed: pip install 'diffusion_lab[sweep]'"
            )
        self.metric, self.direction, self.every_images = metric, direction, every_images
        self.warmup_images, self.percentile, self.min_runs = warmup_images, percentile, min_runs
        self.folder, self.job = Path(folder) if folder is not None else None, job
        self.curve: Curve = {}
        self.reason: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the curve of an interrupted run, without what it logged beyond its checkpoint."""
        if self.folder is None or not isinstance(pl_module, DiffusionModule):
            return
        stored = read_curve(self.folder / f"{self.job}.json")[0]
        self.curve = {at: value for at, value in stored.items() if at <= pl_module.images_seen}

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Look, if due."""
        if self.folder is None or not due(module, self.every_images):
            return
        # runs of other batch sizes meet the same places a few images later
        at = module.images_seen // self.every_images * self.every_images
        reason = self._judged(trainer, at) if trainer.is_global_zero else None
        self.reason = trainer.strategy.broadcast(reason) if trainer.world_size > 1 else reason
        if self.reason is not None:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the curve as one to compare with, if the run came to its end."""
        from diffusion_lab.callbacks.stop import StopAtImages

        if self.folder is None or not trainer.is_global_zero or not isinstance(pl_module, DiffusionModule):
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        end = next((c.max_images for c in callbacks if isinstance(c, StopAtImages)), None)
        if self.reason is None and end is not None and pl_module.images_seen >= end:
            self._write(ended=True)

    def _judged(self, trainer: pl.Trainer, at: int) -> str | None:
        """Return why the run shall end; None if it shall not."""
        value = newest(self._log(trainer), self.metric, at - self.every_images)
        if value is None:
            return None
        self.curve[at] = value
        self._write(ended=False)
        if not math.isfinite(value):
            return f"{self.metric or 'the metric'} is {value} at {at:,} images"
        if at <= self.warmup_images:
            return None
        others = self._others()
        if not hopeless(
            self.curve, others, percentile=self.percentile, min_runs=self.min_runs, direction=self.direction
        ):
            return None
        there = [curve[at] for curve in others if at in curve]
        return (
            f"{self.metric or 'its value'} {value:.4g} at {at:,} images: not among the best {self.percentile:g} % "
            f"of {len(there)} runs there"
        )

    @staticmethod
    def _log(trainer: pl.Trainer) -> Path:
        """Return the run's metrics.csv, which every run has."""
        logger = next(logger for logger in trainer.loggers if isinstance(logger, CSVMetrics))
        return logger.path

    def _others(self) -> list[Curve]:
        assert self.folder is not None
        found = [read_curve(path) for path in sorted(self.folder.glob("*.json")) if path.stem != self.job]
        return [curve for curve, ended in found if ended]

    def _write(self, *, ended: bool) -> None:
        assert self.folder is not None
        found = json.dumps({"ended": ended, "curve": self.curve}) + "\n"
        write_atomically(self.folder / f"{self.job}.json", found)


def read_curve(path: Path) -> tuple[Curve, bool]:
    """Return a job's curve, by images seen, and whether its run came to its end; empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {int(at): float(value) for at, value in found["curve"].items()}, bool(found["ended"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, False


def hopeless(
    curve: Mapping[int, float],
    others: Sequence[Mapping[int, float]],
    *,
    percentile: float,
    min_runs: int,
    direction: Literal["minimize", "maximize"],
) -> bool:
    """Whether a curve's best value so far is worse than a percentile of the others at its last place.

    Args:
        curve: Values by images seen.
        others: Curves of runs that came to their end.
        percentile: In percent.
        min_runs: Fewer others decide nothing.
        direction: Which end is good.
    """
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # this version calls what it keeps in the next ones experimental
        warnings.simplefilter("ignore")
        pruner = optuna.pruners.PercentilePruner(percentile, n_startup_trials=min_runs, n_warmup_steps=0)
        study = optuna.create_study(direction=direction, pruner=pruner)
        state = optuna.trial.TrialState
        for other in others:
            finite = {at: value for at, value in other.items() if math.isfinite(value)}
            if finite:
                study.add_trial(
                    optuna.trial.create_trial(
                        state=state.COMPLETE, value=finite[max(finite)], intermediate_values=dict(finite)
                    )
                )
        trial = optuna.trial.create_trial(state=state.RUNNING, intermediate_values=dict(curve))
        worse = bool(pruner.prune(study, trial))
    optuna.logging.set_verbosity(verbosity)
    return worse


def newest(path: Path, metric: str | None, since: int) -> float | None:
    """Return the value of a metric that was logged last; None if there is none yet.

    Args:
        path: The metrics.csv.
        metric: See `PruneHopeless`.
        since: Images seen; what was logged before that is too old.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if int(row["images_seen"]) >= since]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    names = list(rows[0]) if rows else []
    distance = next((name for name in names if name.startswith("fd@")), None)
    name = (distance or ("loss" if metric is None else None)) if metric in (None, "fd") else metric
    found = [row[name] for row in rows if row.get(name)] if name is not None else []
    return float(found[-1]) if found else None


def was_pruned(callbacks: Sequence[Callback]) -> str | None:
    """Return why a run with these callbacks was ended as hopeless; None if it was not."""
    return next((c.reason for c in callbacks if isinstance(c, PruneHopeless) and c.reason), None)
