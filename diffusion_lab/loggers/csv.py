"""metrics.csv: one row for each point of the clock, one column for each metric.

    images_seen,loss,learning_rate,gradient_norm
    10000,0.07812,0.001,0.41

Numbers are written with all their digits, so a file can be compared bit by bit. A metric that appears later
adds a column (the file is rewritten then, which is rare). After `rewind(n)`, rows beyond n are gone: a
resumed run writes them again, and the file equals that of a run never interrupted.
"""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

CLOCK = "images_seen"


def _text(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    return repr(value) if isinstance(value, float) else str(value)


class CSVMetrics(Logger):
    """Writes `<dirpath>/metrics.csv`.

    Args:
        dirpath: The run folder.
    """

    def __init__(self, *, dirpath: str) -> None:
        super().__init__()
        self.dirpath = Path(dirpath)
        self.path = self.dirpath / "metrics.csv"
        self._columns: list[str] = [CLOCK]
        self._row: dict[str, str] = {}
        self._row_start: int | None = None
        self._opened = False

    @property
    def name(self) -> str:
        """Always "csv"."""
        return "csv"

    @property
    def version(self) -> str:
        """Name of the run folder."""
        return self.dirpath.name

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.dirpath)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Nothing: the run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add metrics to the row of this point of the clock.

        Args:
            metrics: Numbers by name.
            step: Images seen.

        Raises:
            ValueError: If `step` is missing.
        """
        if step is None:
            raise ValueError("CSVMetrics needs step=images_seen")
        self._open()
        if self._row.get(CLOCK) != str(step):
            self._row, self._row_start = {CLOCK: str(step)}, None
        self._row.update({name: _text(value) for name, value in metrics.items()})
        new = [name for name in self._row if name not in self._columns]
        if new:
            self._widen(new)
        self._put_row()

    def _open(self) -> None:
        """Take over a file that is already there."""
        if not self._opened:
            self._opened = True
            if self.path.exists():
                self._columns = self._read()[0]

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Header and whole rows; a row cut off by a crash is left out."""
        lines = self.path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        reader = csv.DictReader(io.StringIO("".join(whole)))
        columns = list(reader.fieldnames or [CLOCK])
        rows = [row for row in reader if None not in row and None not in row.values()]
        return columns, [row for row in rows if row.get(CLOCK, "").isdigit()]

    def _line(self, cells: list[str]) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow(cells)
        return out.getvalue()

    def _put_row(self) -> None:
        """Write the current row at the end of the file, over its own earlier state if it has one."""
        text = self._line([self._row.get(name, "") for name in self._columns])
        if not self.path.exists():
            self._rewrite([])
        with self.path.open("r+") as file:
            if self._row_start is None:
                self._row_start = file.seek(0, os.SEEK_END)
            file.seek(self._row_start)
            file.write(text)
            file.truncate()

    def _widen(self, new: list[str]) -> None:
        rows = self._read()[1] if self.path.exists() else []
        if self._row_start is not None:
            rows = rows[:-1]
        self._columns += new
        self._rewrite(rows)
        self._row_start = None

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.dirpath.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(".metrics.csv.tmp")
        with temporary.open("w") as file:
            file.write(self._line(self._columns))
            file.writelines(self._line([row.get(name, "") for name in self._columns]) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    @rank_zero_only
    def rewind(self, images_seen: int) -> None:
        """Drop the rows beyond `images_seen`."""
        self._row, self._row_start, self._opened = {}, None, True
        if self.path.exists():
            self._columns, rows = self._read()
            kept = [row for row in rows if int(row[CLOCK]) <= images_seen]
            used = {name for row in kept for name, value in row.items() if value != ""}
            # a column whose values all lay beyond comes back in its own time and place
            self._columns = [name for name in self._columns if name == CLOCK or name in used]
            self._rewrite(kept)

    @rank_zero_only
    def save(self) -> None:
        """Make sure that every row is on the disk."""
        if self.path.exists():
            with self.path.open("r+") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write everything out."""
        self.save()
