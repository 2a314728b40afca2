"""What is told of a sweep: how long it will take, and a row for each job that was planned, whatever it came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from diffusion_lab.app.display import clock
from diffusion_lab.app.sweep.context import Context, claimed, claims_of, holder
from diffusion_lab.app.sweep.job import name_of
from diffusion_lab.app.sweep.journal import Entry, Job, short

# metrics that stand in the table, in this order, after the Fréchet distances
SHOWN = ("loss", "images_per_s", "images_seen")
STYLES = {"failed": "red", "pruned": "dim", "not started": "dim"}


@dataclass
class Pace:
    """How long the jobs of this call took, and how long the rest will take.

    Args:
        parallel: Jobs at once.
    """

    parallel: int = 1
    seconds: list[float] = field(default_factory=list)

    def left(self, jobs: int) -> str:
        """Return the time left for so many jobs; empty before the first has ended."""
        if not self.seconds or not jobs:
            return ""
        mean = sum(self.seconds) / len(self.seconds)
        return f"  {clock(mean * -(-jobs // self.parallel))} left for all"


def told(entry: Entry) -> str:
    """Return what a job came to in a few words."""
    words = entry.status
    if entry.seconds is not None and entry.done:
        words += f" in {clock(entry.seconds)}"
    if entry.objective is not None and entry.done:
        words += f", {entry.objective:.4g}"
    return f"{words}: {entry.reason}" if entry.reason else words


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table says about a job.

    Attributes:
        number: From 1.
        varied: The values that vary, by key.
        status: That of its entry; "interrupted" for one whose process is gone, "elsewhere" for one that another sweep
            trains, "not started".
        same_as: Number of an earlier job with the same config.
        objective: What is compared.
        metrics: The other numbers.
        seconds: How long it took.
        run: Its folder.
        reason: Why it failed, was pruned, or is not here.
    """

    number: int
    varied: dict[str, str]
    status: str
    same_as: int | None
    objective: float | None
    metrics: dict[str, float]
    seconds: float | None
    run: Path | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that the table shows.

    Attributes:
        rows: Best first, then those without a value.
        keys: The keys that vary.
        objective: Name of what is compared; None where no job has it.
        columns: Names of the other numbers.
        direction: "minimize" or "maximize".
        command: The command line.
        created: When the sweep began.
    """

    rows: list[Row]
    keys: list[str]
    objective: str | None
    columns: list[str]
    direction: str
    command: str
    created: str

    @property
    def best(self) -> Row | None:
        """The best of at least two that came to a value."""
        good = [row for row in self.rows if row.status in ("finished", "stopped") and _has_value(row)]
        return good[0] if len(good) > 1 else None

    def count(self, status: str) -> int:
        """How many rows there are with a status."""
        return sum(row.status == status for row in self.rows)


def _has_value(row: Row) -> bool:
    return row.objective is not None and math.isfinite(row.objective)


def collect(context: Context, direction: str) -> Found:
    """Bring together what all jobs of a sweep came to, those of earlier calls included."""
    journal = context.journal
    plan = [(job, journal.read(job.config)) for job in journal.plan()]
    objective = _objective([entry for _, entry in plan if entry is not None], context.objective)
    first: dict[str, int] = {}
    rows = []
    for job, entry in plan:
        rows.append(_row(context, job, entry, first.get(job.config), objective))
        first.setdefault(job.config, job.number)
    there = {name for row in rows for name in row.metrics}
    columns = [*sorted(name for name in there if name.startswith("fd@")), *(n for n in SHOWN if n in there)]
    told = journal.told()
    sign = 1.0 if direction == "minimize" else -1.0

    def place(row: Row) -> tuple[bool, bool, float, int]:
        value = row.objective if row.objective is not None and math.isfinite(row.objective) else math.inf
        return row.status not in ("finished", "stopped"), value == math.inf, sign * value, row.number

    return Found(
        rows=sorted(rows, key=place),
        keys=list(dict.fromkeys(key for row in rows for key in row.varied)),
        objective=objective,
        columns=[name for name in columns if name != objective],
        direction=direction,
        command=str(told.get("command", "")),
        created=str(told.get("created", ""))[:16].replace("T", " "),
    )


def _objective(entries: Sequence[Entry], wanted: str | None) -> str | None:
    """Return the one column that all jobs are compared by; None if none has it."""
    names = [name for entry in entries if (name := name_of(entry.metrics, wanted)) is not None]
    # a job that was ended early has a loss only, where the others have a distance: no column mixes the two
    names = [name for name in names if name.startswith("fd@")] or names
    return max(dict.fromkeys(names), key=names.count) if names else None


def _row(context: Context, job: Job, entry: Entry | None, same_as: int | None, objective: str | None) -> Row:
    status = entry.status if entry is not None else "not started"
    reason = entry.reason if entry is not None else None
    if (entry is None or not entry.done) and any(path.exists() for path in claims_of(context, job)):
        with claimed(context, job) as free:
            pass
        if not free:
            status, reason = "elsewhere", f"is being trained by {holder(context, job)}"
        elif status == "running":
            status = "interrupted"
    run = Path(entry.run) if entry is not None and entry.run else None
    return Row(
        number=job.number,
        varied=job.varied,
        status=status,
        same_as=same_as,
        objective=entry.metrics.get(objective) if entry is not None and objective is not None else None,
        metrics=entry.metrics if entry is not None else {},
        seconds=entry.seconds if entry is not None else None,
        run=run,
        reason=reason,
    )


def number(value: float | None) -> str:
    """Write a number with four digits; a dash for none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".removesuffix(".")


def cells(found: Found, row: Row) -> list[str]:
    """Return the numbers of a row as text: objective, the other columns, time."""
    texts = [number(row.objective)] if found.objective else []
    for name in found.columns:
        value = row.metrics.get(name)
        whole = name == "images_seen" and value is not None
        texts.append(f"{value:,.0f}" if whole else number(value))
    return [*texts, "–" if row.seconds is None else clock(row.seconds)]


def heads(found: Found) -> list[str]:
    """Return the names of these columns."""
    return [*([found.objective] if found.objective else []), *found.columns, "time"]


def what(row: Row) -> str:
    """Return how a row ended."""
    return f"as job {row.same_as}" if row.same_as is not None else row.status


def table(found: Found) -> Table:
    """Lay the table out for the terminal, the best row first."""
    out = Table(box=None, pad_edge=False, header_style="dim")
    out.add_column("job", justify="right")
    for key in found.keys:
        out.add_column(Text(key))
    for name in heads(found):
        out.add_column(Text(name), justify="right")
    out.add_column("status")
    out.add_column("run")
    for row in found.rows:
        texts: Sequence[str] = [
            str(row.number),
            *(short(row.varied.get(key, "–")) for key in found.keys),
            *cells(found, row),
            what(row),
            row.run.name if row.run else "–",
        ]
        style = "bold" if row is found.best else STYLES.get(row.status)
        out.add_row(*(Text(text) for text in texts), style=style)
    return out
