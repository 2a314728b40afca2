"""Halvings: N -> N / 2 -> ... -> 1 steps, and which part of a run each of them gets.

A run of `max_images` is shared out among the halvings in equal parts, but for those that are named as longer: the
shares are counted in whole optimizer steps, so the borders are points of the clock that every run meets. All is a
function of the clock; nothing is stored.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Halving:
    """One stage.

    Attributes:
        steps: N of the student; its teacher takes 2 N.
        start: Images seen before it.
        stop: Images seen after it.
    """

    steps: int
    start: int
    stop: int


def halvings(
    *,
    steps_from: int,
    steps_to: int,
    max_images: int,
    global_batch_size: int,
    longer: Mapping[int, float] | None = None,
) -> list[Halving]:
    """Share a run out.

    Args:
        steps_from: Steps of the first teacher.
        steps_to: Steps of the last student, `steps_from` halved once or more often.
        max_images: Length of the run.
        global_batch_size: Images of an optimizer step.
        longer: How many shares the halving to N gets, by N; all others get one.

    Raises:
        ValueError: If halving does not lead from the one to the other, a share is not positive, or the run is too
            short.
    """
    ratio = steps_from // steps_to if steps_to > 0 and steps_from % steps_to == 0 else 0
    if ratio < 2 or ratio & (ratio - 1):
        raise ValueError(
            f"halving does not lead from steps_from={steps_from} to steps_to={steps_to}: take e.g. "
            f"steps_from={max(1, steps_to) * 2 ** max(1, (steps_from // max(1, steps_to)).bit_length() - 1)}"
        )
    targets = [steps_to * 2**k for k in reversed(range(ratio.bit_length() - 1))]
    shares = [float((longer or {}).get(steps, 1.0)) for steps in targets]
    if not all(0 < share < float("inf") for share in shares):
        raise ValueError(f"longer: shares must be positive, got {dict(longer or {})}")
    total = -(-max_images // global_batch_size)
    borders = [round(total * sum(shares[:k]) / sum(shares)) for k in range(len(shares) + 1)]
    if any(after <= before for before, after in pairwise(borders)):
        raise ValueError(
            f"{len(targets)} halvings do not fit into {total} steps (max_images={max_images}, batches of "
            f"{global_batch_size}): train longer, or take a smaller steps_from"
        )
    return [
        Halving(steps=steps, start=before * global_batch_size, stop=after * global_batch_size)
        for steps, (before, after) in zip(targets, pairwise(borders), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class LinearPerHalving:
    """A learning rate that falls in a straight line from 1 to 0 within each halving, without warm-up.

    Args:
        stages: The halvings.
    """

    stages: Sequence[Halving]

    def at(self, images_seen: int) -> Halving:
        """Return the halving that the step after `images_seen` images belongs to; the last one beyond the end."""
        place = bisect_right([stage.start for stage in self.stages], images_seen) - 1
        return self.stages[max(0, place)]

    def __call__(self, images_seen: int) -> float:
        """Return the factor on the learning rate."""
        stage = self.at(images_seen)
        return max(0.0, (stage.stop - images_seen) / (stage.stop - stage.start))
