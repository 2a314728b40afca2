"""What a user may set about a sweep: `launcher=` says where its jobs run, `sweep=` which jobs there are.

The options of both groups are checked here. Hydra's own launchers and sweepers read the same values through the
interpolations in the files of `conf/launcher` and `conf/sweep`. Neither is part of a run: they are taken out of a job's
config before it trains.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusion_lab.app.errors import UserError

EXTRA = "pip install 'diffusion_lab[sweep]'"
# option -> the plugin of Hydra's that it needs
PLUGINS = {
    "launcher": {
        "joblib": "hydra-joblib-launcher",
        "submitit": "hydra-submitit-launcher",
        "submitit_local": "hydra-submitit-launcher",
    },
    "sweep": {"optuna": "hydra-optuna-sweeper", "random": "hydra-optuna-sweeper"},
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def check_plugins(choices: Mapping[str, str]) -> None:
    """Check that what the chosen options need is installed.

    Args:
        choices: Group to option, or to several parted by commas.

    Raises:
        UserError: With what to install.
    """
    for group, plugins in PLUGINS.items():
        for option in choices.get(group, "").split(","):
            package = plugins.get(option.strip())
            if package is not None and not installed(package):
                raise UserError(f"{group}={option.strip()} needs {package}, which is not installed: {EXTRA}")


def installed(package: str) -> bool:
    """Whether a plugin of Hydra's is there, by the name of its package."""
    try:
        return importlib.util.find_spec(f"hydra_plugins.{package.replace('-', '_')}") is not None
    except ModuleNotFoundError:
        return False


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < 1:
            raise ValueError(f"launcher.{name}: at least 1 is needed, got {value}")


@dataclass(frozen=True, kw_only=True)
class Basic:
    """One job after the other, in this process."""

    def environment(self) -> dict[str, str]:
        """Return the variables that jobs are started with."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Joblib:
    """Several jobs at once on this machine.

    Args:
        n_jobs: Jobs at once.
        threads: Threads of each; None takes OMP_NUM_THREADS, or divides the cores.

    Raises:
        ValueError: If a number is below 1.
    """

    n_jobs: int = 2
    threads: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "n_jobs", "threads")

    def environment(self) -> dict[str, str]:
        """Return the variables that jobs are started with: two jobs of eight threads on eight cores crawl."""
        return _threads(self.threads, max(1, _cores() // self.n_jobs))


@dataclass(frozen=True, kw_only=True)
class SubmititLocal:
    """Jobs as they are sent to SLURM, but on this machine.

    Args:
        time_min: Minutes after which a job is stopped.
        threads: Threads of each; None takes OMP_NUM_THREADS, or one.

    Raises:
        ValueError: If a number is below 1.
    """

    time_min: int = 60
    threads: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "time_min", "threads")

    def environment(self) -> dict[str, str]:
        """Return the variables that jobs are started with."""
        return _threads(self.threads, 1)


@dataclass(frozen=True, kw_only=True)
class Submitit:
    """Every job is one of SLURM's.

    Args:
        n_jobs: Jobs at once.
        partition: SLURM's; None is SLURM's own default, here and below.
        account: SLURM's.
        qos: SLURM's.
        constraint: SLURM's.
        time_min: Minutes after which a job is stopped, after it has saved.
        requeues: How often it is then queued again.
        gpus: Of one job.
        cpus: Of one job.
        memory_gb: Of one job.
        setup: Shell commands to run first.
        additional: Other words for sbatch.

    Raises:
        ValueError: If a number is below 1.
    """

    n_jobs: int = 16
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_min: int = 240
    requeues: int = 20
    gpus: int | None = None
    cpus: int = 4
    memory_gb: int | None = None
    setup: Sequence[str] = ()
    additional: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive(self, "n_jobs", "time_min", "gpus", "cpus", "memory_gb")
        if self.requeues < 0:
            raise ValueError(f"launcher.requeues: must not be negative, got {self.requeues}")

    def environment(self) -> dict[str, str]:
        """Return the variables that jobs are started with: SLURM hands on those of the command."""
        return _threads(None, self.cpus)


def _threads(wanted: int | None, otherwise: int) -> dict[str, str]:
    if wanted is not None:
        return {name: str(wanted) for name in THREADS}
    given = os.environ.get("OMP_NUM_THREADS", str(otherwise))
    return {name: os.environ.get(name, given) for name in THREADS}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_direction(direction: str) -> None:
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"sweep.direction: minimize or maximize, got {direction}")


@dataclass(frozen=True, kw_only=True)
class Combinations:
    """Every combination of the values given.

    Args:
        objective: What the table is sorted by.
        direction: Which end of it is good.

    Raises:
        ValueError: If the direction is unknown.
    """

    objective: str | None = None
    direction: Literal["minimize", "maximize"] = "minimize"

    def __post_init__(self) -> None:
        _check_direction(self.direction)


@dataclass(frozen=True, kw_only=True)
class Random:
    """Values drawn at random.

    Args:
        objective: What the table is sorted by.
        direction: Which end of it is good.
        trials: Jobs in all, those of earlier calls included.
        seed: Of the draws.
        params: What may vary, besides what the command line says.

    Raises:
        ValueError: If a value is out of range.
    """

    objective: str | None = None
    direction: Literal["minimize", "maximize"] = "minimize"
    trials: int = 20
    seed: int = 0
    params: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_direction(self.direction)
        if self.trials < 1 or self.seed < 0:
            raise ValueError(
                f"sweep needs trials >= 1 and seed >= 0, got trials={self.trials}, seed={self.seed}"
            )


@dataclass(frozen=True, kw_only=True)
class Search(Random):
    """Values proposed by a search that learns from the jobs before; `objective` is what it seeks.

    Args:
        objective: What is sought.
        direction: Which end of it is good.
        trials: Jobs in all, those of earlier calls included.
        seed: Of the proposals.
        params: What may vary, besides what the command line says.
        startup: Jobs drawn at random before it learns.

    Raises:
        ValueError: If a value is out of range.
    """

    startup: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.startup < 1:
            raise ValueError(f"sweep.startup: at least 1 is needed, got {self.startup}")
