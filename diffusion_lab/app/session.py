"""What one command line has come to, and the one line that tells why it, or a job of it, failed."""

from __future__ import annotations

import os
import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_lab.app.errors import UserError, one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from diffusion_lab.app.sweep.context import Context

TRACEBACK = "DIFFUSION_LAB_TRACEBACK"


def conf_folder() -> Path:
    """Return the folder of the configs: inside the installed package, or beside it in a checkout.

    Raises:
        UserError: If neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no conf/ folder in or beside {package}: the installation is incomplete")


@dataclass(frozen=True)
class Outcome:
    """What one job of a sweep has come to.

    Attributes:
        overrides: Its part of the command line, as typed.
        config: Its config, in so far as it was composed.
        returned: What the app returned.
        failure: The one line that tells why it failed; None where it did not.
    """

    overrides: list[str]
    config: DictConfig
    returned: Any = None
    failure: str | None = None


@dataclass
class Session:
    """What one command line has come to."""

    app: str
    folders: list[Path]
    typed: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    injected: list[str] = field(default_factory=list)
    recorded: dict[str, Any] = field(default_factory=dict)
    multirun: bool = False
    error: Exception | None = None
    failed: int = 0
    jobs: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    sweep: Context | None = None


def failure_line(session: Session, error: Exception) -> str:
    """Return the one line that tells why a job of a sweep failed; the trace is printed where it was asked for."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    return line_of(session, error) or one_line(f"{type(error).__name__}: {error}")


def line_of(session: Session, error: Exception) -> str | None:
    """Return the one line for a mistake of the user's, or None for a defect of ours."""
    from diffusion_lab.app.config.messages import translate

    return translate(error, session.overrides, session.folders, lambda: _known_keys(session))


def _known_keys(session: Session) -> list[str]:
    """Return every full key of the config composed with the groups of the command line and no single values."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from diffusion_lab.app.config.help import options
    from diffusion_lab.app.config.validate import all_keys

    groups = options(session.folders)
    chosen = [item for item in session.overrides if re.split("[=@]", item)[0] in groups and "," not in item]
    extra = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in session.folders[1:])}]"]
    with initialize_config_dir(str(session.folders[0]), version_base="1.3"):
        for overrides in ([*chosen, *(extra if session.folders[1:] else [])], []):
            try:
                cfg = compose(session.app, overrides=overrides)
            except Exception:  # the command line is wrong in more than one place: look without it
                continue
            assert OmegaConf.is_dict(cfg)
            return all_keys(cfg)
    return []
