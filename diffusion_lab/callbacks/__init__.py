"""Callbacks: what a run does besides its steps. All intervals are in images seen."""

from diffusion_lab.callbacks.checkpoints import Checkpoints
from diffusion_lab.callbacks.ema import EMACallback
from diffusion_lab.callbacks.ema_snapshots import EMASnapshots
from diffusion_lab.callbacks.frechet import FrechetDuringTraining
from diffusion_lab.callbacks.gradient_norm import GradientNorm
from diffusion_lab.callbacks.kept_weights import KeptWeights
from diffusion_lab.callbacks.loss_by_noise_level import LossByNoiseLevel
from diffusion_lab.callbacks.preemption import Preemption, was_preempted
from diffusion_lab.callbacks.progress import Progress
from diffusion_lab.callbacks.prune import PruneHopeless, was_pruned
from diffusion_lab.callbacks.sample_grid import SampleGrid
from diffusion_lab.callbacks.stop import StopAtImages
from diffusion_lab.callbacks.throughput import Throughput
from diffusion_lab.callbacks.training_log import TrainingLog

__all__ = [
    "Checkpoints",
    "EMACallback",
    "EMASnapshots",
    "FrechetDuringTraining",
    "GradientNorm",
    "KeptWeights",
    "LossByNoiseLevel",
    "Preemption",
    "Progress",
    "PruneHopeless",
    "SampleGrid",
    "StopAtImages",
    "Throughput",
    "TrainingLog",
    "was_preempted",
    "was_pruned",
]
