"""One denoiser under several conditions at once: the branches of a guidance in one call of the network.

Branches are laid behind each other along the batch, which keeps a device busier than calling them in turn; in turn
needs less memory. A branch without a condition (`None`) joins the others as the label `NO_LABEL`. Where that cannot be
said, because other conditions have no such value for a single example, the branches are called in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import expand_logsnr
from diffusion_lab.typing import NO_LABEL, NOT_OF_THE_SAMPLE, Cond, DenoiserFn


def answers(
    denoiser: DenoiserFn, x: Tensor, logsnr: Tensor, conds: Sequence[Cond | None], *, batched: bool = True
) -> list[Tensor]:
    """Return E[x0 | x, cond] for each condition, each of the shape of `x`.

    Args:
        denoiser: The denoiser.
        x: Noisy samples `(B, *D)`.
        logsnr: Their levels.
        conds: One condition of the whole batch a branch.
        batched: Whether one call may serve all branches.
    """
    joined = join(conds, len(x)) if batched and len(conds) > 1 else None
    if joined is None:
        return [denoiser(x, logsnr, cond) for cond in conds]
    n = len(conds)
    level = expand_logsnr(logsnr, x)
    everything = denoiser(torch.cat([x] * n), torch.cat([level] * n), joined)
    return list(everything.chunk(n))


def join(conds: Sequence[Cond | None], batch: int) -> Cond | None:
    """Return the conditions behind each other, or None where they cannot be put into one mapping.

    Args:
        conds: One condition of `batch` samples a branch.
        batch: Number of samples.
    """
    given: list[Cond] = [cond or {} for cond in conds]
    names = {name for cond in given for name in cond}
    lacking = {name for name in names if any(name not in cond for cond in given)}
    if not names or not lacking <= {"label"}:
        return None
    out: dict[str, Tensor] = {}
    for name in sorted(names):
        like = next(cond[name] for cond in given if name in cond)
        null = (
            torch.full((batch,), NO_LABEL, dtype=like.dtype, device=like.device) if name in lacking else like
        )
        out[name] = torch.cat([cond.get(name, null) for cond in given])
    return out


def unconditional(cond: Cond | None) -> Cond | None:
    """Return what an unconditional branch is told: nothing but `NOT_OF_THE_SAMPLE`."""
    rest = {name: value for name, value in (cond or {}).items() if name in NOT_OF_THE_SAMPLE}
    return rest or None


def is_conditional(cond: Cond | None) -> bool:
    """Whether there is anything in `cond` that a model is conditioned on."""
    return any(name not in NOT_OF_THE_SAMPLE for name in cond or {})
