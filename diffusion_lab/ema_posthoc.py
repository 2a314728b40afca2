r"""Any power-function average after training, out of a few that were kept on the way.

The average of width gamma after t images weighs the weights theta(tau) of every moment by a profile,

    theta_hat(t, gamma) = \int_0^t p(tau) theta(tau) dtau,      p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)

so sums of averages are averages with sums of profiles. With snapshots (t_i, gamma_i) kept during training, the average
(t, gamma) that was never tracked is approximated by  sum_i x_i theta_hat(t_i, gamma_i)  whose profile is nearest:

    minimise  |p - sum_i x_i p_i|^2    such that    sum_i x_i = 1
    [A 1; 1^T 0] [x; lambda] = [b; 1],        A_ij = <p_i, p_j>,   b_i = <p_i, p>

    <p_a, p_b> = (g_a + 1)(g_b + 1) (t_a / t_b)^e / ((g_a + g_b + 1) max(t_a, t_b)),   e = g_b if t_a < t_b, else -g_a

The paper solves A x = b. Its x sums to one up to 1e-5 where snapshots are many, but to 0.9 where they are few, which
would shrink all weights; the constraint costs nothing in the first case (the same error to three digits).

`PowerFunction`'s decay (1 - b/n)^(gamma + 1) gives the weights of step k of K the integral of p over that step,
(k/K)^(gamma+1) - ((k-1)/K)^(gamma+1), so all of this holds for the averages of a run, whose theta moves in steps.

References:
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """How to add snapshots up.

    Attributes:
        weights: `(N,)` float64, one for each snapshot; they sum to one.
        error: Distance of the profile from the one that was asked for, relative to its norm.
    """

    weights: np.ndarray
    error: float


def inner_products(
    times_a: ArrayLike, gammas_a: ArrayLike, times_b: ArrayLike, gammas_b: ArrayLike
) -> np.ndarray:
    """Return the integrals of the products of two power-function profiles, in 1 / image.

    Args:
        times_a: Images behind the first, positive.
        gammas_a: Exponent of the first, not negative.
        times_b: Images behind the second; all four broadcast.
        gammas_b: Exponent of the second.
    """
    t_a, g_a, t_b, g_b = (
        np.asarray(value, dtype=np.float64) for value in (times_a, gammas_a, times_b, gammas_b)
    )
    e = np.where(t_a < t_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * (t_a / t_b) ** e / ((g_a + g_b + 1) * np.maximum(t_a, t_b))


def solve_weights(
    times: Sequence[float], gammas: Sequence[float], target_time: float, target_gamma: float
) -> Solution:
    """Find the sum of snapshots whose profile is nearest to the one that is asked for.

    Args:
        times: Images behind each snapshot; no two snapshots may agree in time and exponent.
        gammas: Exponent of each.
        target_time: Images behind the average to be made.
        target_gamma: Its exponent.

    Raises:
        ValueError: If there are no snapshots, or a time is not positive.
    """
    t, g = np.asarray(times, dtype=np.float64), np.asarray(gammas, dtype=np.float64)
    if t.ndim != 1 or t.shape != g.shape or len(t) == 0 or min(t.min(), target_time) <= 0:
        raise ValueError(f"snapshots at positive times are needed, got times {times} for {target_time}")
    # times as fractions of the target's, and profiles of norm one: A then has ones on its diagonal
    t = t / target_time
    A = inner_products(t[:, None], g[:, None], t, g)
    b = inner_products(t, g, 1.0, target_gamma)
    norm = np.sqrt(np.diag(A))
    scaled = A / np.outer(norm, norm)
    bordered = np.block([[scaled, 1.0 / norm[:, None]], [1.0 / norm[None], np.zeros((1, 1))]])
    x = np.linalg.solve(bordered, np.append(b / norm, 1.0))[:-1] / norm
    square = float(inner_products(1.0, target_gamma, 1.0, target_gamma))
    error = np.sqrt(max(0.0, square - 2 * b @ x + x @ A @ x) / square)
    return Solution(x, float(error))


def combine(
    states: Iterable[Mapping[str, Tensor]],
    weights: Sequence[float] | np.ndarray,
    copied: Collection[str] = (),
) -> dict[str, Tensor]:
    """Add state dicts up, one after the other, so that one of them at a time is in memory.

    Args:
        states: State dicts of the same names and shapes, of any floating-point type; the newest last.
        weights: One for each.
        copied: Names that are not averaged but taken from the last state: buffers.

    Returns:
        float32 tensors on the CPU, added up in float64; those of `copied` as they are in the last state.

    Raises:
        ValueError: If names or shapes differ, or there are not as many states as weights.
    """
    sums: dict[str, Tensor] = {}
    last: Mapping[str, Tensor] | None = None
    for state, weight in zip(states, weights, strict=True):
        if last is not None and state.keys() != last.keys():
            odd = sorted(state.keys() ^ last.keys())[0]
            raise ValueError(f"the snapshots are of different networks: not all of them have {odd!r}")
        for name, value in state.items():
            if name in copied:
                continue
            if last is None:
                sums[name] = torch.zeros(value.shape, dtype=torch.float64)
            elif value.shape != sums[name].shape:
                raise ValueError(f"the snapshots are of different networks: {name!r} differs in shape")
            sums[name].add_(value.detach().to("cpu", torch.float64), alpha=float(weight))
        last = state
    if last is None:
        raise ValueError("there are no snapshots to add up")
    return {name: last[name] if name in copied else sums[name].to(torch.float32) for name in last}
