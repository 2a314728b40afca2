"""What every benchmark shares: how it is timed, what it prints last, and where its figures are kept.

A result is one JSON object: `figures` (what was measured), `ratios` (1.0 is parity with the peer or the limit, larger
is better for us), `machine`, `commit`. It is printed as the last line and kept in benchmarks/results/<name>.json,
from which the tables of the docs are made (`render_docs.py`).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> str:
    """Describe this machine in a line: processor, cores in use, accelerator, torch."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{accelerator}, torch {torch.__version__}"


def commit() -> str:
    """Return the commit that is measured, with a plus sign where the working tree differs."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    dirty = git(
        "status", "--porcelain", "--untracked-files=no", "--", "diffusion_lab", "conf", "benchmarks/*.py"
    )
    return (git("rev-parse", "HEAD") or "unknown") + ("+" if dirty else "")


def interleaved(
    contenders: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Time each contender once a round, in turn (A B A B ...), so that a machine whose speed drifts is fair to all.

    Returns:
        Seconds of every counted round by contender.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median over rounds of numerator / denominator, pair by pair."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def added_to(name: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the kept result's `by_seed` with `rows` added, so that seeds add up over machines that kept no runs.

    A row takes the place of the kept one that is equal in `keys`.
    """
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()).get("by_seed", []) if file.is_file() else []
    cells = {tuple(row.get(key) for key in keys): dict(row) for row in [*before, *rows]}
    return list(cells.values())


def report(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    tables: Mapping[str, Sequence[Mapping[str, Any]] | str] | None = None,
) -> None:
    """Print a table of `rows`, keep the result, and print it as one JSON line.

    Args:
        name: Name of the benchmark.
        rows: What was measured; rows may lack a column.
        ratios: 1.0 is parity, larger is better for us.
        tables: The same figures arranged for a page, by name; "measure" says what a distance is.
    """
    table = Table(title=name)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        values = [row.get(column, "") for column in columns]
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)
    result = {
        "figures": {"rows": list(rows)},
        "ratios": dict(ratios),
        "machine": machine(),
        "commit": commit(),
        **(tables or {}),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
