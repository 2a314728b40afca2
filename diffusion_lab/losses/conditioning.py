"""Dropping conditions, so that one network learns the conditional and the unconditional answer.

References:
    Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, algorithm 1.
"""

from __future__ import annotations

import torch

from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import NO_LABEL, Cond


def drop_labels(cond: Cond | None, probability: float, rng: StepRNG) -> Cond | None:
    """Replace each `cond["label"]` by `NO_LABEL` with the given probability; other conditions pass unchanged.

    Args:
        cond: Conditions of the rows of this process, or None.
        probability: In [0, 1]; 0 returns `cond` itself.
        rng: Random numbers of this step.
    """
    if cond is None or probability == 0.0 or "label" not in cond:
        return cond
    label = cond["label"]
    dropped = rng.bernoulli("label_dropout", probability).to(label.device)
    return {**cond, "label": torch.where(dropped, NO_LABEL, label)}
