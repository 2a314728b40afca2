"""Rules of the claims table: from a stored result to one ratio a seed, above 1 where the claim is true."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Rule = Callable[[dict[str, Any]], "Evidence"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a rule finds: one ratio a seed, the figures in words, and whether the claim can be tested by them."""

    ratios: Sequence[float]
    figure: str
    testable: bool = True


NOTHING = Evidence(ratios=[], figure="")
"""Where what a claim is about has not been measured yet."""


# ---- samplers ------------------------------------------------------------------------------------------------


def _cell(result: dict[str, Any], sampler: str, budget: int) -> list[float]:
    """Return a sampler's distances, a seed each, on the better of the grids it was run on."""
    rows = [
        row
        for row in result["figures"]["rows"]
        if (row["sampler"], row["budget"], row["by"]) == (sampler, budget, "diffusion_lab") and "grid" in row
    ]
    return min((row["seeds"] for row in rows), key=statistics.mean)


def better(ours: str, others: Sequence[str], budgets: Sequence[int]) -> Callable[[dict[str, Any]], Evidence]:
    """A rule: at every budget, `ours` has a lower distance than each of `others`; the worst ratio of a seed counts."""

    def rule(result: dict[str, Any]) -> Evidence:
        mine = {b: _cell(result, ours, b) for b in budgets}
        ratios: list[float] = []
        for seed in range(len(mine[budgets[0]])):
            worst = min(_cell(result, other, b)[seed] / mine[b][seed] for other in others for b in budgets)
            ratios.append(worst)
        shown = [
            f"{b} NFE: {statistics.mean(mine[b]):.3g} against "
            + ", ".join(f"{other} {statistics.mean(_cell(result, other, b)):.3g}" for other in others)
            for b in budgets
        ]
        # where no contender gains by more steps, a distance says nothing about how fast they converge
        longest = max(row["budget"] for row in result["figures"]["rows"])
        converged = all(
            statistics.mean(_cell(result, name, b)) <= 1.05 * statistics.mean(_last(result, name, longest))
            for name in (ours, *others)
            for b in budgets
        )
        return Evidence(ratios=ratios, figure="; ".join(shown), testable=not converged)

    return rule


def _last(result: dict[str, Any], sampler: str, budget: int) -> list[float]:
    """Return the distances at the largest budget; a variant that was not run there has those of its sampler."""
    try:
        return _cell(result, sampler, budget)
    except ValueError:
        return _cell(result, sampler.partition(" (")[0], budget)


def nearer(ours: str, others: Sequence[str], budgets: Sequence[int]) -> Callable[[dict[str, Any]], Evidence]:
    """A rule: at every budget, `ours` is nearer to the solution of the network's own ODE than each of `others`."""

    def errors(result: dict[str, Any], sampler: str, budget: int) -> list[float]:
        return next(
            row["seeds"]
            for row in result["figures"]["rows"]
            if "RMSE" in row and (row["sampler"], row["budget"]) == (sampler, budget)
        )

    def rule(result: dict[str, Any]) -> Evidence:
        mine = {b: errors(result, ours, b) for b in budgets}
        ratios = [
            min(errors(result, other, b)[seed] / mine[b][seed] for other in others for b in budgets)
            for seed in range(len(mine[budgets[0]]))
        ]
        shown = [
            f"{b} NFE: error {statistics.mean(mine[b]):.3g} against "
            + ", ".join(f"{other} {statistics.mean(errors(result, other, b)):.3g}" for other in others)
            for b in budgets
        ]
        return Evidence(ratios=ratios, figure="; ".join(shown))

    return rule


# ---- guidance ------------------------------------------------------------------------------------------------


def _points(
    result: dict[str, Any], method: str, interval: str = "everywhere"
) -> dict[float, list[dict[str, float]]]:
    """Return what each seed came to, by scale, of one method in one interval."""
    return {
        row["scale"]: row["seeds"]
        for row in result["figures"]["rows"]
        if (row["method"], row["interval"]) == (method, interval)
    }


def _when(scales: dict[float, list[dict[str, float]]], seed: int, accuracy: float, key: str) -> float:
    """Return a figure at the smallest scale that reaches an accuracy, between scales interpolated.

    Accuracy saturates: larger scales have it too, at worse figures, and are no fair rival.
    """
    points = [(found[seed]["accuracy"], found[seed][key]) for _, found in sorted(scales.items())]
    if points[0][0] >= accuracy:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 >= accuracy:
            return y0 + (y1 - y0) * (accuracy - x0) / (x1 - x0)
    return max(points)[1]


def mean(seeds: Sequence[dict[str, float]], key: str) -> float:
    """Return the mean over seeds."""
    return statistics.mean(seed[key] for seed in seeds)


def interval_at_equal_accuracy(result: dict[str, Any]) -> Evidence:
    """The best setting with an interval against constant guidance of the same accuracy, between scales interpolated."""
    constant = _points(result, "cfg")
    intervals = sorted({row["interval"] for row in result["figures"]["rows"]} - {"everywhere"})
    settings = [(i, scale, seeds) for i in intervals for scale, seeds in _points(result, "cfg", i).items()]
    interval, scale, seeds = min(settings, key=lambda setting: mean(setting[2], "FD"))
    ratios, there = [], []
    for k, found in enumerate(seeds):
        there.append(_when(constant, k, found["accuracy"], "FD"))
        ratios.append(there[-1] / found["FD"])
    return Evidence(
        ratios=ratios,
        figure=f"scale {scale:g} in {interval}: {mean(seeds, 'FD'):.3g} at accuracy {mean(seeds, 'accuracy'):.3f}, "
        f"constant {statistics.mean(there):.3g}",
    )


def autoguidance_recall(result: dict[str, Any]) -> Evidence:
    """Recall of autoguidance at scale 2, against that of classifier-free guidance of the same accuracy."""
    cfg, auto = _points(result, "cfg"), _points(result, "autoguidance")[2.0]
    ratios, there = [], []
    for k, found in enumerate(auto):
        # not of the same precision, which beyond some scale falls again
        there.append(_when(cfg, k, found["accuracy"], "recall"))
        ratios.append(found["recall"] / there[-1])
    return Evidence(
        ratios=ratios,
        figure=f"recall {mean(auto, 'recall'):.3f} at accuracy {mean(auto, 'accuracy'):.3f}, classifier-free guidance "
        f"{statistics.mean(there):.3f}",
    )


def reconstruction_against_replacement(result: dict[str, Any]) -> Evidence:
    """The distance of completed images, at the weight the derivation gives."""
    replaced, guided = _points(result, "replacement")[0.0], _points(result, "reconstruction")[1.0]
    return Evidence(
        ratios=[there["FD"] / here["FD"] for there, here in zip(replaced, guided, strict=True)],
        figure=f"{mean(guided, 'FD'):.3g} (class recognised {mean(guided, 'accuracy'):.3f}) against "
        f"{mean(replaced, 'FD'):.3g} ({mean(replaced, 'accuracy'):.3f})",
    )


def dynamic_threshold_at_high_scale(result: dict[str, Any]) -> Evidence:
    """The distance at the largest scale, without and with the threshold."""
    plain, held = _points(result, "cfg"), _points(result, "cfg + dynamic threshold")
    scale = max(held)
    return Evidence(
        ratios=[there["FD"] / here["FD"] for there, here in zip(plain[scale], held[scale], strict=True)],
        figure=f"scale {scale:g}: {mean(held[scale], 'FD'):.3g} against {mean(plain[scale], 'FD'):.3g}",
    )
