"""A classifier of noisy images under training: the denoiser's module with another network and another loss.

Clock, random numbers, averages, checkpoints and export are those of `DiffusionModule`. The classifier takes the
denoiser's place there, under its name too, so that every callback finds it; but it cannot be sampled from.
"""

from __future__ import annotations

from typing import cast

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.denoisers.classifier import NetworkClassifier
from diffusion_lab.losses import DenoisingLoss
from diffusion_lab.losses.classification import ClassificationLoss
from diffusion_lab.modules.diffusion import DiffusionModule, OptimizerFactory
from diffusion_lab.modules.learning_rate import LRSchedule


class NoisyClassifierModule(DiffusionModule):
    """Trains `classifier` by `loss`.

    Args:
        classifier: The classifier whose network learns.
        loss: Turns a clean batch with labels into losses.
        optimizer: See `DiffusionModule`.
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.
    """

    def __init__(
        self,
        *,
        classifier: NetworkClassifier,
        loss: ClassificationLoss,
        optimizer: OptimizerFactory,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            # it is used for what both have: a network, parameters, and a call that the loss knows
            denoiser=cast(NetworkDenoiser, classifier),
            loss=cast(DenoisingLoss, loss),
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )

    @property
    def classifier(self) -> NetworkClassifier:
        """The live classifier."""
        return cast(NetworkClassifier, self.denoiser)

    def classifiers(self) -> dict[str, NetworkClassifier]:
        """Every classifier there is: the live one as "raw", and the averages by name."""
        return {name: cast(NetworkClassifier, found) for name, found in self.denoisers().items()}
