"""A denoiser under training, wired to Lightning.

The module owns the project's clock, `images_seen`: the number of training examples behind the current
weights. It grows by the global batch with each optimizer step, is stored in the checkpoint, and drives the
learning rate, the averages, all intervals, the logging axis and the end of the run. Lightning's own counters
are derived from it, not restored.

Every random number of a step has an address (see `diffusion_lab.rng`):

    step      = images_seen // global_batch_size
    rows      = jB/A + r, + R, + 2R, ... < (j+1)B/A  of the global batch: micro-batch j of A on process r of R
    noise     : StepRNG(seed, step, rows)            the same whatever A and R are
    dropout   : global generator seeded by (seed, step, j, r), the one place where a network's nn.Dropout can be reached

so a run that is interrupted and resumed, even on another number of processes, continues as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.losses.adaptive import Adaptive
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.modules.errors import DoesNotFit, RunError
from diffusion_lab.modules.finite import FiniteGuard
from diffusion_lab.modules.learning_rate import Constant, LRSchedule
from diffusion_lab.modules.ranks import sum_over_ranks
from diffusion_lab.networks.magnitude_preserving import magnitude_preserving, normalize_weights
from diffusion_lab.rng import StepRNG, derive_seed
from diffusion_lab.sharded import blocks, is_sharded, shard
from diffusion_lab.typing import Cond, DenoiserFn


def seed_global(seed: int, device: torch.device) -> None:
    """Seed the global generators that a network's dropout on `device` draws from.

    `torch.manual_seed` would also address every other kind of device, and where one is not in use, it formats a stack
    trace and remembers the call for ever: half a millisecond and some memory a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def match_layout(optimizer: Optimizer) -> None:
    """Give an optimizer's slots the order in memory of their parameters.

    A checkpoint of a run with other strategies or `channels_last` has them in another order, and fused optimizers walk
    through the memory without looking: they would pair every weight with another one's moments.
    """
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                if value.stride() != parameter.stride():
                    slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class DiffusionModule(pl.LightningModule):
    """Trains `denoiser` by `loss`.

    Args:
        denoiser: The denoiser whose network learns, or the field of a bridge (`denoisers/bridge.py`).
        loss: Turns a clean batch into losses, as `DenoisingLoss` does; its own parameters, if any, learn too, and so
            does what is `Adaptive` in it.
        optimizer: Callable that takes the parameters and returns an optimizer.
        lr_schedule: Factor on the optimizer's learning rate, a function of the images seen; None means 1.
        seed: The run's seed.
        global_batch_size: Examples of one optimizer step, over all processes and accumulated micro-batches.
        compile_network: Whether to `torch.compile` the network, in place, so that checkpoint keys do not change. If the
            network is sharded, its blocks are compiled one by one.
        channels_last: Whether to keep the convolution weights in channels-last order.

    Attributes:
        images_seen: Training examples behind the current weights. THE clock.
        averages: Averaged copies of the denoiser by name, filled by the EMA callback.
        stepped: Whether the batch that just ended closed an optimizer step (false within an accumulation).
        updated: Whether that step changed the weights: the loss scaler of `precision=16-mixed` leaves a step out when a
            gradient overflowed. The clock counts it all the same, for its images were drawn and are not drawn again;
            averages do not.
        terms: Losses of the micro-batches of the current step on this process, detached.
        turn: Who learns in this step, by name, where several networks do so in turns; None otherwise.
        denoiser_learns: Whether that is the denoiser, or the denoiser too.
        guard: Checks that losses and gradients are finite; see `FiniteGuard`.
        paused_s: Seconds that sampling, scoring and saving took, which throughput does not count.

    Raises:
        ValueError: If `global_batch_size` is not positive.
    """

    images_seen: int

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        loss: nn.Module,
        optimizer: OptimizerFactory,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size must be positive, got {global_batch_size}")
        self.denoiser = denoiser
        if channels_last:
            denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = loss
        self.optimizer_factory = optimizer
        self.lr_schedule: LRSchedule = Constant() if lr_schedule is None else lr_schedule
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.compile_network = compile_network
        self.images_seen = 0
        self.averages: dict[str, NetworkDenoiser] = {}
        self.guard = FiniteGuard()
        self.stepped = False
        self.updated = False
        self.terms: list[LossTerms] = []
        self.turn: str | None = None
        self.denoiser_learns = True
        self.paused_s = 0.0
        self._micro = 0
        self._base_lr: list[float] = []
        self._replicated: list[nn.Parameter] = []
        self._magnitude_preserving = magnitude_preserving(denoiser)

    def denoisers(self) -> Mapping[str, DenoiserFn]:
        """Every denoiser that can be sampled: the live one as "raw", and the averages by name."""
        return {"raw": self.denoiser, **self.averages}

    @property
    def step(self) -> int:
        """Index of the optimizer step that comes next."""
        return self.images_seen // self.global_batch_size

    @property
    def base_learning_rate(self) -> float:
        """Learning rate of the first parameter group before the schedule's factor."""
        return self._base_lr[0]

    def parameters_to_train(self) -> list[dict[str, Any]]:
        """Parameters handed to the optimizer, in groups and a fixed order; those of the loss do not decay.

        A schedule's end points, or an uncertainty, have no reason to be drawn towards zero.
        """
        network, own = (
            [p for p in part.parameters() if p.requires_grad] for part in (self.denoiser, self.loss)
        )
        return [{"params": network}, *([{"params": own, "weight_decay": 0.0}] if own else [])]

    # ---- Lightning: before training ----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard the networks, live and averaged, if the trainer's strategy does that (`trainer=fsdp2`).

        The loss stays whole on every process: its schedule is asked in many ways, and has few parameters.
        """
        mesh = self.device_mesh
        if mesh is None or is_sharded(self.denoiser):
            return
        for denoiser in (self.denoiser, *self.averages.values()):
            shard(denoiser.network, mesh["data_parallel"])
        self._replicated = [p for p in self.loss.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer; the learning rate it was given is what the schedule multiplies."""
        optimizer = self.optimizer_factory(self.parameters_to_train())
        # a fused optimizer would unscale float16's gradients itself, after they were measured and clipped, and would
        # not tell whether it left a step out
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        optimizer.register_step_post_hook(self._note_update)
        optimizer.register_load_state_dict_post_hook(match_layout)
        self._base_lr = [float(group["lr"]) for group in optimizer.param_groups]
        return optimizer

    def on_fit_start(self) -> None:
        """Check that the batch can be shared out evenly, and compile the network if asked."""
        shares = self.trainer.world_size * self.trainer.accumulate_grad_batches
        if self.global_batch_size % shares:
            raise DoesNotFit(
                f"batch_size {self.global_batch_size} does not divide among {self.trainer.world_size} processes x "
                f"{self.trainer.accumulate_grad_batches} accumulated micro-batches"
            )
        if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            # it would replace the loader's own order, silently
            raise RunError("with several processes the trainer needs use_distributed_sampler=false")
        if self.compile_network:
            network = self.denoiser.network
            for part in blocks(network) if is_sharded(network) else [network]:
                part.compile()

    def on_train_start(self) -> None:
        """Derive Lightning's step counter from the clock, for whoever looks at `trainer.global_step`."""
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.total.ready = self.step
        progress.optimizer.step.total.completed = self.step
        self._micro = 0

    # ---- Lightning: one step -----------------------------------------------------------------------------------------

    def positions(self, micro: int) -> slice:
        """Rows of the global batch that this process holds in micro-batch `micro`."""
        rows = self.global_batch_size // self.trainer.accumulate_grad_batches
        return slice(micro * rows + self.trainer.global_rank, (micro + 1) * rows, self.trainer.world_size)

    def micro_seed(self, tag: str) -> int:
        """Return this process's seed for one purpose in the micro-batch that is being done, which counts as begun."""
        return derive_seed(tag, self.seed, self.step, self._micro - 1, self.trainer.global_rank)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch `{"x0": (B, *D), "label": (B,) optional}`."""
        micro, step = self._micro, self.step
        self._micro += 1
        self.stepped = False
        if micro == 0:
            self.terms = []
        x0 = batch["x0"]
        rows = self.positions(micro)
        expected = len(range(rows.start, rows.stop, rows.step))
        if x0.shape[0] != expected:
            raise RunError(
                f"the loader gave {x0.shape[0]} examples where this process expects {expected}: the datamodule's "
                f"batch_size must be the global batch size {self.global_batch_size}"
            )
        seed_global(self.micro_seed("dropout"), x0.device)
        rng = StepRNG(
            seed=self.seed, step=step, positions=rows, total=self.global_batch_size, device=x0.device
        )
        cond = {name: value for name, value in batch.items() if name != "x0"} or None
        terms = self.losses(x0, cond, rng)
        values = {field.name: getattr(terms, field.name) for field in fields(terms)}
        self.terms.append(replace(terms, **{name: value.detach() for name, value in values.items()}))
        return terms.total

    def losses(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """Return the losses of one micro-batch of clean examples; what a module with more than a denoiser overrides."""
        terms: LossTerms = self.loss(self.denoiser, x0, cond, rng)
        return terms

    def step_loss(self) -> Tensor:
        """Mean loss of the current step on this process, 0-d, still on its device."""
        return torch.stack([t.total for t in self.terms]).mean()

    def on_after_backward(self) -> None:
        """Average the gradients that neither DDP nor FSDP2 sees, those of a loss beside a sharded network."""
        if self._micro == self.trainer.accumulate_grad_batches:
            for p in self._replicated:
                if p.grad is not None:
                    sum_over_ranks(p.grad).div_(self.trainer.world_size)

    def _note_update(self, optimizer: Optimizer, args: Any, options: Any) -> None:
        self.updated = True

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the learning rate, apply the update, advance the clock."""
        factor = self.lr_schedule(self.images_seen)
        for group, lr in zip(optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = lr * factor
        self.updated = False
        optimizer.step(closure=optimizer_closure)
        normalize_weights(self._magnitude_preserving)
        if isinstance(self.loss, Adaptive):
            self.loss.adapt(sum_over_ranks(self._statistics(self.loss)))
        self.images_seen += self.global_batch_size
        self.stepped = True
        self._micro = 0

    def _statistics(self, loss: Adaptive) -> Tensor:
        """What an adaptive loss is to learn of the micro-batches of this process."""
        found = [loss.statistics(terms) for terms in self.terms]
        return torch.stack(found).sum(0)

    # ---- Lightning: checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the clock, and drop Lightning's loop counters, which the clock makes redundant.

        Restoring them would make the restart depend on where in a batch the checkpoint was taken; without
        them a resumed run is a fresh loop over a loader that starts at `images_seen`.
        """
        checkpoint["images_seen"] = self.images_seen
        checkpoint["seed"] = self.seed
        checkpoint["global_batch_size"] = self.global_batch_size
        checkpoint.pop("loops", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the clock."""
        if "images_seen" not in checkpoint:
            raise RunError("the checkpoint has no images_seen: it was not written by diffusion_lab")
        self.images_seen = int(checkpoint["images_seen"])
