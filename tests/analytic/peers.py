"""Public samplers to agree with: diffusers' schedulers, and k-diffusion's functions.

k-diffusion asks for a library that refuses NumPy 2, so it is installed without its dependencies, and its package does
not import; its `sampling` module needs none of what is missing and is loaded alone.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path


def k_diffusion_sampling():
    """Return the module `k_diffusion.sampling`.

    Raises:
        ModuleNotFoundError: If k-diffusion is not installed.
    """
    if "k_diffusion" not in sys.modules:
        found = importlib.util.find_spec("k_diffusion")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("k_diffusion")
        package = types.ModuleType("k_diffusion")
        package.__path__ = [str(Path(found.origin).parent)]
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")
