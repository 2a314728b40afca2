"""The journal of a sweep: what its jobs are, and what each has come to, in files that any process can write.

    <paths.runs>/sweeps/<time>-<key>/
        sweep.json              the command, and the list of jobs
        jobs/<config>.json      what a job came to; written by the process that runs it
        curves/<config>.json    its curve so far, where hopeless runs are pruned
        logs/                   what jobs that run elsewhere print
    <paths.runs>/sweeps/.claims/<trains>.lock     held while it is being trained

The key is a hash of the command line, so the same command finds its sweep again. A job is known by its *config*: a hash
of what it trains, how long, and of the values that the sweep varies (a sampler is no part of training, but a sweep over
samplers has a job for each). Two jobs with the same config are one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from diffusion_lab.app.runs.run import NOT_IDENTITY, RunFolder, digest, identity, list_runs
from diffusion_lab.claims import claim
from diffusion_lab.files import write_atomically

SWEEPS = "sweeps"
CLAIMS = ".claims"
# nothing more is to be done about these
DONE = ("finished", "stopped", "pruned")
# words of a command line that do not make it another sweep
NOT_KEY = ("resume", "launcher", "hydra/launcher", "hydra.launcher", "sweep.trials", "hydra.sweep")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it was planned.

    Attributes:
        number: From 1, in the order in which the jobs came up.
        overrides: Its part of the command line.
        varied: The values that vary in the sweep, by key.
        config: Hash of what it is; jobs with the same one are one.
        trains: Hash of what it trains, whatever its length: what is claimed.
    """

    number: int
    overrides: list[str]
    varied: dict[str, str]
    config: str
    trains: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a job has come to.

    Attributes:
        config: Hash of what it is.
        overrides: Its part of the command line.
        status: "running"; "finished", "stopped" (by a limit of the trainer), "pruned"; "failed"; "preempted",
            "interrupted".
        run: Its run folder; None if there is none.
        metrics: Newest values of metrics.csv, and `images_seen`.
        objective: What the sweep compares.
        reason: The one line that tells why it failed, or was pruned.
        start: When it was started last.
        seconds: How long it took, then.
        attempts: How often it was started.
        where: Process and machine.
    """

    config: str
    overrides: list[str]
    status: str
    run: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    objective: float | None = None
    reason: str | None = None
    start: str | None = None
    seconds: float | None = None
    attempts: int = 1
    where: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing more is to be done about it."""
        return self.status in DONE


