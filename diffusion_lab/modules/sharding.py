"""FSDP2 for a run: `trainer=fsdp2` shards the networks, and checkpoints stay what they are without it.

Lightning's `ModelParallelStrategy` makes the processes' mesh, along which `DiffusionModule.configure_model` shards.
Its own checkpoints are another format, one file a process, or a file with other names in the optimizer's state. Ours
go the usual way: what is sharded is put together, a tensor at a time, on the first process, which writes one file;
each process reads that file and keeps its parts. So a run of any number of processes, sharded or not, goes on as one
of any other, and whoever samples or exports sees no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from diffusion_lab.modules.ranks import is_first
from diffusion_lab.sharded import cut, gather, load_whole


class Sharded(ModelParallelStrategy):
    """All processes share the weights of the network, their gradients, the optimizer's state and the averages."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Make a mesh with all processes along the data's axis."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning ask for the optimizer's state, as it does without shards."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, whole on the first process; every process must call this."""
        assert self.lightning_module is not None
        return gather(self.lightning_module.state_dict(), keep=is_first())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, whole on the first process; every process must call this."""
        plain = getattr(optimizer, "optimizer", optimizer)
        return gather(plain.state_dict(), keep=is_first())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file as every strategy does."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Keep this process's parts of the weights."""
        assert self.lightning_module is not None
        load_whole(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep this process's parts of the optimizer's state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            slots = {
                index: {name: cut(value, parameters[int(index)]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": slots})
