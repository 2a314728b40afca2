"""What every job of a sweep is told, and who holds a job: one process at a time trains it, of this sweep or another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_lab.app.sweep.journal import CLAIMS, Job, Journal, short
from diffusion_lab.claims import claim, owner


@dataclass(kw_only=True)
class Context:
    """What every job of a sweep is told; it travels to where the job runs.

    Attributes:
        folder: The sweep's folder.
        claims: The folder of claims that other sweeps look at too; None where this one begins runs of its own.
        auto: Whether runs that are there are taken up.
        varied: The keys that vary.
        objective: What the sweep compares; None for the default.
        seeks: Whether the sweeper needs each job's value.
        here: Whether jobs run in the process of the sweep.
        logs: Whether each job prints into a file of its own.
        parent: The process of the sweep.
        total: How many jobs there will be.
        jobs: Those planned, by their overrides.
    """

    folder: Path
    claims: Path | None
    auto: bool
    varied: list[str]
    objective: str | None
    seeks: bool
    here: bool
    logs: bool
    parent: int = field(default_factory=os.getpid)
    total: int = 0
    jobs: dict[tuple[str, ...], Job] = field(default_factory=dict)

    @property
    def journal(self) -> Journal:
        """The sweep's journal."""
        return Journal(self.folder)

    @property
    def stop(self) -> Path:
        """Is there once no further job shall start."""
        return self.folder / f".stop-{self.parent}"

    def title(self, job: Job) -> str:
        """Return what a job is called: `job 3 of 12 (seed=2)`."""
        changed = " ".join(f"{key}={short(value)}" for key, value in job.varied.items())
        of = f" of {max(self.total, job.number)}"
        return f"job {job.number}{of}" + (f" ({changed})" if changed else "")


def claims_of(context: Context, job: Job) -> list[Path]:
    """Return the files that are held while a job is being trained.

    The sweep's own is always among them: a call with resume=auto takes up the folder of one without, which may run.
    """
    folders = [context.folder / CLAIMS, *([context.claims] if context.claims is not None else [])]
    return [folder / f"{job.trains}.lock" for folder in folders]


@contextmanager
def claimed(context: Context, job: Job, wait_s: float = 0.0) -> Iterator[bool]:
    """Hold a job for this process, if no other one does; yields whether it is held. See `claims.claim`."""
    with ExitStack() as held:
        yield all(held.enter_context(claim(path, wait_s)) for path in claims_of(context, job))


def holder(context: Context, job: Job) -> str:
    """Return who trains a job that could not be claimed."""
    for path in claims_of(context, job):
        with claim(path) as free:
            if not free:
                return owner(path)
    return "another process"
