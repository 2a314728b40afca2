"""Reflow: the teacher's ODE makes pairs of noise and sample, and the student learns the straight lines between them.

With `pairs` the first steps make that many, a global batch each, and later steps take one of these batches again at
fresh noise levels. What a batch holds is a function of the seed and its number alone, noise and labels: so nothing is
stored, and a resumed run makes anew what it comes to need. Without, every step has pairs of its own, with the
conditions of its data.

A student of a student is a flow rectified once more: this run as the next one's teacher. `one_step` is the paper's
distillation of the last one.

References:
    Liu, Gong & Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", 2022,
    algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.guidance import Unguided
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.distillation.reflow import ReflowLoss, carried
from diffusion_lab.modules.diffusion import OptimizerFactory
from diffusion_lab.modules.distillation.base import DistillationModule
from diffusion_lab.modules.errors import RunError
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.rng import StepRNG, step_rng
from diffusion_lab.samplers import Sampler
from diffusion_lab.typing import Cond, GuidanceFactory


class ReflowModule(DistillationModule):
    """Trains a student on the teacher's pairs.

    Args:
        denoiser: See `DistillationModule`.
        teacher: See `DistillationModule`.
        sampler: Solves the teacher's ODE, without noise.
        grid: Its log-SNRs.
        guidance: Of the teacher.
        loss: The loss.
        pairs: How many to make, rounded up to global batches, and to use over and over; None makes new ones each step.
        one_step: Whether the student learns to go all the way in one step, and nothing else.
        optimizer: See `DiffusionModule`.
        lr_schedule: See `DiffusionModule`.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`.
        channels_last: See `DiffusionModule`.

    Raises:
        ValueError: As `DistillationModule`; if the sampler draws noise, or `pairs` is below 1.
    """

    loss: ReflowLoss

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        teacher: NetworkDenoiser,
        sampler: Sampler,
        grid: Tensor,
        loss: ReflowLoss,
        optimizer: OptimizerFactory,
        guidance: GuidanceFactory = Unguided,
        pairs: int | None = None,
        one_step: bool = False,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        if getattr(sampler, "stochastic", False):
            raise ValueError(
                f"method.sampler must solve the teacher's ODE, and {type(sampler).__name__} draws noise"
            )
        if pairs is not None and pairs < 1:
            raise ValueError(f"method.pairs must be at least 1, or null for new ones each step, got {pairs}")
        super().__init__(
            denoiser=denoiser,
            teacher=teacher,
            loss=loss,
            optimizer=optimizer,
            guidance=guidance,
            lr_schedule=lr_schedule,
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        self.sampler, self.grid, self.one_step = sampler, grid, one_step
        self.batches = None if pairs is None else -(-pairs // global_batch_size)
        self._ends: dict[tuple[int, int], Tensor] = {}

    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DistillationModule`; of the data nothing is used but their conditions."""
        if self.batches is None:
            eps = self.noise(x0, rng)
            ends = self.made(eps, cond)
        else:
            number, again = self.pairs_of_step(x0)
            eps, cond = self.noise(x0, again), self.labels(cond, again)
            key = number, self._micro
            if key not in self._ends:
                self._ends[key] = self.made(eps, cond).cpu()
            ends = self._ends[key].to(x0.device)
        return self.loss(self.denoiser, ends, eps, cond, rng, one_step=self.one_step)

    def noise(self, x0: Tensor, rng: StepRNG) -> Tensor:
        """Return noise like `x0` `(B, *D)`."""
        return rng.randn("pairs", x0.shape[1:], dtype=x0.dtype)

    def made(self, eps: Tensor, cond: Cond | None) -> Tensor:
        """Return what the teacher's ODE makes of noise `eps` `(B, *D)`."""
        return carried(self.guided, self.sampler, self.grid, eps, cond)

    def pairs_of_step(self, x0: Tensor) -> tuple[int, StepRNG]:
        """Return the number of the batch of pairs whose turn it is, and its random numbers."""
        assert self.batches is not None
        number = self.step
        if number >= self.batches:
            number = int(
                torch.randint(self.batches, (), generator=step_rng(self.seed, self.step, "pairs_turn"))
            )
        # the micro-batch that is being done has been counted already
        rows = self.positions(self._micro - 1)
        return number, StepRNG(
            seed=self.seed, step=number, positions=rows, total=self.global_batch_size, device=x0.device
        )

    def labels(self, cond: Cond | None, rng: StepRNG) -> Cond | None:
        """Return labels of a batch of pairs, every class as often, where the data have labels and the network hears.

        Raises:
            RunError: If the data have other conditions.
        """
        if cond is not None and set(cond) - {"label"}:
            raise RunError("pairs can be kept for data with labels alone: method.pairs=null")
        table = getattr(getattr(self.denoiser.network, "conditioning", None), "label_embedding", None)
        if cond is None or table is None:
            return None
        # in random order: noise levels are even along the rows, and no class may have its own
        return {"label": rng.randperm("pairs_label") * table.num_classes // rng.total}
