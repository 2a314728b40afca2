"""A sweep of train.py, from the command line to the table of all its jobs.

    look ahead -> the sweep's folder -> Hydra plans and launches, jobs write the journal -> table and page

With `resume=auto` the same command takes up the folder that it began: what is done is skipped, what was interrupted
goes on, what failed is tried again. Without it a new folder and new runs are begun. Ctrl-C and SIGTERM let the jobs
that run save and stop, start no others, and still end in the table of what is done.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from diffusion_lab.app.errors import UserError
from diffusion_lab.app.sweep.check import check, varied
from diffusion_lab.app.sweep.context import Context
from diffusion_lab.app.sweep.journal import CLAIMS, SWEEPS, Journal, find_sweep, new_sweep, sweep_key
from diffusion_lab.claims import claim, owner

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from diffusion_lab.app.session import Session

PARENT = ".parent.lock"


def run(session: Session, argv: Sequence[str], hydra: Callable[[Session], None]) -> None:
    """Run a sweep, and print its table whatever ends it. `session.failed` counts the jobs that failed.

    Args:
        session: The command line.
        argv: Its arguments, as Hydra reads them.
        hydra: Composes, plans and launches.

    Raises:
        UserError: If the sweep cannot begin.
        KeyboardInterrupt: After a Ctrl-C.
        SystemExit: With code 0 after a SIGTERM.
    """
    import sys

    flags = [word for word in argv if word not in set(session.overrides)]
    session.overrides = last_wins(session.overrides)
    cfg = look_ahead(session)
    launcher, settings = _settings(cfg)
    varies = varied(session, cfg)
    check(session, cfg, settings, varies)
    runs, auto = Path(cfg.paths.runs), cfg.resume == "auto"
    key = sweep_key(session.app, session.overrides)
    with claim(runs / SWEEPS / CLAIMS / f"sweep-{key}.lock", wait_s=60.0):
        folder = (find_sweep(runs, key) if auto else None) or new_sweep(runs, key)
        _open(Journal(folder), session, settings)
    here = str(cfg.hydra.launcher._target_).endswith("BasicLauncher")
    session.sweep = Context(
        folder=folder.absolute(),
        # a sweep that takes up runs must not train what another one is training
        claims=(runs / SWEEPS / CLAIMS).absolute() if auto else None,
        auto=auto,
        varied=varies,
        objective=settings.objective,
        seeks=not str(cfg.hydra.sweeper._target_).endswith("BasicSweeper"),
        here=here,
        logs=str(cfg.hydra.launcher._target_).endswith("JoblibLauncher"),
        total=getattr(settings, "trials", 0),
    )
    from diffusion_lab.app.config.choices import _quote

    words = [f"hydra.sweep.dir={_quote(str(folder))}"]
    parallel = int(getattr(launcher, "n_jobs", 1))
    with claim(folder / PARENT) as alone:
        if hasattr(settings, "trials"):
            if not alone:
                raise UserError(
                    f"{folder} is being searched by {owner(folder / PARENT)}: two at once would not learn"
                )
            from diffusion_lab.app.sweep.study import prepare

            words += prepare(folder, settings)
        # Hydra's search lets a fixed value win over a later interval
        sys.argv = [sys.argv[0], *flags, *session.overrides, *words]
        try:
            with (
                _environment(launcher.environment()),
                _gentle(session.sweep, here),
                _wrapped(session, parallel),
            ):
                _run(session, hydra)
        finally:
            session.sweep.stop.unlink(missing_ok=True)
            session.jobs, session.failed = _conclude(session, folder, settings.direction)
            if not session.sweep.journal.plan():
                shutil.rmtree(folder, ignore_errors=True)


def _run(session: Session, hydra: Callable[[Session], None]) -> None:
    try:
        hydra(session)
    except ValueError as error:
        # what Optuna says to a study in which nothing came to a value; the table says it better
        if "No trials are completed" not in str(error):
            raise


def last_wins(overrides: Sequence[str]) -> list[str]:
    """Return overrides without those that a later one of the same key replaces."""
    last = {word.lstrip("+").partition("=")[0]: place for place, word in enumerate(overrides)}
    return [word for place, word in enumerate(overrides) if last[word.lstrip("+").partition("=")[0]] == place]


# ---- before ------------------------------------------------------------------------------------------------


def look_ahead(session: Session) -> DictConfig:
    """Compose the config of the first job, Hydra's own node included."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser

    first = []
    for item in OverridesParser.create().parse_overrides(session.overrides):
        word = str(item.input_line)
        if item.is_sweep_override():
            if item.is_interval_sweep():
                value = str(item.value().start)  # type: ignore[union-attr]
            else:
                value = next(iter(item.sweep_string_iterator()), "null")
            word = f"{word.partition('=')[0]}={value}"
        first.append(word)
    own = [f"file://{folder}" for folder in session.folders[1:]]
    with initialize_config_dir(str(session.folders[0]), version_base="1.3"):
        return compose(
            session.app,
            overrides=[*first, *([f"hydra.searchpath=[{','.join(own)}]"] if own else [])],
            return_hydra_config=True,
        )


