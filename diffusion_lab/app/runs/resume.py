"""Where a training job goes on: in a new folder, or in that of an interrupted run.

`resume=auto` looks for the newest run of the same experiment with the same identity (see `run.py`), so the same
command line can be sent again and again, as schedulers do, and always continues. `resume=<folder>` names the run;
its identity must agree, for a trajectory that changes its settings halfway is not reproducible by any config.

Stored configs are only compared here, never built: what is trained is the config of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_lab.app.config.choices import read_unchecked
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.runs.run import RunFolder, create, difference, identity, list_runs

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where to go on.

    Attributes:
        folder: The run folder.
        checkpoint: The checkpoint to go on from; None starts at the beginning.
        images_seen: Images behind that checkpoint.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    images_seen: int = 0


def decide(config: Mapping[str, Any], tell: Tell = print) -> Start:
    """Find or make the run folder of a training job.

    Args:
        config: The composed config, resolved.
        tell: Where to say what was found.

    Raises:
        UserError: If the named run is missing, differs, or has only unusable checkpoints.
    """
    wanted, runs, name, run_id = (
        config["resume"],
        Path(config["paths"]["runs"]),
        config["name"],
        config["run_id"],
    )
    if wanted is None:
        return Start(create(runs, name, run_id))
    if wanted != "auto":
        folder = RunFolder(Path(wanted).resolve() if Path(wanted).is_symlink() else Path(wanted))
        changed = difference(_read(folder), config)
        if changed is not None:
            raise UserError(f"resume={wanted}: this is another run: {changed}; start it without resume")
        return _go_on(folder, tell)
    own, differs = identity(config), ""
    for folder in list_runs(runs / name):
        if run_id is not None and folder.path.name != run_id:
            continue
        try:
            theirs = read_unchecked(folder.path)
        except UserError as error:
            tell(f"passed over: {error}")
            continue
        if identity(theirs) == own:
            return _go_on(folder, tell)
        differs = differs or f"; {folder.path.name} has another {difference(theirs, config)}"
    tell(f"resume=auto: no run of {name} with these settings yet, a new one starts{differs}")
    return Start(create(runs, name, run_id))


def _read(folder: RunFolder) -> dict[str, Any]:
    try:
        return read_unchecked(folder.path)
    except UserError as error:
        raise UserError(str(error).replace("run=", "resume=", 1)) from None


def _go_on(folder: RunFolder, tell: Tell) -> Start:
    """Take up a run at its newest good checkpoint; from the beginning if it never wrote one."""
    from diffusion_lab.modules.checkpoint_io import find_resumable, images_of, list_checkpoints

    checkpoint, skipped = find_resumable(folder.checkpoints)
    for line in skipped:
        tell(line)
    if checkpoint is None:
        if list_checkpoints(folder.checkpoints):
            raise UserError(f"{folder.path}: none of its checkpoints can be used; {skipped[0]}")
        tell(f"{folder.path} has no checkpoint yet, it starts again from the beginning")
        return Start(folder)
    return Start(folder, checkpoint, images_of(checkpoint) or 0)


def newest_checkpoint(folder: Path, tell: Tell = print) -> Path:
    """Return the newest good checkpoint of a run, saying which ones had to be passed over.

    Raises:
        UserError: If there is none.
    """
    from diffusion_lab.modules.checkpoint_io import find_resumable

    checkpoint, skipped = find_resumable(folder / "checkpoints")
    for line in skipped:
        tell(line)
    if checkpoint is None:
        reason = skipped[0] if skipped else "training has not come that far"
        raise UserError(f"{folder} has no usable checkpoint: {reason}")
    return checkpoint
