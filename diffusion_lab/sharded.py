"""Parameters spread over processes: each holds a part of every tensor, and they are put together only where needed.

torch's `fully_shard` (FSDP2) cuts every parameter along its first dimension. A block's parameters are put together
right before the block computes and dropped after it, and its gradients are summed straight into the parts. So a
process holds 1 / R of the weights, gradients, optimizer state and averages.

    local(tensor)            this process's part, memory shared
    gather(values, keep)     whole tensors on the CPU where `keep`: every process must call it
    cut(whole, like)         a whole tensor, cut as `like` is: nobody needs to be asked
    unsharded(module)        the module computes by itself meanwhile: no process waits for another

What is not sharded passes through all of them unchanged, so callers need not know.

References:
    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020 (stage 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _is_cut(value: Any) -> bool:
    # the type of such tensors lives in a package that takes a while to import; without processes there are none
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of a module is spread over processes, put together at this moment or not."""
    return bool(_units(module))


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return what a network is a sequence of: the entries of its outermost module lists, in order."""
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(network, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            found += [child] if any(True for _ in child.parameters()) else []
        else:
            found += blocks(child)
    return found


def shard(network: nn.Module, mesh: Any) -> None:
    """Spread a network's parameters over the processes of `mesh`, in place, a block at a time.

    Every process must hold the same values. Names and what the network computes do not change.

    Args:
        network: A module whose blocks (see `blocks`) and which itself are used by calling them.
        mesh: One-dimensional `DeviceMesh`.
    """
    from torch.distributed.fsdp import fully_shard

    # parts are cut from plain memory; weights in channels-last order are rearranged
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; writing to it writes to the tensor."""
    return tensor.to_local() if _is_cut(tensor) else tensor  # type: ignore[attr-defined]


def gather(value: Any, *, keep: bool) -> Any:
    """Put together every tensor inside nested containers, one at a time; every process must call this.

    Args:
        value: Tensors, dicts, lists, tuples, and plain values.
        keep: Whether this process wants them; on others tensors that are sharded become empty ones.

    Returns:
        The same containers; tensors that were sharded are whole and on the CPU, the others as they were.
    """
    if isinstance(value, Mapping):
        return {key: gather(inner, keep=keep) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather(inner, keep=keep) for inner in value)
    if not _is_cut(value):
        return value
    whole = value.detach().full_tensor()
    return whole.cpu() if keep else whole.new_empty(0, device="cpu")


def cut(whole: Any, like: Tensor) -> Any:
    """Return the part of a whole tensor that belongs to this process, as a tensor sharded like `like`.

    Args:
        whole: The tensor, the same on every process; of another shape than `like`, it is returned as it is.
        like: Tells how; if it is not sharded, `whole` is returned as it is.
    """
    if not (_is_cut(like) and isinstance(whole, Tensor) and whole.shape == like.shape):
        return whole
    from torch.distributed.tensor import distribute_tensor

    place: Any = like
    # None: everybody cuts his own copy
    return distribute_tensor(whole.to(like.device), place.device_mesh, place.placements, src_data_rank=None)


def load_whole(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load a state dict of whole tensors into a module that may be sharded.

    Raises:
        RuntimeError: If names or shapes differ.
    """
    own = module.state_dict()
    given = {name: cut(value, own[name]) if name in own else value for name, value in state.items()}
    module.load_state_dict(given, strict=strict)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together, 0-d; every process must call this if any is sharded."""
    given = list(tensors)
    cuts, plain = [local(t) for t in given if _is_cut(t)], [t for t in given if not _is_cut(t)]
    norm = torch.nn.utils.get_total_norm(plain)
    if not cuts:
        return norm
    squared = torch.nn.utils.get_total_norm(cuts).float().square()
    torch.distributed.all_reduce(squared)
    return torch.sqrt(squared + norm.to(squared.device).float().square())


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Hold a module's parameters whole, so that it can be called as often as one likes, a different number of times
    on each process; every process must enter and leave. Without shards nothing happens.
    """
    units = _units(module)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for index, unit in enumerate(units):
            unit.reshard()
            # the first one is the network around the blocks, which FSDP2 leaves whole until the backward pass
            unit.set_reshard_after_forward(index > 0, recurse=False)


def _units(module: nn.Module) -> list[Any]:
    """Return the modules that are sharded as a unit, the outermost first."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take in this process."""
    return sum(local(t).numel() * t.element_size() for t in tensors)
