"""In what way a student is sampled otherwise than it learnt to step: in other steps, by another sampler, or too early.

Some students learn one number of steps, `method.steps`. Those of halvings learn one after the other: each finished one
is kept as `steps_<N>`, and the live weights, "raw", are the last of them only where the run ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lab.app.config.choices import student_steps
from diffusion_lab.app.sampling.fit import describe_part
from diffusion_lab.modules.distillation.halvings import Halving, halvings


def departures(
    config: Mapping[str, Any], generation: Mapping[str, Any], *, weights: str, images_seen: int
) -> list[str]:
    """Return a line for each way in which a student is sampled otherwise than it learnt.

    Args:
        config: The run's config. Where it has no teacher, or no number of steps, there is nothing to depart from.
        generation: How it is sampled.
        weights: The name of its weights.
        images_seen: Images behind them.
    """
    method = config.get("method") or {}
    if "teacher" not in method:
        return []
    asked = (generation.get("grid") or {}).get("steps")
    if isinstance(learnt := method.get("steps"), int):
        known = asked in (None, learnt)
        found = [] if known else [f"grid.steps={asked}: this student was trained for {learnt}"]
    elif "steps_from" in method:
        found = _of_halvings(method, asked, weights, images_seen)
    else:
        return []
    learnt, taken = (describe_part(part.get("sampler") or {}) for part in (config, generation))
    if taken != learnt:
        found.append(f"sampler {taken}: this student was trained for {learnt}")
    return found


def _of_halvings(method: Mapping[str, Any], asked: int | None, weights: str, images_seen: int) -> list[str]:
    stages = _stages(method)
    ended = [stage.steps for stage in stages if stage.stop <= images_seen]
    if (named := student_steps(weights)) is not None:
        learnt = named
    elif ended and (len(ended) == len(stages) or stages[len(ended) - 1].stop == images_seen):
        learnt = ended[-1]
    else:
        line = f"{weights} at {images_seen:,} images: a student that is still learning {stages[len(ended)].steps} steps"
        return [f"{line}; ema=steps_{ended[-1]} is the last that has learnt its own" if ended else line]
    # one double step is all that the student of two learns
    double = "DoubleStep" in str((method.get("loss") or {}).get("_target_"))
    if asked in (None, learnt) or (double and (learnt, asked) == (2, 1)):
        return []
    line = f"grid.steps={asked}: this student, {weights}, was trained for {learnt}"
    there = asked in [stage.steps for stage in stages]
    return [f"{line}; ema=steps_{asked} is for {asked}" if there else line]


def _stages(method: Mapping[str, Any]) -> Sequence[Halving]:
    return halvings(
        steps_from=method["steps_from"],
        steps_to=method["steps_to"],
        max_images=method["max_images"],
        global_batch_size=method["global_batch_size"],
        longer=method.get("longer"),
    )
