"""Which `_target_`s a config from elsewhere may name.

A run folder or an export may come from a stranger, and building a config calls what it names. So before anything of
such a config is built, every `_target_` is traced in the source to its definition (`signatures.py`), and that
definition must lie in a package listed here. Tracing the definition, not the spelling, is what stops
`diffusion_lab.app.run.os.system`: it starts like ours and ends in `os`. From torch and lightning only classes pass:
their functions include `torch.load`. From this package the application layer and the scripts do not pass, for they
write, start processes and read further configs.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from diffusion_lab.app.errors import UserError
from diffusion_lab.app.signatures import TargetNotFound, resolve

# packages whose classes and functions build the parts of a run
OURS = tuple(
    f"diffusion_lab.{package}."
    for package in (
        "callbacks", "data", "denoisers", "ema", "guidance", "loggers", "losses", "metrics", "modules", "networks",
        "process", "samplers",
    )
)  # fmt: skip
# functions only where building blocks are functions
FUNCTIONS = (
    "diffusion_lab.samplers.grids.",
    "diffusion_lab.guidance.",
    "diffusion_lab.modules.learning_rate.",
    "diffusion_lab.losses.weightings.",
)
# packages whose classes pass
CLASSES = (
    "torch.optim.",
    "torch.nn.modules.",
    "lightning.pytorch.trainer.trainer.Trainer",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.plugins.precision.",
)
ROOTS = ("diffusion_lab.", "torch.optim.", "torch.nn.", "lightning.pytorch.")


def check_targets(container: Any, where: str) -> None:
    """Refuse a config from elsewhere that names anything but known building blocks.

    Args:
        container: The config as plain data, as read from YAML: nothing resolved, nothing built.
        where: The file it came from, for the message.

    Raises:
        UserError: If a `_target_` leads out of the allowed packages or nowhere, or a value holds an interpolation
            (a recorded config is resolved; an interpolation could read the environment).
    """
    _check(container, where, "")


def _check(value: Any, where: str, prefix: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            full = f"{prefix}.{key}" if prefix else str(key)
            if key == "_target_":
                if not is_allowed(inner):
                    reason = "is not among the targets that a stored config may name"
                    raise UserError(f"{where}: {full} = {inner!r} {reason}")
            else:
                _check(inner, where, full)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check(inner, where, f"{prefix}.{index}")
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: {prefix} holds an interpolation, {value!r}; a stored config is resolved")


def is_allowed(target: Any) -> bool:
    """Whether a stored config may name this target."""
    if not isinstance(target, str) or not target.startswith(ROOTS):
        return False
    try:
        definition = resolve(target)
    except TargetNotFound:
        return False
    if definition is None or definition.owner is not None:
        return False
    if definition.path.split(".")[0] != target.split(".")[0]:
        # through one of our modules into another package: nobody writes that by honest means
        return False
    if isinstance(definition.node, ast.ClassDef):
        return definition.path.startswith(OURS + CLASSES)
    return definition.path.startswith(FUNCTIONS)
