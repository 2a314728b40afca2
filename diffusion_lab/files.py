"""Files that a reader never sees half written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file aside, then rename it into place: a reader sees the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a random name: processes of several machines may write the same file of a shared disk
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
