"""The student as it was where one stage of a run ended: what the next stage learns from, or is held by.

It is outside the state dict, DDP and averages. A checkpoint at the very border of two stages needs nothing, for there
the student still is what it was; one written later holds a copy under a key of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.modules.errors import RunError


class FormerStudent:
    """A frozen copy of a student, on the CPU until it is moved.

    No `nn.Module`, so that a module which keeps it does not take its parameters for its own.

    Args:
        student: Whose copy it is, untrained until `take`.
        key: Its place in a checkpoint.
        method: What only this method's checkpoints have, for errors.

    Attributes:
        denoiser: The copy.
    """

    def __init__(self, student: NetworkDenoiser, *, key: str, method: str) -> None:
        self.denoiser = copy.deepcopy(student).eval().requires_grad_(False)
        self.key, self.method = key, method

    def take(self, student: NetworkDenoiser, device: torch.device) -> None:
        """Become what the student is now, on its device."""
        self.denoiser.load_state_dict(student.state_dict())
        self.denoiser.to(device)

    def save(self, checkpoint: dict[str, Any], *, border: int | None, images_seen: int) -> None:
        """Add the copy to a checkpoint, if the stage that began at `border` images has made a step."""
        if _begun(border, images_seen):
            checkpoint[self.key] = self.denoiser.state_dict()

    def load(self, checkpoint: dict[str, Any], *, border: int | None, images_seen: int) -> None:
        """Take the copy from a checkpoint, if it was written as `save` says.

        Raises:
            RunError: If it lacks the copy.
        """
        if _begun(border, images_seen):
            if self.key not in checkpoint:
                raise RunError(
                    f"the checkpoint has no {self.key.replace('_', ' ')}: it is not one of {self.method}"
                )
            self.denoiser.load_state_dict(checkpoint[self.key])


def _begun(border: int | None, images_seen: int) -> bool:
    """Whether a later stage than the first has made a step."""
    return border is not None and 0 < border < images_seen
