"""The rows of a comparison: plain values, how they differ, and which of them may stand in one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lab.metrics.protocol import Record

# values that are folders, shown without what they have in common
PLACES = ("run", "samples")


@dataclass(frozen=True)
class First:
    """The first ones of a set: images `(K, H, W, C)` uint8, or points `(K, D)`, and labels `(K,)`, -1 for none."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Row:
    """What one job came to.

    Attributes:
        varied: The overrides in which the jobs differ.
        told: The record.json of its samples; empty for samples of others.
        n: Number of samples.
        first: The first samples.
        distance: The Fréchet distance; None where `why` tells why not.
        others: What else was measured, such as the share recognised as the class asked for.
        why: Column to the line that explains its dash or its number.
    """

    varied: dict[str, str]
    told: dict[str, Any]
    n: int
    first: First
    distance: Record | None
    others: tuple[Record, ...]
    why: dict[str, str]

    def other(self, metric: str) -> Record | None:
        """Return the record of another measure; None where it was not measured."""
        return next((item for item in self.others if item.metric == metric), None)

    @property
    def accuracy(self) -> Record | None:
        """The share recognised as the class asked for, where there are labels and a classifier."""
        return self.other("accuracy")

    @property
    def sampler(self) -> str:
        """The option of the command line, or what the samples' record says."""
        return self.varied.get("sampler") or str(self.told.get("sampler", "unknown")).removesuffix("()")

    @property
    def nfe(self) -> int | None:
        """Evaluations of the network for one sample."""
        return self.told.get("nfe")

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of drawing them."""
        return self.told.get("seconds")

    @property
    def seconds_per_1000(self) -> float | None:
        """The same for 1000 samples; those that an earlier job had left do not count."""
        made = self.told.get("made", self.n)
        return 1000 * self.seconds / made if self.seconds is not None and made else None


@dataclass(frozen=True)
class Sheet:
    """All that the page shows.

    Attributes:
        app: "sample" or "evaluate".
        command: The command line.
        runs: The run folders.
        names: Their names.
        keys: The overrides in which the jobs differ.
        groups: Rows whose distances may be compared, nearest first; those without one come last.
        failures: What was varied, and the line that tells why, of each job that failed.
        real: The first real training images, or None where the data cannot be read.
        device: What computed.
    """

    app: str
    command: str
    runs: list[Path]
    names: list[str]
    keys: list[str]
    groups: list[list[Row]]
    failures: list[tuple[dict[str, str], str]]
    real: First | None
    device: str | None = None
    created: str = field(default_factory=lambda: datetime.now().strftime("%Y-%m-%d %H:%M"))

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of the page."""
        return [row for group in self.groups for row in group]

    @property
    def footnotes(self) -> list[str]:
        """The lines that rows refer to by number, from 1."""
        return list(dict.fromkeys(line for row in self.rows for line in row.why.values()))


def differing(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Return the overrides of every job that are not the same in all jobs.

    Args:
        jobs: The overrides of each, as typed.
    """
    parsed = [dict(_split(item) for item in overrides) for overrides in jobs]
    keys = [key for key in dict.fromkeys(key for job in parsed for key in job) if key != "out"]
    keys = [key for key in keys if len({job.get(key) for job in parsed}) > 1]
    short = {key: _shortened([job.get(key, "") for job in parsed]) for key in keys if key in PLACES}
    return [
        {key: short[key][job.get(key, "")] if key in short else job.get(key, "–") for key in keys}
        for job in parsed
    ]


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return key.lstrip("+"), value


def _shortened(paths: Sequence[str]) -> dict[str, str]:
    """Return paths without the folders that all of them have in common."""
    common = os.path.commonpath([Path(path).absolute() for path in paths])
    return {path: os.path.relpath(Path(path).absolute(), common) for path in paths}


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Part rows into those whose distances may be compared, nearest first; rows without one end the last group."""
    groups: list[list[tuple[Record, Row]]] = []
    for row in rows:
        if row.distance is None:
            continue
        for group in groups:
            if not row.distance.differences(group[0][0]):
                group.append((row.distance, row))
                break
        else:
            groups.append([(row.distance, row)])
    found = [[row for _, row in sorted(group, key=lambda pair: pair[0].value)] for group in groups]
    rest = [row for row in rows if row.distance is None]
    return [*found[:-1], [*found[-1], *rest]] if found else [rest]
