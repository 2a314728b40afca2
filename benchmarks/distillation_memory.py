"""What training a student holds in memory: the parts of `distillation_speed.py` that count bytes.

Weights, gradients, Adam's moments and averages; and what the graph of a step keeps for the way back, the most at once:
saved tensors but for parameters, each storage once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import hydra
import torch
from torch import Tensor, nn

THIRD = ("auxiliary", "score", "previous")
"""What modules call the network that they have besides student and teacher; one at most."""


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Graph:
    """Counts what autograd keeps for the way back, the most at once: each storage once, those of parameters not."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Begin to look at what is saved."""
        self.known = {p.untyped_storage()._cdata for p in parameters}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: Holder(t, self), lambda held: held.tensor
        )
        self.hooks.__enter__()

    def rest(self) -> None:
        """No longer look; what was saved is counted until it is let go."""
        self.hooks.__exit__()


class Holder:
    """A saved tensor; it tells when it is let go."""

    def __init__(self, tensor: Tensor, graph: Graph) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.graph, self.key, self.bytes = tensor, graph, storage._cdata, storage.nbytes()
        if self.key in graph.known:
            self.bytes = 0
        if not graph.holders.get(self.key):
            graph.now += self.bytes
            graph.peak = max(graph.peak, graph.now)
        graph.holders[self.key] = graph.holders.get(self.key, 0) + 1

    def __del__(self) -> None:
        self.graph.holders[self.key] -= 1
        if not self.graph.holders[self.key]:
            self.graph.now -= self.bytes


def weights(module: Any) -> dict[str, float]:
    """Bytes of a module's networks."""
    third = next((getattr(module, name) for name in THIRD if hasattr(module, name)), nn.Module())
    networks = {"student": module.denoiser, "teacher": module.teacher, "third network": third}
    return {name: size(network.parameters()) for name, network in networks.items()}


def measured(module: Any, gradients: int, graph: Graph) -> dict[str, float]:
    """Bytes that a run holds after its first steps.

    Args:
        module: Being trained.
        gradients: The most that there were.
        graph: What looked on.
    """
    slots = [slot for state in module.optimizers().optimizer.state.values() for slot in state.values()]
    return {
        **weights(module),
        "gradients": gradients,
        "Adam": size(slot for slot in slots if isinstance(slot, Tensor)),
        "averages": size(p for average in module.averages.values() for p in average.parameters()),
        "graph, an image": graph.peak / module.global_batch_size,
    }


def counted(cfg: Any) -> dict[str, float]:
    """Bytes that a composed recipe would hold, counted where nothing is allocated; its teacher is a plain denoiser."""
    own = cfg.method.denoiser
    plain = {key: own[key] for key in own if key not in ("scales", "finest")}
    if cfg.model.get("scalars"):
        plain["network"] = {**own.network, "scalars": []}
    cfg.method.teacher = {**plain, "_target_": "diffusion_lab.denoisers.NetworkDenoiser"}
    with torch.device("meta"):
        module = hydra.utils.instantiate(cfg.method)
    parts = {name: size(part.parameters()) for name, part in module.parts().items()}
    found = weights(module)
    return {
        **found,
        "gradients": max(sum(parts[name] for name in phase.parts) for phase in module.phases()),
        "Adam": 2 * sum(parts.values()),
        "averages": len(cfg.averages) * found["student"],
    }


def memory_row(name: str, unit: str, found: Mapping[str, float]) -> dict[str, Any]:
    """A row of the table of memory."""
    scale = {"MiB": 2.0**20, "GiB": 2.0**30}[unit]
    held = sum(value for key, value in found.items() if not key.startswith("graph"))
    told = {key: value / scale for key, value in found.items()}
    return {"experiment": name, "unit": unit, **told, "held in all": held / scale}
