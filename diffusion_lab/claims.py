"""Claims: a file that one process at a time holds, so that no two do the same work.

A claim is a POSIX record lock: it belongs to the process and ends with it, however that ends; forked loader workers do
not inherit it. What the file says is only who holds it, or held it last.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(path: Path, wait_s: float = 0.0, *, remove: bool = False) -> Iterator[bool]:
    """Hold a file for this process, if no other one does; yields whether it is held.

    Never ask for what this very process holds already: a record lock is the process's, and ends with the first handle
    that is closed.

    Args:
        path: The file; made with its folder.
        wait_s: How long to wait for it.
        remove: Whether it is removed at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait_s
    while True:
        with path.open("a+") as file:
            if _locked(file.fileno()):
                if not _is_at(path, file.fileno()):
                    continue  # it was removed by who held it, while we opened it: a lock on no file keeps nobody out
                file.seek(0)
                file.truncate()
                file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
                file.flush()
                try:
                    yield True
                finally:
                    if remove:
                        path.unlink(missing_ok=True)
                return
        if time.monotonic() >= end:
            yield False
            return
        time.sleep(0.1)


def _locked(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def owner(path: Path) -> str:
    """Return who holds, or held last, a claim."""
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"
