"""One job of a sweep, in whatever process a launcher runs it: claim it, train it, write down what it came to.

    held by somebody else -> leave it to him
    done meanwhile        -> its value
    else                  -> go on with its run or start one; the entry says "running", then how that ended

Nothing is raised from here but what ends the whole sweep: a failed job must not end the others. Where jobs run beside
each other their output goes to a file each.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_lab.app.config.composed import check_config, complete_config, job_overrides
from diffusion_lab.app.runs.run import RunFolder
from diffusion_lab.app.session import failure_line
from diffusion_lab.app.sweep.context import Context, claimed, holder
from diffusion_lab.app.sweep.journal import Entry, Job, find_run

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from diffusion_lab.app.session import Session

# what a job that did not come to a value returns; a sweeper that seeks takes it for a failed trial
NOTHING = float("nan")
# a killed sweep may be sent again before its orphans have noticed
ORPHANS_S = 3.0
_watching: list[int] = []


def run(session: Session, cfg: DictConfig) -> float:
    """Run a job; return its objective, or NaN.

    Raises:
        KeyboardInterrupt: After a Ctrl-C, where jobs run in the process of the sweep.
        SystemExit: After another signal, likewise.
    """
    context = session.sweep
    assert context is not None
    job = context.jobs[tuple(job_overrides())]
    if context.stop.exists():
        return NOTHING
    if not context.here and os.getppid() == context.parent and not _watching:
        # nobody is left to write the table for: the run is taken up from its checkpoint later
        from diffusion_lab.app.launch import end_with_parent

        end_with_parent()
        _watching.append(1)
    # a sweep that seeks needs the value; else only orphans of a killed sweep are worth waiting for
    wait_s = math.inf if context.seeks else ORPHANS_S
    with _own_log(context, job), claimed(context, job, wait_s) as held:
        if held:
            return _run_claimed(session, context, job, cfg)
    print(f"{context.title(job)}: is being trained by {holder(context, job)}", flush=True)
    return NOTHING


def _run_claimed(session: Session, context: Context, job: Job, cfg: DictConfig) -> float:
    journal = context.journal
    before = journal.read(job.config)
    if before is not None and before.done:
        return value_of(before)
    entry = Entry(
        config=job.config,
        overrides=job.overrides,
        status="running",
        run=before.run if before else None,
        start=_now(),
        attempts=before.attempts + 1 if before else 1,
        where=f"process {os.getpid()} on {os.uname().nodename}",
    )
    journal.write(entry)
    began = time.perf_counter()
    status, reason = "failed", None
    try:
        _train(session, context, job, cfg, before)
        status = "finished"
    except (KeyboardInterrupt, SystemExit) as end:
        status = "interrupted" if isinstance(end, KeyboardInterrupt) else "preempted"
        if context.here:
            raise
    except Exception as error:
        reason = failure_line(session, error)
        if context.logs:
            traceback.print_exception(error)
        sys.stderr.write(f"{context.title(job)}: {reason}\n")
        sys.stderr.flush()
    finally:
        entry = come_to(
            replace(entry, status=status, reason=reason, seconds=round(time.perf_counter() - began, 3)),
            RunFolder(Path(cfg.paths.run)) if cfg.paths.get("run") else None,
            context.objective,
        )
        journal.write(entry)
    if entry.status == "preempted":
        _queue_again(entry)
    return value_of(entry)


def _train(session: Session, context: Context, job: Job, cfg: DictConfig, before: Entry | None) -> Any:
    """Complete the config and hand it to the app."""
    from omegaconf import OmegaConf, open_dict

    complete_config(session, cfg)
    check_config(session, cfg)
    with open_dict(cfg):
        cfg.resume = None
        config = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(config, dict)
        found = _taken_up(context, {str(key): value for key, value in config.items()}, before)
        cfg.resume = None if found is None else str(found.path)
        if found is not None and is_finished(found, cfg.max_images):
            cfg.paths.run = str(found.path)
            return found.path
        callbacks, warning = cfg.get("callbacks") or {}, _warning_of_submitit()
        if warning is not None and "preemption" in callbacks:
            cfg.callbacks.preemption.signals = list({*cfg.callbacks.preemption.signals, warning})
        if "prune" in callbacks:
            cfg.callbacks.prune.folder = str(context.folder / "curves")
            cfg.callbacks.prune.job = job.config
    return importlib.import_module(f"diffusion_lab.app.{session.app}").run(cfg)


def _taken_up(context: Context, config: dict[str, Any], before: Entry | None) -> RunFolder | None:
    """Return the run that a job goes on with: any with resume=auto, else only one that this sweep began."""
    from diffusion_lab.app.runs import record

    if not context.auto and before is None:
        return None
    found = find_run(config, context.varied)
    begun = str(record.read(found.record).get("created", "")) if found is not None else ""
    return found if context.auto or begun >= str(context.journal.told().get("created")) else None


def come_to(entry: Entry, folder: RunFolder | None, objective: str | None) -> Entry:
    """Fill in an entry from the run folder: the numbers, and how the run says that it ended.

    Args:
        entry: With status "finished" where nothing was raised.
        folder: The run folder; None, or one that is gone, leaves the entry without a run.
        objective: The name of what is compared; None for the default.
    """
    from diffusion_lab.app.display import read_metrics
    from diffusion_lab.app.runs import record

    if folder is None or not folder.config.is_file():
        return replace(entry, run=None)
    told = record.read(folder.record)
    metrics: dict[str, float] = {}
    for row in read_metrics(folder.metrics_csv):
        metrics.update(row)
    session = record.last_session(told)
    if session.get("images_seen") is not None:
        metrics["images_seen"] = float(session["images_seen"])
    status, reason = entry.status, entry.reason
    if status == "finished" and told.get("status") in ("stopped", "pruned"):
        status = told["status"]
        reason = session.get("reason") or session.get("stopped_by")
    found = name_of(metrics, objective)
    if found is None and objective is not None and status in ("finished", "stopped"):
        there = ", ".join(sorted(set(metrics) - {"images_seen"}))
        reason = f"sweep.objective={objective}: not in its metrics.csv; there are: {there}"
    return replace(
        entry,
        status=status,
        reason=reason,
        run=str(folder.path.resolve()),
        metrics=metrics,
        objective=None if found is None else metrics[found],
    )


def name_of(metrics: Mapping[str, float], objective: str | None) -> str | None:
    """Return the column that an objective names; `fd` is the first Fréchet distance, None that one or the loss."""
    distances = [name for name in metrics if name.startswith("fd@")]
    if objective in (None, "fd"):
        return distances[0] if distances else ("loss" if objective is None and "loss" in metrics else None)
    return objective if objective in metrics else None


def value_of(entry: Entry | None) -> float:
    """Return what a sweeper is told about a job."""
    if entry is None or not entry.done or entry.objective is None:
        return NOTHING
    return entry.objective


def is_finished(folder: RunFolder, max_images: int) -> bool:
    """Whether a run has nothing left to do, by its record."""
    from diffusion_lab.app.runs import record

    told = record.read(folder.record)
    seen = record.last_session(told).get("images_seen")
    return told.get("status") == "finished" and seen is not None and seen >= max_images


def _now() -> str:
    from diffusion_lab.app.runs import record

    return record.now()


def _queue_again(entry: Entry) -> None:
    """Let submitit put a job that was warned of its end into the queue again; the run goes on from its checkpoint."""
    from diffusion_lab.app.runs import record

    warning = _warning_of_submitit()
    if warning is None or entry.run is None:
        return
    if record.last_session(record.read(RunFolder(Path(entry.run)).record)).get("signal") == warning:
        # the training has taken the signal for itself; now it is submitit's turn
        os.kill(os.getpid(), signal.Signals[warning])
        time.sleep(60.0)


def _warning_of_submitit() -> str | None:
    """Return the signal by which submitit has SLURM warn a job of its end; None in other jobs."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    return f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"


@contextmanager
def _own_log(context: Context, job: Job) -> Iterator[None]:
    """Let everything that this process prints go to the job's file, what libraries print included."""
    if not context.logs:
        yield
        return
    path = log_of(context.folder, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(kept, 1):
            os.dup2(saved, number)
            os.close(saved)


def log_of(folder: Path, job: Job) -> Path:
    """Return the file that a job prints into, where jobs run beside each other."""
    return folder / "logs" / f"job-{job.number}.log"
