"""Open shards: each process keeps some of them open, whatever number there is."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.pictures import reason

MOST_OPEN = 256
"""Files that a process keeps open."""


class Handles:
    """Open files by number, the longest unused ones closed first.

    They are read by pread, which has no position that processes could share: a worker that was forked goes on with its
    own copies, one that was spawned opens its own.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getitem__(self, number: int) -> int:
        """Return the descriptor of a file.

        Raises:
            DataError: If it cannot be opened.
        """
        found = self._open.get(number)
        if found is not None:
            self._open.move_to_end(number)
            return found
        try:
            found = os.open(self.paths[number], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise DataError(f"shard {self.paths[number]} cannot be opened: {reason(error)}") from error
        self._open[number] = found
        if len(self._open) > MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return found

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, list[Path]]) -> None:
        self.__init__(state["paths"])  # type: ignore[misc]

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
