"""One process at a time writes to a folder of data: two would overwrite each other's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_lab.claims import claim, owner
from diffusion_lab.data.errors import DataError

LOCK = ".lock"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold a folder for this process while it writes there; what a killed process leaves behind blocks nobody.

    Args:
        out: The folder; made if it is not there.

    Raises:
        DataError: If another process holds it; says which.
    """
    with claim(out / LOCK, remove=True) as held:
        if not held:
            raise DataError(
                f"{out} is being written by {owner(out / LOCK)}: wait until that has ended, or stop it"
            )
        yield
