"""Losses of distillation: a student learns from what a teacher answers, not from the data's own x0."""

from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.distillation.consistency import ConsistencyLoss, TeacherSteps
from diffusion_lab.losses.distillation.progressive import ProgressiveLoss
from diffusion_lab.losses.distillation.teacher_steps import adjusted, joined, one_step

__all__ = [
    "ConsistencyLoss",
    "DistillationLoss",
    "ProgressiveLoss",
    "TeacherSteps",
    "adjusted",
    "joined",
    "one_step",
]
