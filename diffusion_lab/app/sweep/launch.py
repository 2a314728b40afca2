"""Between Hydra's sweepers and its launchers: what is done is skipped, and one lost job does not lose the others.

A sweeper hands over a batch of jobs. Each is composed first (`plan.py`), so that its config's hash is known before
anything is started: what is done, or stands in the batch twice, is not started at all. The rest goes to the launcher
that was chosen. Afterwards every job's value is read from the journal, wherever it ran.

What launchers do when a process dies: joblib gives up the whole batch, submitit raises at the first lost job and
forgets the others. Here the jobs that a dying process took along are started once more, and only those whose own
process died twice count as failed.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from diffusion_lab.app.errors import one_line
from diffusion_lab.app.runs.run import RunFolder
from diffusion_lab.app.session import Session
from diffusion_lab.app.sweep.context import Context, claimed
from diffusion_lab.app.sweep.job import come_to, is_finished, value_of
from diffusion_lab.app.sweep.journal import Entry, Job, find_run
from diffusion_lab.app.sweep.plan import Planner
from diffusion_lab.app.sweep.table import Pace, told

WATCH_S = 0.5
# how often the process of a job may die
DEATHS = 2


class Watched(Launcher):
    """A launcher around the one that was chosen.

    Args:
        inner: The launcher.
        session: The command line; its context is told the jobs.
        parallel: Jobs at once.
    """

    def __init__(self, inner: Any, session: Session, parallel: int) -> None:
        self.inner, self.session = inner, session
        self.planner = Planner(inner, session)
        self.pace = Pace(parallel)
        self.announced = False
        # of a search, earlier calls have done some
        journal = self.context.journal
        entries = [journal.read(job.config) for job in journal.plan()] if self.context.seeks else []
        self.settled = sum(entry is not None and entry.done for entry in entries)

    @property
    def context(self) -> Context:
        """What jobs are told."""
        assert self.session.sweep is not None
        return self.session.sweep

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Do nothing: the launcher inside is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs and return their values, None for those without one."""
        setup_globals()
        context = self.context
        jobs = self.planner.jobs(job_overrides)
        if not self.announced:
            print(f"sweep {context.folder}", flush=True)
            self.announced = True
        if not context.seeks:
            context.total = len(context.journal.plan())
        todo: dict[str, Job] = {}
        # the same values twice are one job, and the same number
        for job in {job.number: job for job in jobs}.values():
            entry = self._adopted(job)
            if entry is not None and entry.done:
                self.settled += 1
                where = f", {entry.run}" if entry.run else ""
                print(f"{context.title(job)}: {entry.status} already{where}", flush=True)
            elif job.config in todo:
                self.settled += 1
                print(f"{context.title(job)}: the same as job {todo[job.config].number}", flush=True)
            else:
                todo[job.config] = job
        if todo:
            self._run(list(todo.values()))
        if not context.seeks:
            # what another sweep was training may be done by now
            for job in jobs:
                self._adopted(job)
        return [_returned(job, value_of(context.journal.read(job.config))) for job in jobs]

    def _adopted(self, job: Job) -> Entry | None:
        """Return what a job has come to, in this sweep or, with resume=auto, in a run that is there already."""
        return adopted(self.context, job, self.planner.configs.get(job.config, {}))

    # ---- running it ----------------------------------------------------------------------------------------

    def _run(self, jobs: list[Job]) -> None:
        context = self.context
        if context.here:
            for job in jobs:
                left = self.pace.left(context.total - self.settled)
                print(f"{context.title(job)}{left}", flush=True)
                self._run_here(job)
                self._settle(job)
            return
        with self._watching(jobs):
            if hasattr(self.inner, "_EXECUTOR"):
                self._submit(jobs)
            else:
                self._in_processes(jobs)

    def _run_here(self, job: Job) -> None:
        """Do what Hydra's basic launcher does, with the config that is composed already."""
        inner, cfg = self.inner, self.planner.composed[job.config]
        with read_write(cfg.hydra), open_dict(cfg.hydra):
            cfg.hydra.job.id = cfg.hydra.job.num = job.number - 1
        run_job(
            hydra_context=inner.hydra_context,
            task_function=inner.task_function,
            config=cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _settle(self, job: Job) -> Entry | None:
        entry = self.context.journal.read(job.config)
        self.settled += 1
        if entry is not None and entry.done and entry.seconds:
            self.pace.seconds.append(entry.seconds)
        return entry

    def _in_processes(self, jobs: list[Job]) -> None:
        """Run jobs by joblib, and again those that the death of a process took along."""
        context = self.context
        deaths: dict[str, int] = {}
        while jobs and not context.stop.exists():
            # when one process dies, so do all that run beside it: only who dies alone is to blame
            batch = [job for job in jobs if job.config in deaths][:1] or jobs
            tried = {job.config: self._attempts(job) for job in batch}
            try:
                self.inner.launch([job.overrides for job in batch], initial_job_idx=batch[0].number - 1)
                jobs = [job for job in jobs if job not in batch]
                continue
            except Exception as error:
                if context.stop.exists():
                    return
                why = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
            # all processes of the batch are gone by now
            again = []
            for job in batch:
                entry = context.journal.read(job.config)
                if entry is None or self._attempts(job) == tried[job.config]:
                    again.append(job)
                elif entry.status == "running":
                    deaths[job.config] = deaths.get(job.config, 0) + 1
                    if deaths[job.config] < DEATHS:
                        again.append(job)
                    else:
                        self._lost(job, "its process died twice, perhaps of too little memory")
            if all(self._attempts(job) == tried[job.config] for job in batch):
                # none was begun: it is the launcher that fails
                for job in jobs:
                    self._lost(job, why)
                return
            jobs = [*again, *(job for job in jobs if job not in batch)]

    def _attempts(self, job: Job) -> int:
        entry = self.context.journal.read(job.config)
        return entry.attempts if entry else 0

    def _submit(self, jobs: list[Job]) -> None:
        """Submit jobs as one array, and wait for each by itself."""
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        inner, params = self.inner, dict(self.inner.params)
        kind, retries = inner._EXECUTOR, params.pop("max_num_timeout", None)
        first = {} if retries is None else {f"{kind}_max_num_timeout": retries}
        executor = submitit.AutoExecutor(folder=params.pop("submitit_folder"), cluster=kind, **first)
        shared = set(OmegaConf.structured(BaseQueueConf).keys())
        executor.update_parameters(
            **{name if name in shared else f"{kind}_{name}": value for name, value in params.items()}
        )
        count, state = len(jobs), Singleton.get_state()
        waiting = list(
            zip(
                jobs,
                executor.map_array(
                    inner,
                    [job.overrides for job in jobs],
                    ["hydra.sweep.dir"] * count,
                    [job.number - 1 for job in jobs],
                    [f"job_id_for_{job.number - 1}" for job in jobs],
                    [state] * count,
                ),
                strict=True,
            )
        )
        print(f"{count} jobs submitted; logs in {Path(executor.folder).parent}", flush=True)
        while waiting:
            for job, sent in [pair for pair in waiting if pair[1].done()]:
                waiting.remove((job, sent))
                error = sent.exception()
                entry = self.context.journal.read(job.config)
                if error is not None and (entry is None or entry.status == "running"):
                    self._lost(job, one_line((str(error).strip().splitlines() or [type(error).__name__])[-1]))
            time.sleep(WATCH_S)

    def _lost(self, job: Job, reason: str) -> None:
        """Write down that a job's process ended without a word; unless somebody else trains it."""
        context = self.context
        with claimed(context, job) as free:
            if free:
                entry = context.journal.read(job.config) or Entry(
                    config=job.config, overrides=job.overrides, status="failed"
                )
                context.journal.write(replace(entry, status="failed", reason=reason))

    @contextmanager
    def _watching(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Tell from the journal when jobs start and end elsewhere."""
        context, over = self.context, threading.Event()
        before = {job.config: context.journal.read(job.config) for job in jobs}
        started: dict[str, int] = {key: entry.attempts if entry else 0 for key, entry in before.items()}
        ended: set[str] = set()

        def look() -> None:
            for job in jobs:
                entry = context.journal.read(job.config)
                if entry is None or entry == before[job.config] or job.config in ended:
                    continue
                if entry.attempts > started[job.config]:
                    started[job.config] = entry.attempts
                    print(f"{context.title(job)}: started", flush=True)
                if entry.status != "running":
                    ended.add(job.config)
                    self._settle(job)
                    left = self.pace.left(context.total - self.settled)
                    print(f"{context.title(job)}: {told(entry)}{left}", flush=True)

        def watch() -> None:
            while not over.wait(WATCH_S):
                look()

        thread = threading.Thread(target=watch, daemon=True, name="sweep")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            look()


def adopted(context: Context, job: Job, config: dict[str, Any]) -> Entry | None:
    """Return a job's entry; with resume=auto, one is made from a finished run that is no job of this sweep yet.

    Args:
        context: The sweep.
        job: The job.
        config: Its config; empty leaves runs aside.
    """
    entry = context.journal.read(job.config)
    if (entry is not None and entry.done) or not context.auto or not config:
        return entry
    found = find_run(config, context.varied)
    if found is None or not is_finished(found, int(config["max_images"])):
        return entry
    with claimed(context, job) as free:
        if free:
            made = Entry(config=job.config, overrides=job.overrides, status="finished")
            entry = come_to(made, RunFolder(found.path), context.objective)
            context.journal.write(entry)
    return entry


def _returned(job: Job, value: float) -> JobReturn:
    found = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
    # Hydra's search takes what is no number for a failed trial; at NaN its call of Optuna ends the sweep
    found.return_value = None if math.isnan(value) else value
    return found
