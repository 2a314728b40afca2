"""A cure for torchvision wheels that do not import beside a CPU build of torch, at no cost until it is needed.

The registry's torchvision is built for CUDA. Beside a CPU torch its compiled half cannot be loaded, so nobody declares
the operators `torchvision::nms` and `torchvision::qnms`, and `import torchvision` ends in

    RuntimeError: operator torchvision::nms does not exist

which takes lightning, torchmetrics and torch_fidelity down with it. Declaring the two schemas is enough for all that
this house uses (transforms, models, `make_grid`); compiled operators and `torchvision.io` stay unavailable.

    install()  ->  a finder at the head of sys.meta_path; imports nothing, and answers for `torchvision` only
    import torchvision  ->  the real loader runs; upon that one error: declare the schemas, forget the half-imported
                            submodules, run the real loader again

A healthy torchvision is loaded untouched, an absent one stays absent, and any other error is passed on.
Known to their users: torchmetrics issue 3098, vision issue 9085, pytorch issue 157648.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "torchvision"
SYMPTOM = "operator torchvision::nms does not exist"
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[Any] = []  # the operator library, which withdraws its schemas when it is collected


class Finder:
    """Finds `torchvision` with the other finders, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of `torchvision` with a curing loader; None for every other name, or where it is absent."""
        if fullname != NAME:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(spec.loader)
                return spec
        return None


class Loader:
    """The real loader with a second try; it steps aside once the module runs."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(
            self.real, name
        )  # importlib.resources, pkgutil and inspect ask loaders for more than below

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the real loader does."""
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; upon the known error declare the operators and run it again."""
        try:
            self.real.exec_module(module)
        except RuntimeError as error:
            if SYMPTOM not in str(error):
                raise
            broken = True
        else:
            broken = False
        if broken:  # outside of the handler, where the traceback no longer holds the half-imported modules
            declare()
            for name in [name for name in sys.modules if name.startswith(NAME + ".")]:
                del sys.modules[name]
            # names bound by the first run would stop `from . import extension` from importing anew
            for name in [name for name in vars(module) if not name.startswith("__")]:
                delattr(module, name)
            self.real.exec_module(module)
        module.__loader__ = self.real
        if module.__spec__ is not None:
            module.__spec__.loader = self.real


def declare() -> None:
    """Declare the schemas of the two operators whose absence stops the import."""
    import torch

    if not _declared:
        library = torch.library.Library(NAME, "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(operator + SCHEMA)
        _declared.append(library)


def install() -> None:
    """Put the finder at the head of `sys.meta_path`; the second call does nothing."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
