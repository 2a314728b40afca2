"""Losses of distillation: a student learns from what a teacher answers, not from the data's own x0."""

from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.distillation.consistency import ConsistencyLoss, TeacherSteps
from diffusion_lab.losses.distillation.continuous_consistency import ContinuousConsistencyLoss
from diffusion_lab.losses.distillation.distribution_matching import DistributionMatchingLoss
from diffusion_lab.losses.distillation.em import EMLoss
from diffusion_lab.losses.distillation.guided import GuidedLoss
from diffusion_lab.losses.distillation.guided_steps import DoubleStepLoss, EncoderLoss
from diffusion_lab.losses.distillation.moments import AlternatingLoss, MomentLoss
from diffusion_lab.losses.distillation.moments_instant import Displacement, InstantLoss
from diffusion_lab.losses.distillation.progressive import ProgressiveLoss
from diffusion_lab.losses.distillation.reflow import ReflowLoss
from diffusion_lab.losses.distillation.rewarded import Rewarded
from diffusion_lab.losses.distillation.shortcut import ShortcutLoss
from diffusion_lab.losses.distillation.student_score import GeneratorLoss
from diffusion_lab.losses.distillation.teacher_steps import adjusted, joined, one_step

__all__ = [
    "AlternatingLoss",
    "ConsistencyLoss",
    "ContinuousConsistencyLoss",
    "Displacement",
    "DistillationLoss",
    "DistributionMatchingLoss",
    "DoubleStepLoss",
    "EMLoss",
    "EncoderLoss",
    "GeneratorLoss",
    "GuidedLoss",
    "InstantLoss",
    "MomentLoss",
    "ProgressiveLoss",
    "ReflowLoss",
    "Rewarded",
    "ShortcutLoss",
    "TeacherSteps",
    "adjusted",
    "joined",
    "one_step",
]
