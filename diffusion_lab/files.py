"""Files that a reader never sees half written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """Give a file beside `path` to write to, which takes its place at the end; after an error `path` is as it was.

    Args:
        path: The file; its folder is made.
        flush: Whether the bytes reach the disk first, so that not even a machine that dies leaves half of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a random name: processes of several machines may write the same file of a shared disk
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield aside
        if flush:
            with aside.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
