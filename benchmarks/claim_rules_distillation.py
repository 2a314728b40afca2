"""Rules of the claims table for benchmarks/distillation.py: from a stored result to one ratio a seed.

Distances are taken twice, from the test images and from the training images, and the worse of the two ratios counts: a
student that comes nearer to the one by leaving the other is not better.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from claim_rules import NOTHING, Evidence, Rule

DISTANCES = ("FD", "FD, training")
COST = "cost / teacher's training"
TEACHERS = ("teacher, DDIM", "teacher, ancestral")

Cell = tuple[str, int]


def _column(result: dict[str, Any], cell: Cell, column: str) -> dict[int, float]:
    """Return a figure of a method's student, or of the teacher, of so many steps, by seed; {} if it is not known."""
    return {
        row["seed"]: row[column]
        for row in result["by_seed"]
        if (row["method"], row.get("steps")) == cell and column in row
    }


def _shown(result: dict[str, Any], cell: Cell) -> str:
    means = [statistics.mean(_column(result, cell, column).values()) for column in DISTANCES]
    return f"{cell[0]}, {cell[1]} steps: {means[0]:.3g} (training {means[1]:.3g})"


def _compared(result: dict[str, Any], pairs: Sequence[tuple[Cell, Cell]], allowed: float) -> Evidence:
    """Return for each seed that has all cells the least of `allowed` their / our distance."""
    columns = [
        (_column(result, mine, column), _column(result, theirs, column))
        for mine, theirs in pairs
        for column in DISTANCES
    ]
    seeds = set.intersection(*(set(one) for pair in columns for one in pair))
    if not seeds:
        return NOTHING
    return Evidence(
        ratios=[
            min(allowed * theirs[seed] / mine[seed] for mine, theirs in columns) for seed in sorted(seeds)
        ],
        figure="; ".join(
            _shown(result, cell) for cell in dict.fromkeys(cell for pair in pairs for cell in pair)
        ),
    )


def nearer_than(ours: Sequence[Cell], theirs: Sequence[Cell], allowed: float = 1.0) -> Rule:
    """A rule: each of `ours` has no more than `allowed` times the distance of its counterpart in `theirs`.

    One of ours against several others is compared with each, and the other way round.
    """
    many = max(len(ours), len(theirs))
    pairs = list(zip([*ours] * (many // len(ours)), [*theirs] * (many // len(theirs)), strict=True))

    def rule(result: dict[str, Any]) -> Evidence:
        return _compared(result, pairs, allowed)

    return rule


def improves_with_steps(method: str, steps: Sequence[int]) -> Rule:
    """A rule: more steps have a lower distance, from each number to the next."""
    pairs = [((method, more), (method, fewer)) for fewer, more in pairwise(steps)]

    def rule(result: dict[str, Any]) -> Evidence:
        return _compared(result, pairs, 1.0)

    return rule


def costs_no_more_than_training(method: str, steps: int) -> Rule:
    """A rule: processor time of training the teacher over that of the whole distillation."""

    def rule(result: dict[str, Any]) -> Evidence:
        cost = _column(result, (method, steps), COST)
        if not cost:
            return NOTHING
        return Evidence(
            ratios=[1.0 / value for _, value in sorted(cost.items())],
            figure=f"{method}: {statistics.mean(cost.values()):.2f} of the teacher's training",
        )

    return rule


def more_recall(ours: Cell, theirs: Cell) -> Rule:
    """A rule: recall of one student over that of another."""

    def rule(result: dict[str, Any]) -> Evidence:
        mine, other = (_column(result, cell, "recall") for cell in (ours, theirs))
        seeds = sorted(set(mine) & set(other))
        if not seeds:
            return NOTHING
        return Evidence(
            ratios=[mine[seed] / other[seed] for seed in seeds],
            figure=f"recall: {ours[0]} {statistics.mean(mine.values()):.3f}, {theirs[0]} "
            f"{statistics.mean(other.values()):.3f}",
        )

    return rule
