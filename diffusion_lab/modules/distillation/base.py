"""What methods of distillation share: a frozen teacher, a student that starts from it, and phases that take turns.

The teacher stands outside the module: it is in no state dict, no average, no process group, and gets no gradient. Who
builds the module gives it (the app reads it from its run's folder, `app/stored.py`), so a checkpoint and an export are
those of the student alone.

Who learns when is declared. A `Phase` names parts of the module, and phases take turns by the module's own step count,
images_seen // global_batch_size, so that a resumed run goes on with the phase it was in. Parts that do not learn in a
phase have no gradient, and Adam and its like leave a parameter without a gradient alone, moments and step count
included: so one optimizer with a group of parameters for each part is as many optimizers, exactly, and
accumulation, clipping, float16, resume and the clock are those of `DiffusionModule`.

A method overrides `distil`, and where it has more than the student, `parts` and `phases`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.guidance import Unguided
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.modules.diffusion import DiffusionModule, OptimizerFactory
from diffusion_lab.modules.errors import DoesNotFit
from diffusion_lab.modules.learning_rate import LRSchedule
from diffusion_lab.networks.magnitude_preserving import magnitude_preserving
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory

STUDENT = "denoiser"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One turn of training.

    Attributes:
        name: For `DistillationModule.phase`, and for messages.
        parts: Names of the parts that learn.
        steps: Optimizer steps before the next phase's turn.

    Raises:
        ValueError: If there are no parts or no steps.
    """

    name: str
    parts: Sequence[str]
    steps: int = 1

    def __post_init__(self) -> None:
        if not self.parts or self.steps < 1:
            raise ValueError(f"phase {self.name!r} needs parts that learn, and steps >= 1, got {self}")


