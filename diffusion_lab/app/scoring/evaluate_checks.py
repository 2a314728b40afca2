"""Check what an evaluation asks for before anything slow is done for it: each mistake is one line.

words        how samples are drawn has no part in scoring samples that exist
paths        the samples and the reference are there
fit          number, shape and features fit one another, tried on blank images before any sample is drawn
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_lab.app.config.choices import typed
from diffusion_lab.app.errors import UserError, nearest, one_line
from diffusion_lab.app.scoring.judging import SPLITS, Yardstick, check_shape
from diffusion_lab.metrics.collect import Collected
from diffusion_lab.metrics.measures.base import REFERENCE, SAMPLES, TRAIN, hindrance

NO_PART = (
    "sampler", "grid", "guidance", "modifiers", "schedule", "generation", "seed", "labels", "ema", "precision",
    "compile",
)  # fmt: skip
"""What says how samples are drawn."""


def check_words(config: Mapping[str, Any]) -> None:
    """Refuse typed words that would be without effect; what a protocol sets along with its samples is not typed.

    Args:
        config: The resolved config, with the words typed as `overrides`.

    Raises:
        UserError: At the first of them.
    """
    if config["samples"] is None:
        return
    for word in typed(config.get("overrides"), NO_PART):
        raise UserError(f"{word}: has no part in scoring samples that exist, samples={config['samples']}")


def check_paths(config: Mapping[str, Any]) -> None:
    """Refuse samples and references that are not there.

    Args:
        config: The resolved config.

    Raises:
        UserError: At the first of them; the message names the key, and what was probably meant.
    """
    for key, words in (("samples", ()), ("reference", SPLITS)):
        named = config[key]
        if named is None or named in words or Path(named).exists():
            continue
        path = Path(named)
        there = [] if not path.parent.is_dir() else [item.name for item in path.parent.iterdir()]
        # a word alone was probably meant for one of the words
        guess = nearest(named, words) or nearest(path.name, [name for name in there if name[0] != "."])
        meant = "" if guess is None else guess if guess in words else str(path.parent / guess)
        raise UserError(
            f"{key}={named}: no such file or folder" + (f"; did you mean {meant}?" if meant else "")
        )


def check_fit(yard: Yardstick, n: int, *, labelled: bool) -> None:
    """Refuse what could only fail once all samples are drawn.

    Args:
        yard: What they will be measured with; it has the run's data.
        n: How many will be drawn.
        labelled: Whether they are drawn by class.

    Raises:
        UserError: If they are too few, the reference has another shape, or the features do not take such images.
    """
    if n < 2:
        raise UserError(f"num_samples={n}: a distance needs at least two images")
    real = yard.there[TRAIN][0]
    if REFERENCE in yard.there:
        check_shape(real, yard.there[REFERENCE][0])
    eye = yard.eye
    blank = torch.zeros(2, *real.shape, dtype=torch.uint8 if real.quantised else torch.float32)
    try:
        eye.extractor(blank.to(eye.device))
    except (ValueError, TypeError) as error:
        raise UserError(f"these samples cannot be scored: {one_line(str(error))}") from error
    sets: dict[str, Any] = {SAMPLES: yard.there[TRAIN], **yard.there}
    if isinstance(yard.reference, Collected):
        if yard.beside is not None:
            return
        sets[REFERENCE] = yard.reference
    reasons = [hindrance(one, eye.extractor, sets, labelled=labelled) for one in eye.measures]
    if all(reasons):
        first = f": {reasons[0]}" if len(set(reasons)) == 1 else ""
        raise UserError(f"none of the measures applies to these samples and features{first}")
