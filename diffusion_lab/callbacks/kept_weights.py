"""The student as it was at certain moments, kept under names of their own: `sample.py run=... ema=steps_4`.

A method of distillation says when a step was one of these moments, and what it is called
(`DistillationModule.milestone`). The raw weights then go to `<dirpath>/<name>.safetensors`, whole and exact. Other
modules have no such moments, and for them this does nothing.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from diffusion_lab.callbacks.base import StepCallback, paused
from diffusion_lab.files import replacing
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.distillation import DistillationModule
from diffusion_lab.modules.errors import CheckpointNotSaved


class KeptWeights(StepCallback):
    """Writes `<dirpath>/<name>.safetensors` at the moments that the module names.

    Args:
        dirpath: The folder; made if it is not there.
    """

    def __init__(self, *, dirpath: str) -> None:
        super().__init__()
        self.dirpath = Path(dirpath)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Write if the step that just ended is such a moment.

        Raises:
            CheckpointNotSaved: If the disk refuses.
        """
        name = module.milestone() if isinstance(module, DistillationModule) else None
        if name is None:
            return
        module.guard.flush()
        if trainer.is_global_zero:
            with paused(module):
                self._write(name, module)

    def _write(self, name: str, module: DiffusionModule) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.dirpath / f"{name}.safetensors"
        tensors = {
            key: value.detach().cpu().contiguous().clone()
            for key, value in module.denoiser.state_dict().items()
        }
        facts = {"average": name, "images_seen": str(module.images_seen), "format": "diffusion_lab 1"}
        try:
            with replacing(path, flush=True) as aside:
                save_file(tensors, aside, metadata=facts)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointNotSaved(f"{path} was not saved: {reason}; checkpoints are intact") from error
