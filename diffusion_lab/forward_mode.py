"""Jacobian-vector products of networks, from any thread.

torch keeps one forward-mode level for the whole process, so two threads that differentiate at once end each other's
level; samples on a CPU are made in threads. Hence the lock. And some fast kernels (flash attention, group norm in
channels-last order) have no forward-mode rule: layers ask `is_dual` of their input and take a plainer way for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.RLock()
_DEPTH = 0


def jvp(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return `function(*primals)` and its derivative along `tangents`, both plain tensors.

    Args:
        function: A differentiable function of tensors. Gradients may be switched off; forward mode does not mind.
        primals: Where.
        tangents: Along what; shapes and types of `primals`.
    """
    global _DEPTH
    with _ONE_AT_A_TIME:
        _DEPTH += 1
        try:
            value, derivative = torch.func.jvp(function, primals, tangents)  # type: ignore[misc]
        finally:
            _DEPTH -= 1
    return value, derivative


def is_dual(x: Any) -> bool:
    """Whether a tensor is being differentiated by `jvp` (or another transform of torch.func).

    In what `torch.compile` traces it is whether any thread is inside `jvp`: to ask the tensor would cut the graph at
    every layer that asks, and the plainer way is right for all tensors.
    """
    if torch.compiler.is_compiling():
        return _DEPTH > 0
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