def inherit(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy a teacher's weights into a student, by name.

    Layers that only the student has, for a further input, keep their initialisation.

    Args:
        student: Gets the weights.
        teacher: Has them.

    Returns:
        The names of the student's own tensors.

    Raises:
        ValueError: If the teacher has a tensor that the student has not, or one of another shape.
    """
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name, tensor in theirs.items():
        if name not in ours:
            raise ValueError(f"the student has no {name}, which its teacher has: their networks differ")
        if ours[name].shape != tensor.shape:
            shapes = f"{list(ours[name].shape)}, the teacher's {list(tensor.shape)}"
            raise ValueError(f"the student's {name} is {shapes}: their networks differ")
    student.load_state_dict(theirs, strict=False)
    return [name for name in ours if name not in theirs]


def without_dropout(module: nn.Module) -> None:
    """Set the rate of every dropout layer to zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0


class DistillationModule(DiffusionModule, ABC):
    """Trains `denoiser`, the student, on what `teacher` answers.

    Args:
        denoiser: The student; it takes over the teacher's weights. A checkpoint that is resumed wins over them.
        teacher: The teacher; frozen, in evaluation mode.
        guidance: Wraps the teacher; `Unguided` leaves it alone.
        loss: The method's loss; its own parameters, if any, are the part "loss".
        optimizer: See `DiffusionModule`.
        groups: Options of the optimizer for some of the parts, e.g. `{"auxiliary": {"lr": 1e-5}}`.
        lr_schedule: See `DiffusionModule`; it multiplies the learning rate of every part.
        seed: See `DiffusionModule`.
        global_batch_size: See `DiffusionModule`.
        compile_network: See `DiffusionModule`; the teacher's too.
        channels_last: See `DiffusionModule`; the teacher's too.

    Raises:
        ValueError: If the student does not fit the teacher, a group names no part, or a phase does.
    """

    def __init__(
        self,
        *,
        denoiser: NetworkDenoiser,
        teacher: NetworkDenoiser,
        loss: nn.Module,
        optimizer: OptimizerFactory,
        guidance: GuidanceFactory = Unguided,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        lr_schedule: LRSchedule | None = None,
        seed: int,
        global_batch_size: int,
        compile_network: bool = False,
        channels_last: bool = False,
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise ValueError("distillation needs a teacher: method.teacher.run=<folder of its run>")
        if denoiser.interpolant != teacher.interpolant:
            names = [type(part.interpolant).__name__ for part in (denoiser, teacher)]
            raise ValueError(f"the student's process is {names[0]}, its teacher's {names[1]}")
        inherit(denoiser, teacher)
        super().__init__(
            denoiser=denoiser,
            loss=loss,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            seed=seed,
            global_batch_size=global_batch_size,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        teacher.eval().requires_grad_(False)
        if channels_last:
            teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # inside a tuple, where nn.Module does not look for modules
        self._outside = (teacher, guidance(teacher))
        self.groups = {name: dict(options) for name, options in (groups or {}).items()}
        self._learning: dict[str, list[nn.Parameter]] = {}

    @property
    def teacher(self) -> NetworkDenoiser:
        """The teacher itself, without guidance."""
        return self._outside[0]

    @property
    def guided(self) -> DenoiserFn:
        """The teacher under its guidance."""
        return self._outside[1]

    # ---- what a method says ------------------------------------------------------------------------------------------

    @abstractmethod
    def distil(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """Return the losses of one micro-batch of clean examples `x0` `(B, *D)`, in the phase that it is."""

    def parts(self) -> Mapping[str, nn.Module]:
        """Return what learns, by name: the student, and the loss where it has parameters."""
        return {STUDENT: self.denoiser, **({"loss": self.loss} if list(self.loss.parameters()) else {})}

    def phases(self) -> Sequence[Phase]:
        """Return the phases in their order; all parts at once where a method says nothing else."""
        return (Phase(name="student", parts=tuple(self.parts())),)

    def begin_step(self) -> None:
        """Get ready for an optimizer step; for methods that change something at points of the clock."""
        phase = self.phase
        self.turn = phase.name if len(self.phases()) > 1 else None
        self.denoiser_learns = "denoiser" in phase.parts
        for name, parameters in self._learning.items():
            for parameter in parameters:
                parameter.requires_grad_(name in phase.parts)

    def milestone(self) -> str | None:
        """Return the name under which the student is to be kept as it is after the step just done, or None."""
        return None

    # ---- phases ------------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """The phase of the step that comes next, or is being done."""
        phases = self.phases()
        place = self.step % sum(phase.steps for phase in phases)
        for phase in phases:
            if place < phase.steps:
                return phase
            place -= phase.steps
        raise AssertionError("no phase")

    def parameters_to_train(self) -> list[dict[str, Any]]:
        """Return one group of parameters a part, each with its options; those of the loss do not decay."""
        parts = self.parts()
        for where, names in (
            ("groups", self.groups),
            *((f"phase {phase.name!r}", phase.parts) for phase in self.phases()),
        ):
            for name in names:
                if name not in parts:
                    raise DoesNotFit(f"{where}: there is no part {name!r}; there are: {', '.join(parts)}")
        self._magnitude_preserving = [x for part in parts.values() for x in magnitude_preserving(part)]
        self._learning = {
            name: [parameter for parameter in part.parameters() if parameter.requires_grad]
            for name, part in parts.items()
        }
        return [
            {
                "params": parameters,
                **({"weight_decay": 0.0} if name == "loss" else {}),
                **self.groups.get(name, {}),
            }
            for name, parameters in self._learning.items()
        ]

    # ---- Lightning ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Refuse shards; let DDP look for the parameters that do not learn, where phases take turns."""
        if self.device_mesh is not None:
            raise DoesNotFit("trainer=fsdp2: a teacher is whole on every process; distil with trainer=ddp")
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and len(self.phases()) > 1:
            strategy._ddp_kwargs["find_unused_parameters"] = True

    def on_fit_start(self) -> None:
        """See `DiffusionModule`; the teacher follows to the device."""
        super().on_fit_start()
        self.teacher.to(self.device)
        if self.compile_network:
            self.teacher.network.compile()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """See `DiffusionModule`."""
        if self._micro == 0:
            self.begin_step()
        return super().training_step(batch, batch_idx)

    def losses(self, x0: Tensor, cond: Cond | None, rng: StepRNG) -> LossTerms:
        """See `DiffusionModule`."""
        return self.distil(x0, cond, rng)
