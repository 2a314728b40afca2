"""Averaged weights, kept beside the live ones.

Each profile has a shadow copy of the denoiser, updated after every optimizer step. The live module is never
touched: what is sampled or scored is the shadow itself, found under its name in `module.averages`. So no
moment exists in which a checkpoint could hold averaged weights in place of the live ones, or the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.ema import EMA, Profile
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.errors import RunError
from diffusion_lab.modules.ranks import is_first


class EMACallback(StepCallback):
    """Keeps one average of the denoiser for each profile.

    Args:
        profiles: Averaging profiles by name; the name is how the average is asked for later (`ema=...`).
            "raw" is taken.

    Raises:
        ValueError: If a profile is called "raw".
    """

    def __init__(self, *, profiles: Mapping[str, Profile]) -> None:
        super().__init__()
        if "raw" in profiles:
            raise ValueError('no average may be called "raw": that is the name of the live weights')
        self.profiles = dict(profiles)
        self.averages: dict[str, EMA] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the shadow copies, before a checkpoint is restored into them."""
        if not isinstance(pl_module, DiffusionModule):
            raise TypeError(f"EMACallback needs a DiffusionModule, got {type(pl_module).__name__}")
        self.averages = {name: EMA(pl_module.denoiser, profile) for name, profile in self.profiles.items()}
        for name, average in self.averages.items():
            average.module.eval().requires_grad_(False)
            pl_module.averages[name] = average.module  # type: ignore[assignment]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the live module to its device."""
        for average in self.averages.values():
            average.module.to(pl_module.device)

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Move every average towards the live weights, unless the step left these as they were."""
        if not module.updated:
            return
        for average in self.averages.values():
            average.update(module.denoiser, module.images_seen, module.global_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Averages by name, whole; of those that are sharded, only the first process gets the values."""
        return {name: average.state_dict(keep=is_first()) for name, average in self.averages.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages.

        Raises:
            RunError: If the checkpoint lacks one of the profiles: starting an average halfway would give
                wrong weights.
        """
        missing = [name for name in self.averages if name not in state_dict]
        if missing:
            raise RunError(
                f"the checkpoint has no average called {missing[0]!r} (it has: {', '.join(state_dict) or 'none'})"
            )
        for name, average in self.averages.items():
            average.load_state_dict(state_dict[name])
