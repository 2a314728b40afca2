"""The three entry points: Hydra composes, we check, the app runs; every mistake of the user's is one line.

Nothing here imports torch or lightning before a config has been composed and found valid, so help, tab completion and
error messages come at once. Hydra runs with its own error report off; what it raises is translated
(`config/messages.py`).

Exit codes: 0 done; 2 a mistake of the user's; 1 a defect, or at least one failed job of a sweep; 130 interrupted.
Set DIFFUSION_LAB_TRACEBACK=1 to see the full trace of any error.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffusion_lab.app.errors import UserError
from diffusion_lab.app.session import TRACEBACK, Outcome, Session, conf_folder, failure_line, line_of

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train() -> None:
    """Run `train.py`: compose a config, check it, train."""
    _run("train")


def sample() -> None:
    """Run `sample.py`: draw samples from a run folder or an export."""
    _run("sample")


def evaluate() -> None:
    """Run `evaluate.py`: score a run folder, an export or samples."""
    _run("evaluate")


def _run(app: str) -> NoReturn:
    try:
        sys.exit(main(app, sys.argv[1:]))
    finally:
        # spare Python's last search for cycles in all that torch has loaded: seconds, where time may be short
        gc.freeze()


def main(app: str, argv: Sequence[str]) -> int:
    """Run one of the apps on a command line and return the exit code.

    Args:
        app: "train", "sample" or "evaluate".
        argv: The arguments, program name left out.
    """
    argv = list(argv)
    try:
        session = Session(app, [conf_folder(), *_config_dirs(argv)], typed=argv)
    except UserError as error:
        return _report(error, str(error))
    if {"-h", "--help"} & set(argv):
        from diffusion_lab.app.config.help import text

        sys.stdout.write(text(app, _program(), session.folders))
        return 0
    try:
        argv = _prepare(session, argv)
        with _hydra_environment([_program(), *argv]):
            if session.app == "train" and session.multirun and not _only_shows(argv):
                from diffusion_lab.app.sweep import run as sweep_run

                sweep_run.run(session, argv, _compose_and_run)
            else:
                _compose_and_run(session)
        if session.app != "train" and len(session.outcomes) > 1:
            from diffusion_lab.app.scoring.compare import finish

            finish(session)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        # `--cfg job | head`: the reader has gone; keep Python from trying again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _report(error, line_of(session, error))
    if session.error is not None:
        return _report(session.error, line_of(session, session.error))
    if session.failed:
        sys.stderr.write(f"{session.failed} of {session.jobs} jobs failed\n")
        return 1
    return 0


def _only_shows(argv: Sequence[str]) -> bool:
    """Whether a command line asks Hydra for something else than a run."""
    words = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "-sc", "--shell-completion")
    return any(argument.partition("=")[0] in words for argument in argv)


def _program() -> str:
    """Return the words that start this program, for messages: `python train.py`, or the console script."""
    name = Path(sys.argv[0]).name
    return f"python {name}" if name.endswith(".py") else name


def _config_dirs(argv: Sequence[str]) -> list[Path]:
    """Return the folder given with --config-dir (or -cd), if any."""
    for index, argument in enumerate(argv):
        name, mark, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            folder = value if mark else (argv[index + 1] if index + 1 < len(argv) else "")
            if not Path(folder).is_dir():
                raise UserError(f"--config-dir {folder}: no such folder")
            return [Path(folder)]
    return []


def _prepare(session: Session, argv: list[str]) -> list[str]:
    """Complete the command line and check what can be checked before Hydra reads it."""
    from diffusion_lab.app.config.choices import complete, is_multirun, split_override
    from diffusion_lab.app.config.messages import (
        check_blanks,
        check_flags,
        check_options,
        check_resume,
        check_sweep,
    )
    from diffusion_lab.app.teacher import complete as complete_student

    session.multirun = is_multirun(argv)
    if {"-sc", "--shell-completion", "--shell_completion", "--hydra-help", "--version"} & set(argv):
        return argv
    check_flags(argv, session.folders)
    check_blanks(argv)
    check_options([item for item in argv if split_override(item) is not None], session.folders)
    if session.app == "train":
        check_resume(argv)
        check_sweep(argv, multirun=session.multirun or _only_shows(argv))
        completed = complete_student(argv, session.folders)
    else:
        completed = complete(session.app, argv, session.folders)
    argv, session.recorded, session.injected = completed.argv, completed.recorded, completed.injected
    # the word behind `--config-dir` is none
    session.overrides = [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if not word.startswith("-") and before not in ("--config-dir", "-cd")
    ]
    return argv


@contextmanager
def _hydra_environment(argv: list[str]) -> Iterator[None]:
    """Give Hydra its command line, and make it raise instead of printing."""
    saved, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = saved
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _compose_and_run(session: Session) -> None:
    import hydra

    def job(cfg: DictConfig) -> Any:
        return _job(session, cfg)

    hydra.main(config_path=str(session.folders[0]), config_name=session.app, version_base="1.3")(job)()


def _job(session: Session, cfg: DictConfig) -> Any:
    """Run one job. A failure is kept for the end of a single run, and told at once in a sweep, which goes on."""
    from hydra.core.hydra_config import HydraConfig

    from diffusion_lab.app.config.composed import job_overrides

    if session.sweep is not None:
        from diffusion_lab.app.sweep import job

        return job.run(session, cfg)
    hydra_cfg = HydraConfig.get()
    session.jobs += 1
    # jobs of other launchers run elsewhere: only what they raise is seen here
    here = str(hydra_cfg.launcher._target_).endswith("BasicLauncher")
    given = [item for item in job_overrides() if item not in session.injected]
    title = _title(session, hydra_cfg, given) if session.multirun else ""
    if session.multirun and here:
        print(title, flush=True)
    try:
        returned = run_config(session, cfg)
        if session.multirun and here:
            session.outcomes.append(Outcome(given, cfg, returned))
        return returned
    except Exception as error:
        if not session.multirun:
            session.error = error
            return None
        line = failure_line(session, error)
        sys.stderr.write(f"{title}: {line}\n")
        session.failed += 1
        if not here:
            raise
        session.outcomes.append(Outcome(given, cfg, failure=line))
        return float("nan")  # what a sweeper that optimises takes for a failed trial


def _title(session: Session, hydra_cfg: Any, given: Sequence[str]) -> str:
    """Return what a job of a sweep is called: its number, how many there are, and the values that vary."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from diffusion_lab.app.config.choices import plain_override

    own = [f"{key}={value}" for key, value in (hydra_cfg.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*own, *session.overrides])
    swept = {item.get_key_element(): item for item in parsed if item.is_sweep_override()}
    changed = " ".join(plain_override(item) for item in given if item.partition("=")[0] in swept)
    try:
        basic = str(hydra_cfg.sweeper._target_).endswith("BasicSweeper")
        total = math.prod(len(list(item.sweep_string_iterator())) for item in swept.values()) if basic else 0
    except Exception:  # a glob, whose matches are not known here
        total = 0
    of = f" of {total}" if total else ""
    return f"job {int(hydra_cfg.job.num) + 1}{of}" + (f" ({changed})" if changed else "")


def run_config(session: Session, cfg: DictConfig) -> Any:
    """Check a composed config and hand it to the app, which is imported only now."""
    from diffusion_lab.app.config.composed import check_config, complete_config

    complete_config(session, cfg)
    check_config(session, cfg)
    return importlib.import_module(f"diffusion_lab.app.{session.app}").run(cfg)


def _report(error: Exception, line: str | None) -> int:
    if line is None:
        traceback.print_exception(error)
        return 1
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"error: {line}\n")
    return 2
