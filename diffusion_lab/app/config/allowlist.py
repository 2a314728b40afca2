"""Which `_target_`s a config from elsewhere may name.

A run folder or an export may come from a stranger, and building a config calls what it names. So before anything of
such a config is built, every `_target_` is traced in the source to its definition (`signatures.py`), and that
definition must lie in a package listed here. Tracing the definition, not the spelling, is what stops
`diffusion_lab.app.runs.run.os.system`: it starts like ours and ends in `os`. From torch and lightning only classes
pass: their functions include `torch.load`. From this package the application layer and the scripts do not pass, for
they write, start processes and read further configs.

Further packages pass if the user names them: DIFFUSION_LAB_TRUST=my_package (several parted by commas). Of these only
what is defined in them passes, not what they import. A config that was composed from the user's own command line is
not checked here at all.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Mapping
from typing import Any

from diffusion_lab.app.config.signatures import TargetNotFound, resolve
from diffusion_lab.app.errors import UserError

# packages whose classes and functions build the parts of a run
OURS = tuple(
    f"diffusion_lab.{package}."
    for package in (
        "callbacks", "data", "denoisers", "ema", "guidance", "likelihood", "loggers", "losses", "measurements",
        "metrics", "modules", "networks", "posterior", "process", "rewards", "samplers",
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
TRUST = "DIFFUSION_LAB_TRUST"


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
                    raise UserError(f"{where}: {full} = {inner!r} {reason}{_advice(inner)}")
            else:
                _check(inner, where, full)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check(inner, where, f"{prefix}.{index}")
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: {prefix} holds an interpolation, {value!r}; a stored config is resolved")


def _advice(target: Any) -> str:
    """Tell how to trust one's own package; nothing where the target can be nobody's own."""
    package = own_package(target)
    return f"; if {package} is your own code, say so with {TRUST}={package}" if package else ""


def own_package(target: Any) -> str | None:
    """Return the top package of a target that could be the user's own code: neither Python's, nor one of `ROOTS`."""
    if not isinstance(target, str) or "." not in target:
        return None
    package = target.partition(".")[0]
    known = {root.partition(".")[0] for root in ROOTS}
    return package if package.isidentifier() and package not in {*sys.stdlib_module_names, *known} else None


def needs_trust(value: Any) -> list[str]:
    """Return the packages that must be trusted before what a config names may be built from a folder."""
    if isinstance(value, Mapping):
        package = own_package(value.get("_target_"))
        return sorted({*([package] if package else []), *needs_trust(list(value.values()))})
    return sorted({name for inner in value for name in needs_trust(inner)}) if isinstance(value, list) else []


def _trusted() -> tuple[str, ...]:
    """Return the prefixes of the targets that the user trusts."""
    names = (name.strip(" .") for name in os.environ.get(TRUST, "").split(","))
    return tuple(f"{name}." for name in names if name)


def is_allowed(target: Any) -> bool:
    """Whether a stored config may name this target."""
    trusted = _trusted()
    if not isinstance(target, str) or not target.startswith(ROOTS + trusted):
        return False
    try:
        definition = resolve(target)
    except TargetNotFound:
        return False
    if definition is None:
        return False
    if definition.path.startswith(trusted):
        return target.startswith(trusted)
    if definition.owner is not None:
        return False
    if definition.path.split(".")[0] != target.split(".")[0]:
        # through one of our modules into another package: nobody writes that by honest means
        return False
    if isinstance(definition.node, ast.ClassDef):
        return definition.path.startswith(OURS + CLASSES)
    return definition.path.startswith(FUNCTIONS)
