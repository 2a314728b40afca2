"""What the entry points print: one table at the end, and a line that moves while work goes on."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from diffusion_lab.app.config.allowlist import TRUST, needs_trust
from diffusion_lab.app.runs import record
from diffusion_lab.app.runs.run import RunFolder
from diffusion_lab.app.teacher import makes_images


def clock(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read metrics.csv: one dict a row, without the cells that are empty or no numbers."""
    if not path.is_file():
        return []
    rows: list[dict[str, float]] = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cells: dict[str, float] = {}
            for name, text in row.items():
                try:
                    cells[str(name)] = float(text)
                except (TypeError, ValueError):
                    continue
            if "images_seen" in cells:
                rows.append(cells)
    return rows


def newest(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Return the last value of one metric, or None."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def shown(path: Path | str, typed: Path | str) -> str:
    """Return a path as the user would type it: relative to here where what he typed was relative."""
    return str(path) if Path(typed).is_absolute() else os.path.relpath(path)


def facts_table(facts: Sequence[tuple[str, str]], title: str) -> Table:
    """Lay out names and values in two columns."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def show(table: Table) -> None:
    """Print a table without folding its cells: a path must stay in one piece to be copied."""
    wide = Console(width=10_000).measure(table).maximum
    console = Console()
    Console(width=max(console.width, wide)).print(table)


def summary(folder: RunFolder, config: Mapping[str, Any], exported: Sequence[Path], report: Path) -> Table:
    """Return the table at the end of training."""
    rows, told = read_metrics(folder.metrics_csv), record.read(folder.record)
    sessions = [s for s in told.get("sessions", []) if s.get("images_seen") is not None]
    seconds = record.training_seconds(told)
    facts = [("run", str(folder.path))]
    if sessions:
        facts.append(("images seen", f"{sessions[-1]['images_seen']:,} in {clock(seconds)}"))
    speed, loss = newest(rows, "images_per_s"), newest(rows, "loss")
    if speed is not None:
        facts.append(("speed", f"{speed:,.0f} images/s"))
    if loss is not None:
        facts.append(("loss", f"{loss:.4f}"))
    if exported:
        names = ", ".join(path.stem for path in exported)
        facts.append(("weights", f"{exported[0].parent}: {names}" if len(exported) > 1 else str(exported[0])))
        own = needs_trust(dict(config))
        trust = f"{TRUST}={','.join(own)} " if own else ""
        use = f"run={folder.path}"
        if "classifier" in config["method"]:
            use = f"run=<a denoiser's run> guidance=classifier guidance.classifier.{use}"
        if makes_images(config["method"]):
            facts.append(("sample", f"{trust}python sample.py {use}"))
            # what the run kept under names of its own, such as the students of more steps
            kept = [
                path.stem for path in exported if path.stem not in (*(config.get("averages") or {}), "raw")
            ]
            if kept:
                facts.append(("or of others", f"{trust}python sample.py {use} ema={kept[-1]}"))
            facts.append(("score", f"{trust}python evaluate.py {use}"))
    else:
        facts.append(("weights", "none kept: the callback `checkpoints` was left out"))
    facts.append(("report", str(report)))
    limit = sessions[-1].get("stopped_by") if sessions else None
    return facts_table(facts, f"{config['name']}: {f'stopped by {limit}' if limit else 'done'}")


class Ticker:
    """Progress of work in countable pieces: a bar on a terminal, a line every few seconds elsewhere.

    Args:
        what: The word in front, e.g. "sampling".
        total: Number of pieces.
        done: Pieces done before, which do not count for the speed.
        unit: What is counted.
        every_s: Seconds between lines where the output is not a terminal.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, unit: str = "images", every_s: float = 5.0
    ) -> None:
        self.what, self.total, self.before, self.unit, self.every_s = what, total, done, unit, every_s
        self.done = done
        self._start = self._shown = time.perf_counter()
        self._bar: Progress | None = None
        console = Console(file=sys.stdout)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(what), BarColumn(), TextColumn("{task.fields[text]}"), console=console
            )
            self._task = self._bar.add_task("", total=total, completed=done, text="")
            self._bar.start()

    def text(self) -> str:
        """Return pieces done, speed and time left."""
        seconds = time.perf_counter() - self._start
        made = self.done - self.before
        line = f"{self.done:,} / {self.total:,} {self.unit}"
        if made and seconds > 0.0:
            speed = made / seconds
            line += f"  {speed:,.1f} {self.unit}/s  {clock((self.total - self.done) / speed)} left"
        return line

    def update(self, done: int) -> None:
        """Tell how many pieces are done now, those from before included."""
        if done == self.done:
            return
        self.done, now = done, time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=self.text())
        elif now - self._shown >= self.every_s or done == self.total:
            self._shown = now
            print(f"{self.what}  {self.text()}", flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
