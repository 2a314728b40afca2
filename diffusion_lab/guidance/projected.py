r"""Adaptive projected guidance: classifier-free guidance without the part that saturates.

    m = x0_cond - x0_uncond + momentum m_before                      m_before: m of the evaluation before, or 0
    d = m min(1, norm_threshold / |m|)
    d_par = <d, c> / <c, c> c,    d_orth = d - d_par                 c = x0_cond
    x0_hat = x0_cond + (scale - 1) (d_orth + eta d_par)

Products and norms are over all numbers of one sample. The part of the difference along x0_cond makes colours louder
and little else, so eta < 1 takes it back; the threshold bounds a step of what can be seen as gradient ascent, and a
negative momentum turns it away from where the last steps went. eta = 1 without threshold and momentum is
classifier-free guidance, to the bit. A sample of one number has no orthogonal part.

m is remembered in the object, since it outlives an evaluation; `Generation` makes a guidance anew for each trajectory.
It is forgotten where the level is not above the last one, so an object may serve trajectories one after the other, and
samplers that go back (the corrector of Heun's method, churn, Restart) start it again there. Outside the interval
nothing is remembered. All samples of a call must be at one level, else a place in the batch need not be the same
sample in the next call (ParaDiGMS); with a momentum that is an error.

References:
    Sadat, Hilliges & Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models",
    2025, section 4 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.guidance.branches import answers, unconditional
from diffusion_lab.guidance.classifier_free import ClassifierFree
from diffusion_lab.guidance.interval import EVERYWHERE
from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.typing import Cond, DenoiserFn


class Projected(ClassifierFree):
    """A denoiser guided across, and less along, its conditional answer. Two evaluations.

    Args:
        denoiser: Trained with and without conditions.
        scale: Guidance scale; 1 is off.
        eta: Weight of the parallel part; 1 keeps it, 0 is the paper's.
        norm_threshold: r > 0, largest norm of the difference of one sample, or None. It grows with the root of the
            number of pixels.
        momentum: beta in (-1, 1); negative is the paper's, 0 is off.
        interval: `(low, high)`: guide where low <= logsnr <= high.
        batched: Whether both answers come from one call, which needs the memory of both.

    Raises:
        ValueError: If a setting is outside its range or the interval is not ordered; at a call, if there is a momentum
            and the levels of the samples differ.
    """

    remembers = "momentum"

    def __init__(
        self,
        denoiser: DenoiserFn,
        scale: float,
        eta: float = 0.0,
        norm_threshold: float | None = None,
        momentum: float = 0.0,
        interval: Sequence[float] = EVERYWHERE,
        batched: bool = True,
    ) -> None:
        if norm_threshold is not None and not norm_threshold > 0.0:
            raise ValueError(f"Projected needs norm_threshold > 0 or None, got {norm_threshold}")
        if not -1.0 < momentum < 1.0:
            raise ValueError(f"Projected needs momentum in (-1, 1), got {momentum}")
        super().__init__(denoiser, scale, interval, batched)
        self.eta, self.norm_threshold, self.momentum = eta, norm_threshold, momentum
        self._last: tuple[Tensor, Tensor] | None = None  # level and m of the evaluation before

    def _guided(self, x: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
        if self.eta == 1.0 and self.norm_threshold is None and self.momentum == 0.0:
            return super()._guided(x, logsnr, cond)
        without, given = answers(self.denoiser, x, logsnr, [unconditional(cond), cond], batched=self.batched)
        m = given - without
        if self.momentum != 0.0:
            m = self._remembered(m, expand_logsnr(logsnr, x))
        d = m
        if self.norm_threshold is not None:
            # a difference of zero has the ratio inf, and stays
            d = m * broadcast_right(torch.clamp(self.norm_threshold / _dot(m, m).sqrt(), max=1.0), m)
        along = _dot(d, given) / _dot(given, given).clamp_min(torch.finfo(given.dtype).tiny)
        parallel = broadcast_right(along, given) * given
        return given + (self.scale - 1.0) * (d - (1.0 - self.eta) * parallel)

    def _remembered(self, m: Tensor, level: Tensor) -> Tensor:
        """Return `m` with the momentum of the calls before, and remember it."""
        if not bool((level == level[:1]).all()):
            raise ValueError(
                "Projected cannot keep a momentum where samples are at different noise levels; set momentum=0 or "
                "choose another sampler"
            )
        if self._last is not None and self._last[1].shape == m.shape:
            last_level, last_m = self._last
            m = m + torch.where(broadcast_right(level > last_level, m).bool(), self.momentum * last_m, 0.0)
        self._last = (level, m.detach())
        return m


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each sample, `(B,)`."""
    return (a * b).flatten(1).sum(dim=1)
