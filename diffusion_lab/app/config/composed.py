"""What is added to a config that Hydra composed: the options chosen, the words typed, a name; and its check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_lab.app.config.choices import top_key

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from diffusion_lab.app.session import Session

# groups that say how a sweep is run
SWEEPING = ("launcher", "sweep")


def job_overrides() -> list[str]:
    """Return the overrides of the current job, as typed: an interpolation in one is not followed."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(found, list)
    return [str(item) for item in found]


def complete_config(session: Session, cfg: DictConfig) -> None:
    """Add to a composed config the options chosen, the overrides, and the name of a run that was given none."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    choices = {
        key: session.recorded.get(key) if value == "from_run" else value
        for key, value in HydraConfig.get().runtime.choices.items()
        if not key.startswith("hydra") and key not in SWEEPING
    }
    with open_dict(cfg):
        cfg.choices = choices
        own = [f"--config-dir={folder}" for folder in session.folders[1:]]
        given = [item for item in job_overrides() if item not in session.injected]
        cfg.overrides = [*own, *(item for item in given if not _of_sweep(item))]
        if session.app == "train" and cfg.get("name") is None:
            cfg.name = _name(choices)
    if session.app == "train":
        from diffusion_lab.app.teacher import plan

        plan(cfg)


def check_config(session: Session, cfg: DictConfig) -> None:
    """Check a config; then drop what it says about the sweep, which is no part of a run.

    Raises:
        UserError: At the first trouble.
    """
    from omegaconf import OmegaConf, open_dict

    from diffusion_lab.app.config.help import options
    from diffusion_lab.app.config.rules import check_rules
    from diffusion_lab.app.config.schema import SCHEMAS
    from diffusion_lab.app.config.validate import drop_absent_parts, validate
    from diffusion_lab.app.teacher import check as check_teacher

    # as typed: a word may hold an interpolation that is not meant for the list of words
    words: Any = OmegaConf.to_container(cfg.overrides, resolve=False)
    drop_absent_parts(cfg, options(session.folders), words)
    validate(cfg, SCHEMAS[session.app])
    if session.app == "train":
        check_rules(cfg)
        check_teacher(cfg)
    with open_dict(cfg):
        for group in SWEEPING:
            cfg.pop(group, None)


def _of_sweep(argument: str) -> bool:
    """Whether a word of the command line says how a sweep is run."""
    return top_key(argument) in SWEEPING


def _name(choices: Mapping[str, Any]) -> str:
    """Return the name of a run that was not given one: the experiment's, below debug/ where it is only a trial."""
    experiment, debug = choices.get("experiment"), choices.get("debug")
    name = experiment if isinstance(experiment, str) and experiment != "null" else "unnamed"
    return f"debug/{name}" if debug not in (None, "null", "none") else name
