"""Lightning modules: they wire denoiser, loss, optimizer and clock together, and compute nothing themselves."""

from diffusion_lab.modules.checkpoint_io import AtomicCheckpointIO, find_resumable, load_checkpoint
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.errors import (
    CheckpointNotSaved,
    CheckpointTruncated,
    CheckpointUnsafe,
    NonFiniteLoss,
    RunError,
)
from diffusion_lab.modules.learning_rate import Constant, CosineDecay, LinearDecay

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointNotSaved",
    "CheckpointTruncated",
    "CheckpointUnsafe",
    "Constant",
    "CosineDecay",
    "DiffusionModule",
    "LinearDecay",
    "NonFiniteLoss",
    "RunError",
    "find_resumable",
    "load_checkpoint",
]
