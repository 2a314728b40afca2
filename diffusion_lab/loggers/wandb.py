"""Weights & Biases on the axis of images seen, with or without an account.

* The run's id is kept in `<dirpath>/wandb_id.txt`: a resumed run is the same W&B run.
* Every job makes a run of its own, also when several jobs of a sweep share a process; `close` ends it.
* Without an account the run is recorded offline below `<dirpath>/wandb`; look with `wandb leet`, send with
  `wandb sync`.
"""

from __future__ import annotations

import os
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL.Image import Image

CLOCK = "images_seen"


def _mode(offline: bool | None) -> Literal["online", "offline", "disabled"]:
    """Offline unless told otherwise or an account is configured."""
    if offline is not None:
        return "offline" if offline else "online"
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled"):
        return asked  # type: ignore[return-value]
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def _short(path: Path) -> str:
    """Return a path as one types it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


class WandB(WandbLogger):
    """Logs to W&B.

    Args:
        dirpath: The run folder.
        project: W&B project.
        name: Display name; None takes the name of the run folder.
        entity: W&B user or team; None takes the account's own.
        tags: Tags of the run.
        offline: True or False decide; None follows WANDB_MODE, and else is offline where no account is configured.
    """

    def __init__(
        self,
        *,
        dirpath: str,
        project: str = "diffusion_lab",
        name: str | None = None,
        entity: str | None = None,
        tags: Sequence[str] = (),
        offline: bool | None = None,
    ) -> None:
        self.dirpath = Path(dirpath)
        self._offline_choice = offline
        super().__init__(
            name=name or self.dirpath.name,
            save_dir=self.dirpath,
            project=project,
            entity=entity,
            tags=list(tags),
        )

    def run_id(self) -> str:
        """Id of the W&B run of this folder, made once; under an agent of a W&B sweep the one that it was given."""
        path = self.dirpath / "wandb_id.txt"
        if path.exists() and (kept := path.read_text().strip()):
            return kept
        self.dirpath.mkdir(parents=True, exist_ok=True)
        given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        made = given or secrets.token_hex(4)
        path.write_text(made + "\n")
        return made

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at the first use."""
        if self._experiment is None:
            options = {**self._wandb_init, "id": self.run_id(), "mode": _mode(self._offline_choice)}
            options.pop("anonymous", None)
            # create_new: a run left open by an earlier job of this process is none of ours
            run = wandb.init(
                **options, reinit="create_new", settings=wandb.Settings(silent=True, console="off")
            )
            run.define_metric(CLOCK, hidden=True)
            run.define_metric("*", step_metric=CLOCK)
            self._experiment = run
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Store the config: plain containers only, `OmegaConf.to_container(cfg, resolve=True)`."""
        values = vars(params) if isinstance(params, Namespace) else dict(params)
        self.experiment.config.update(values, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics at `step` images seen."""
        self.experiment.log({**metrics, **({} if step is None else {CLOCK: step})})

    @rank_zero_only
    def log_picture(self, name: str, image: Image, images_seen: int) -> None:
        """Store a picture."""
        self.experiment.log({name: wandb.Image(image), CLOCK: images_seen})

    @rank_zero_only
    def save(self) -> None:
        """W&B writes by itself."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Nothing yet: figures made after training belong to the run too. See `close`."""

    @rank_zero_only
    def close(self) -> None:
        """End the W&B run; where it is offline, say how to upload it."""
        if self._experiment is None:
            return
        folder, offline = Path(self._experiment.dir).parent, self._experiment.offline
        self._experiment.finish()
        self._experiment = None
        if offline:
            print(f"W&B offline: upload with  wandb sync {_short(folder)}", flush=True)
