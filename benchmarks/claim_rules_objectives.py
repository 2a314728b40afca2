"""Rules of the claims table for benchmarks/objectives.py: from a stored result to one ratio a seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from claim_rules import Evidence, Rule

# standard errors within which means count as the same
SAME = 3.0


def _figure(result: dict[str, Any], name: str) -> list[float]:
    """Return a figure, a seed each."""
    return next(row["seeds"] for row in result["figures"]["rows"] if row["figure"] == name)


def lower(ours: Sequence[str], others: Sequence[str]) -> Rule:
    """A rule: each of `ours` is lower than its counterpart in `others`; the worst ratio of a seed counts.

    One of ours against several others is compared with each.
    """
    pairs = list(zip(ours if len(ours) > 1 else [ours[0]] * len(others), others, strict=True))

    def rule(result: dict[str, Any]) -> Evidence:
        by_pair = [
            [
                theirs / mine
                for mine, theirs in zip(_figure(result, name), _figure(result, other), strict=True)
            ]
            for name, other in pairs
        ]
        ratios = [min(seed) for seed in zip(*by_pair, strict=True)]
        shown = "; ".join(
            f"{mine} {statistics.mean(_figure(result, mine)):.4g} against {other} "
            f"{statistics.mean(_figure(result, other)):.4g}"
            for mine, other in dict.fromkeys(pairs)
        )
        return Evidence(ratios=ratios, figure=shown)

    return rule


SCHEDULES = ("linear in log-SNR", "cosine", "linear in beta")


def bound_is_the_same(result: dict[str, Any]) -> Evidence:
    """The mean bound under each fixed schedule is within `SAME` standard errors of that under the learned one."""
    bits = {name: _figure(result, f"{name}: bits") for name in ("learned", *SCHEDULES)}
    errors = {name: _figure(result, f"{name}: standard error") for name in bits}
    ratios = []
    for seed in range(len(bits["learned"])):
        apart = [
            abs(bits[name][seed] - bits["learned"][seed])
            / math.hypot(errors[name][seed], errors["learned"][seed])
            for name in SCHEDULES
        ]
        ratios.append(SAME / max(apart))
    shown = ", ".join(
        f"{name} {statistics.mean(bits[name]):.4f} ± {statistics.mean(errors[name]):.4f}" for name in bits
    )
    figure = f"diffusion term, bits/dim: {shown}; ratio: {SAME:g} over the distance in standard errors"
    return Evidence(ratios=ratios, figure=figure)
