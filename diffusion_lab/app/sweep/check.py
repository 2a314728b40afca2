"""What can be wrong with a sweep, said before its folder is made and its first job starts."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from diffusion_lab.app.errors import UserError, did_you_mean
from diffusion_lab.app.sweep.settings import Search

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from diffusion_lab.app.session import Session

# what our callbacks write into metrics.csv; a class that is not here may write anything
COLUMNS = {
    "AccuracyByNoiseLevel": ("accuracy",),
    "Checkpoints": (),
    "EMACallback": (),
    "EMASnapshots": (),
    "FrechetDuringTraining": ("fd",),
    "KeptWeights": (),
    "GradientNorm": ("gradient_norm",),
    "LossByNoiseLevel": (),
    "Preemption": (),
    "Progress": (),
    "PruneHopeless": (),
    "SampleGrid": (),
    "Throughput": ("images_per_s", "model_tflop_per_s"),
    "TrainingLog": ("loss", "learning_rate", "skipped_samples"),
}
# these are there whatever is logged
ALWAYS = ("images_seen",)
# groups that may bring other callbacks with them
BRINGING = ("callbacks", "experiment", "debug")


def check(session: Session, cfg: DictConfig, settings: Any, varies: list[str]) -> None:
    """Refuse a sweep that cannot work.

    Args:
        session: The command line.
        cfg: The config of its first job, Hydra's node included.
        settings: What `sweep=` says.
        varies: The keys that vary.

    Raises:
        UserError: If it resumes one run, draws from nothing or needs a search to draw, varies what it must not, seeks
            what no job measures, or is to be sent to a SLURM that is not there.
    """
    if cfg.resume not in (None, "auto"):
        raise UserError(
            f"resume={cfg.resume}: the jobs of a sweep are several runs; resume=auto finds each one's"
        )
    _check_space(session, cfg, varies)
    for key in varies:
        if key == "paths.runs" or key == "resume":
            raise UserError(f"{key}: must be the same for all jobs of a sweep")
    _check_objective(cfg, settings, varies)
    launcher = str(cfg.hydra.launcher._target_)
    if launcher.endswith("SlurmLauncher") and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "launcher=submitit: there is no SLURM on this machine (no sbatch and srun); "
            "launcher=submitit_local or joblib runs the jobs here"
        )


def varied(session: Session, cfg: DictConfig) -> list[str]:
    """Return the keys that vary from job to job."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    own = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*own, *session.overrides])
    return list(dict.fromkeys(item.get_key_element() for item in parsed if item.is_sweep_override()))


def _check_space(session: Session, cfg: DictConfig, varies: list[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    combines = str(cfg.hydra.sweeper._target_).endswith("BasicSweeper")
    for item in OverridesParser.create().parse_overrides(session.overrides):
        if item.is_interval_sweep() and combines:
            raise UserError(f"{item.input_line}: sweep=optuna or sweep=random draws from an interval")
    if not combines and not varies:
        raise UserError(
            "this sweep draws values, but nothing varies; say what: 'optimizer.lr=tag(log,interval(1e-4,1e-2))', "
            "schedule=cosine,sigmoid, or sweep.params"
        )


def _check_objective(cfg: DictConfig, settings: Any, varies: list[str]) -> None:
    """An objective that is misspelt would show after the last job, as a table without values."""
    wanted = settings.objective
    if {key.lstrip("+~").partition("@")[0].partition(".")[0] for key in varies} & {*BRINGING}:
        return
    nodes = [
        node for node in (cfg.get("callbacks") or {}).values() if node is not None and "_target_" in node
    ]
    classes = [str(node["_target_"]).rpartition(".") for node in nodes]
    if any(not package.startswith("diffusion_lab.") or name not in COLUMNS for package, _, name in classes):
        return
    known = [*ALWAYS, *(column for _, _, name in classes for column in COLUMNS[name])]
    if wanted is None:
        if isinstance(settings, Search) and not {"fd", "loss"} & {*known}:
            raise UserError("this search has nothing to seek: callbacks has neither training_log nor frechet")
    elif wanted == "fd" or wanted.startswith("fd@"):
        if "fd" not in known:
            raise UserError(f"sweep.objective={wanted}: no job measures it; add callbacks=[default,frechet]")
    elif wanted not in known:
        raise UserError(f"sweep.objective={wanted}: no job measures that{did_you_mean(wanted, known)}")