def _settings(cfg: DictConfig) -> tuple[Any, Any]:
    """Build what `launcher=` and `sweep=` say, after a check of their keys."""
    from hydra.utils import instantiate

    from diffusion_lab.app.config.validate import check_node

    for group in ("launcher", "sweep"):
        check_node(cfg[group], group)
    return tuple(instantiate(cfg[group], _convert_="all") for group in ("launcher", "sweep"))  # type: ignore[return-value]


def _open(journal: Journal, session: Session, settings: Any) -> None:
    from diffusion_lab.app.runs import record

    known = journal.told()
    journal.tell(
        {
            "created": known.get("created", record.now()),
            "command": record.command(session.app, session.typed),
            "objective": settings.objective,
            "direction": settings.direction,
        }
    )


# ---- while it runs -------------------------------------------------------------------------------------------


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _wrapped(session: Session, parallel: int) -> Iterator[None]:
    """Let Hydra's sweepers get the launcher that skips what is done."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.plugins import Plugins

    from diffusion_lab.app.sweep.launch import Watched

    make = Plugins.instantiate_launcher

    def instantiate(plugins: Plugins, hydra_context: Any, task_function: Any, config: DictConfig) -> Watched:
        inner = make(plugins, hydra_context=hydra_context, task_function=task_function, config=config)
        return Watched(inner, session, parallel)

    # on the class, not the one instance: that one travels to where the jobs run
    with (
        patch.object(Plugins, "instantiate_launcher", instantiate),
        # every job is composed by `Watched` before the first one starts: once is enough
        patch.object(BasicSweeper, "validate_batch_is_legal", lambda self, batch: None),
    ):
        yield


@contextmanager
def _gentle(context: Context, here: bool) -> Iterator[None]:
    """Make SIGTERM, and the first Ctrl-C, a request to save and stop.

    Jobs in this process listen themselves while they train (see `train.py`). Jobs beside it are passed the request;
    jobs in a queue go on without us.
    """
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and signal.SIGINT in seen
        seen.append(number)
        if here or again or not context.logs:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)
        context.stop.touch()
        print("\nstopping after the steps under way; press Ctrl-C again to stop at once", flush=True)
        _tell_jobs(context)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if seen:
        raise KeyboardInterrupt if signal.SIGINT in seen else SystemExit(0)


def _tell_jobs(context: Context) -> None:
    """Send SIGTERM to the jobs that run on this machine, started by this call."""
    journal, host = context.journal, socket.gethostname()
    for job in context.jobs.values():
        entry = journal.read(job.config)
        where = re.fullmatch(r"process (\d+) on (\S+)", entry.where) if entry else None
        if entry is None or entry.status != "running" or where is None or where[2] != host:
            continue
        if _parent_of(int(where[1])) == os.getpid():
            os.kill(int(where[1]), signal.SIGTERM)


def _parent_of(process: int) -> int | None:
    """Return a process's parent, where the system tells it."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


# ---- after -----------------------------------------------------------------------------------------------------


def _conclude(session: Session, folder: Path, direction: str) -> tuple[int, int]:
    """Print the table and write the page; return how many jobs there are, and how many failed."""
    from diffusion_lab.app.display import show, shown
    from diffusion_lab.app.report.sweep import write_up
    from diffusion_lab.app.sweep.table import collect, table
    from diffusion_lab.files import write_atomically

    assert session.sweep is not None
    found = collect(session.sweep, direction)
    if not found.rows:
        return 0, 0
    write_atomically(folder / "sweep.html", write_up(found, session.sweep.folder))
    show(table(found))
    for row in found.rows:
        if row.reason and row.status == "failed":
            print(f"job {row.number} failed: {row.reason}")
    print(f"table  {folder / 'sweep.html'}", flush=True)
    if found.best is not None and found.best.run is not None:
        print(f"best   {shown(found.best.run, folder)}", flush=True)
    return len(found.rows), sum(row.status == "failed" for row in found.rows)
