"""Distillation: a student that starts as a copy of its teacher and learns to do more in a step."""

from diffusion_lab.modules.distillation.base import DistillationModule, Phase, inherit, without_dropout
from diffusion_lab.modules.distillation.consistency import ConsistencyModule
from diffusion_lab.modules.distillation.continuous_consistency import ContinuousConsistencyModule
from diffusion_lab.modules.distillation.guided import GuidedModule, GuidedProgressiveModule
from diffusion_lab.modules.distillation.halvings import Halving, LinearPerHalving, halvings
from diffusion_lab.modules.distillation.moment_matching import MomentMatchingModule
from diffusion_lab.modules.distillation.moment_matching_instant import InstantMomentMatchingModule
from diffusion_lab.modules.distillation.progressive import ProgressiveModule
from diffusion_lab.modules.distillation.reflow import ReflowModule
from diffusion_lab.modules.distillation.shortcut import ShortcutModule
from diffusion_lab.modules.distillation.student_score import StudentScoreModule

__all__ = [
    "ConsistencyModule",
    "ContinuousConsistencyModule",
    "DistillationModule",
    "GuidedModule",
    "GuidedProgressiveModule",
    "Halving",
    "InstantMomentMatchingModule",
    "LinearPerHalving",
    "MomentMatchingModule",
    "Phase",
    "ProgressiveModule",
    "ReflowModule",
    "ShortcutModule",
    "StudentScoreModule",
    "halvings",
    "inherit",
    "without_dropout",
]
