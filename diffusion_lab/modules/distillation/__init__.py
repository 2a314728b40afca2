"""Distillation: a student that starts as a copy of its teacher and learns to do more in a step."""

from diffusion_lab.modules.distillation.base import DistillationModule, Phase, inherit, without_dropout
from diffusion_lab.modules.distillation.consistency import ConsistencyModule
from diffusion_lab.modules.distillation.halvings import Halving, LinearPerHalving, halvings
from diffusion_lab.modules.distillation.progressive import ProgressiveModule

__all__ = [
    "ConsistencyModule",
    "DistillationModule",
    "Halving",
    "LinearPerHalving",
    "Phase",
    "ProgressiveModule",
    "halvings",
    "inherit",
    "without_dropout",
]