class Journal:
    """The files of one sweep.

    Args:
        folder: Its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ---- entries -------------------------------------------------------------------------------------------

    def read(self, config: str) -> Entry | None:
        """Return what a job has come to; None if it was never started, or its file is unreadable."""
        try:
            found = json.loads((self.folder / "jobs" / f"{config}.json").read_text(encoding="utf-8"))
            return Entry(**{item.name: found[item.name] for item in fields(Entry) if item.name in found})
        except (OSError, ValueError, TypeError):
            return None

    def write(self, entry: Entry) -> None:
        """Write what a job has come to."""
        write_atomically(
            self.folder / "jobs" / f"{entry.config}.json", json.dumps(asdict(entry), indent=2) + "\n"
        )

    # ---- the plan ------------------------------------------------------------------------------------------

    def told(self) -> dict[str, Any]:
        """Return sweep.json; empty if it is missing."""
        try:
            found = json.loads((self.folder / "sweep.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Put facts into sweep.json."""
        write_atomically(
            self.folder / "sweep.json", json.dumps({**self.told(), **facts}, indent=2, default=str) + "\n"
        )

    def plan(self) -> list[Job]:
        """Return all jobs so far."""
        return [Job(**item) for item in self.told().get("jobs", [])]

    def add(self, jobs: Sequence[Job]) -> list[Job]:
        """Add jobs to the plan, and return them with their numbers.

        Within a sweep a job is its values: one that stands there already keeps its number. Other calls of the same
        command may add theirs at the same time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with claim(self.folder / ".plan.lock", wait_s=60.0):
            plan = self.plan()
            known = {tuple(sorted(job.varied.items())): job for job in plan}
            added = []
            for job in jobs:
                values = tuple(sorted(job.varied.items()))
                found = known.get(values)
                # what a config hashes to may change with the version of the package
                found = replace(job, number=found.number if found else len(plan) + 1)
                if found.number > len(plan):
                    plan.append(found)
                else:
                    plan[found.number - 1] = found
                known[values] = found
                added.append(found)
            self.tell({"jobs": [asdict(job) for job in plan]})
        return added


def short(value: str) -> str:
    """Return a value of the command line with no more digits than a reader wants."""
    if len(value) <= 8 or not re.fullmatch(r"-?\d*\.?\d+(e[-+]?\d+)?", value):
        return value
    return f"{float(value):.4g}" if "." in value or "e" in value else value


# ---- what a job is -----------------------------------------------------------------------------------------


def _told_apart(config: Mapping[str, Any], varied: Sequence[str]) -> dict[str, Any]:
    """Return the values that vary although no weight depends on them."""
    found: dict[str, Any] = {}
    choices = config.get("choices") or {}
    for key in varied:
        name = key.lstrip("+~")
        if "@" in name or name in ("experiment", "debug"):
            # a group that may change anything, weights or not
            found[name] = choices.get(name)
            continue
        top, *rest = name.split(".")
        if top in ("resume", "paths", "hydra") or (
            top not in NOT_IDENTITY and top not in ("trainer", "callbacks", "dataset")
        ):
            continue
        value: Any = config.get(top)
        for name in rest:
            value = value.get(name) if isinstance(value, Mapping) else None
        found[name] = value
    return found


def trains(config: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Hash what a job trains and what tells it apart; whoever has the same is the same run.

    Args:
        config: A resolved config.
        varied: The keys that vary in the sweep.
    """
    return digest([identity(config), _told_apart(config, varied)])


def config_hash(config: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Hash what a job is: what it trains, and for how long."""
    return digest([trains(config, varied), config.get("max_images")])


def find_run(config: Mapping[str, Any], varied: Sequence[str]) -> RunFolder | None:
    """Return the newest run of the same name that trains what a config says, finished or not."""
    from diffusion_lab.app.config.choices import read_unchecked
    from diffusion_lab.app.errors import UserError
    from diffusion_lab.app.runs import record

    wanted, own = trains(config, varied), identity(config)
    for folder in list_runs(Path(config["paths"]["runs"]) / config["name"]):
        # the record is read fast, a config is not
        told = record.read(folder.record)
        seen = record.last_session(told).get("images_seen") or 0
        # one that went on for longer is another job's, whose numbers are not this one's
        if told.get("identity", own) != own or seen > config["max_images"]:
            continue
        try:
            if trains(read_unchecked(folder.path), varied) == wanted:
                return folder
        except UserError:
            continue
    return None


# ---- which sweep this is -------------------------------------------------------------------------------------


def sweep_key(app: str, overrides: Sequence[str]) -> str:
    """Hash a command line without what may change from call to call."""
    kept = [word for word in overrides if not _is_not_key(word.lstrip("+~").partition("=")[0])]
    return digest([app, kept])[:8]


def _is_not_key(name: str) -> bool:
    return any(name == word or name.startswith(f"{word}.") for word in NOT_KEY)


def find_sweep(runs: Path, key: str) -> Path | None:
    """Return the newest sweep of a command line."""
    found = sorted((runs / SWEEPS).glob(f"*-{key}/sweep.json"), key=lambda path: path.parent.name)
    return found[-1].parent if found else None


def new_sweep(runs: Path, key: str) -> Path:
    """Make the folder of a new sweep."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(10_000):
        folder = runs / SWEEPS / f"{stamp}{f'.{attempt}' if attempt else ''}-{key}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"no free name for a sweep in {runs / SWEEPS}")
