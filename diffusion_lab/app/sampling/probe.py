"""What a job will ask of its networks, found out on a run with denoisers that answer zero.

How often a sample calls the network depends on the sampler, the grid, the guidance and its interval, and so does
whether the network is ever asked without a label. So the job's own generation makes one sample, with stand-ins for
every network, which count and look. Where the number depends on the answers, the first sample is drawn to count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.app.build import Loaded, generation_of
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.sampling.job import Job, streams
from diffusion_lab.app.stored import CLASSIFIER, WEAK, placed, replaced
from diffusion_lab.app.teacher import makes_images
from diffusion_lab.denoisers.bridge import BridgeField
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.process.stochastic_interpolant import StochasticInterpolant
from diffusion_lab.samplers.counting import BlankDenoiser, CountingDenoiser
from diffusion_lab.samplers.iddpm import LearnedVariance
from diffusion_lab.typing import NO_LABEL, Cond


@dataclass(frozen=True)
class Probed:
    """What one sample asks for.

    Attributes:
        nfe: Evaluations of denoisers, those of a second one included.
        unconditional: Whether the denoiser is ever asked without a label.
    """

    nfe: int
    unconditional: bool


class Blank(BlankDenoiser):
    """A denoiser that answers zero, in a way that can be differentiated, and looks at what it is asked.

    Args:
        interpolant: The process.
    """

    def __init__(self, interpolant: Interpolant) -> None:
        super().__init__(interpolant)
        self.calls = 0
        self.unconditional = False

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return zeros like `x` `(B, *D)`; every row is an evaluation."""
        self.calls += len(x)
        told = cond or {}
        if "label" in told:
            self.unconditional |= bool((told["label"] == NO_LABEL).any())
        else:
            self.unconditional |= "label_embedding" not in told
        return torch.zeros_like(x) * x


class BlankWithVariance(Blank):
    """A blank for samplers that ask for a learned variance."""

    def with_variance(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> tuple[Tensor, Tensor]:
        """Return zeros like `x` twice; every row is one evaluation."""
        return self(x, logsnr, cond), torch.zeros_like(x)


class BlankField(Blank):
    """A blank for samplers that follow the field of a bridge.

    Args:
        interpolant: See `BridgeField`.
        bridge: The bridge.
    """

    def __init__(self, interpolant: Interpolant, bridge: StochasticInterpolant) -> None:
        super().__init__(interpolant)
        self.bridge = bridge

    def __call__(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Any:
        """Return zeros like `x` twice; every row is one evaluation."""
        zeros = super().__call__(x, tau, cond)
        return zeros, zeros


class BlankClassifier:
    """A classifier for which all classes are alike.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, x: Tensor, logsnr: Tensor) -> Tensor:
        """Return zeros `(B, num_classes)`."""
        return (torch.zeros_like(x) * x).flatten(1).sum(1, keepdim=True).expand(-1, self.num_classes)


def probe(job: Job, loaded: Loaded, y: Tensor | None = None) -> Probed:
    """Find out what a sample of a job asks for.

    Args:
        job: The job.
        loaded: Its denoiser, which is not called.
        y: The first measurement, `(1, *M)`, where a posterior is sampled.

    Raises:
        UserError: If the model makes no images, or guidance or sampler refuse it, the measurement, or each other.
    """
    if not makes_images(loaded.config["method"]):
        raise UserError(
            "this student is an encoder, which makes noise of images: see benchmarks/style_transfer.py"
        )
    method = loaded.config["method"]["denoiser"]
    blanks = {
        WEAK: {"_target_": f"{__name__}.Blank", "interpolant": method.get("interpolant")},
        CLASSIFIER: {"_target_": f"{__name__}.BlankClassifier", "num_classes": job.num_classes},
    }
    node = {**job.generation, "guidance": replaced(job.generation["guidance"], blanks)}
    generation = generation_of({"generation": node})
    blank = blank_of(loaded.denoiser)
    labels = job.label_list([0])
    cond: dict[str, Tensor] = {} if labels is None else {"label": torch.tensor(labels)}
    if y is not None:
        cond["measurement"] = y
    try:
        # once around the model itself, for a guidance may look for something in it
        real = generation_of({"generation": placed(job.generation, "cpu")})
        real.wrapped(loaded.denoiser)
        generation(blank, seeds=[0], cond=cond or None)
        calls = blank.calls
        if real.adaptive:
            # how many there are depends on the answers: those of the first sample
            counting = CountingDenoiser(loaded.denoiser, batch=1)
            with torch.no_grad():
                real(counting, seeds=streams(job.seed, [0]), cond=cond or None)
            calls = counting.calls
    except ValueError as error:
        raise UserError(f"these settings cannot be sampled: {one_line(str(error))}") from error
    others = sum(other.calls for other in _blanks(generation.guidance))
    return Probed(calls + others, blank.unconditional)


def blank_of(denoiser: Any) -> Blank:
    """Return the stand-in for a model."""
    if isinstance(denoiser, BridgeField):
        return BlankField(denoiser.interpolant, denoiser.bridge)
    kind = BlankWithVariance if isinstance(denoiser, LearnedVariance) else Blank
    return kind(denoiser.interpolant)


def _blanks(factory: Any, depth: int = 6) -> list[Blank]:
    """The stand-ins that a guidance, or one it builds on, has been given."""
    if isinstance(factory, Blank):
        return [factory]
    if depth == 0 or isinstance(factory, Tensor | type):
        return []
    held = factory.keywords if isinstance(factory, partial) else getattr(factory, "__dict__", {})
    return [blank for value in held.values() for blank in _blanks(value, depth - 1)]


def check_labels(job: Job, loaded: Loaded, probed: Probed) -> None:
    """A model that never saw an example without a label does not know what to answer without one.

    Raises:
        UserError: If it would be asked.
    """
    loss: Mapping[str, Any] = loaded.config["method"].get("loss") or {}
    while "label_dropout" not in loss and isinstance(loss.get("loss"), Mapping):
        loss = loss["loss"]  # a loss around a loss
    if not job.num_classes or not probed.unconditional or loss.get("label_dropout") != 0.0:
        return
    if job.posterior is not None and job.labels is None:
        raise UserError(
            "labels=null means no label for what is measured, but this run was trained with "
            "method.loss.label_dropout=0 and knows no answer without one; give the class, labels=<class>"
        )
    name = str(job.generation["guidance"].get("_target_")).rsplit(".", 1)[-1]
    raise UserError(
        f"guidance: {name} asks the model without a label, but this run was trained with "
        "method.loss.label_dropout=0 and knows no answer without one"
    )
