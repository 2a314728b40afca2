"""manifest.json beside shards: what they were made from, and the size and SHA-256 of each.

    {"format": "diffusion_lab shards 1", "name": ..., "classes": [...] or null, "source": {...},
     "splits": {"train": {"complete": true, "samples": 50000,
                          "shards": [{"file", "samples", "bytes", "sha256", "skipped": [...]}, ...]}}}

It is written anew, aside and renamed, after every finished shard, so an interrupted conversion goes on behind the last.
Shards from elsewhere have none, and need none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion_lab.data.errors import DataError
from diffusion_lab.files import write_atomically

FILE = "manifest.json"
FORMAT = "diffusion_lab shards 1"


def read_manifest(root: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None where there is none.

    Raises:
        DataError: If it is damaged.
    """
    path = root / FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not str(manifest.get("format", "")).startswith("diffusion_lab shards"):
            return None  # somebody else's file of that name
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                if Path(shard["file"]).name != shard["file"]:
                    raise ValueError(f"{shard['file']!r} is not the name of a file beside it")
                int(shard["bytes"]), int(shard["samples"]), str(shard["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): convert again, or remove it") from error
    return dict(manifest)


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder."""
    write_atomically(root / FILE, json.dumps(manifest, indent=1) + "\n")


def read_classes(root: Path) -> list[str] | None:
    """Return the class names that the manifest tells, or None."""
    classes = (read_manifest(root) or {}).get("classes")
    return [str(name) for name in classes] if isinstance(classes, list) else None


def check_sizes(root: Path) -> None:
    """Compare the shards of a folder with its manifest, by what can be had at once: their presence and size.

    Raises:
        DataError: If the conversion was not finished, or a shard is missing or has another size; names it.
    """
    for name, split in ((read_manifest(root) or {}).get("splits") or {}).items():
        if not split.get("complete"):
            raise DataError(f"{root}: the conversion of {name} was interrupted; the same command finishes it")
        for shard in split["shards"]:
            path = root / shard["file"]
            if not path.is_file():
                raise DataError(f"shard {path} is missing: {FILE} lists it")
            if (size := path.stat().st_size) != shard["bytes"]:
                raise DataError(f"shard {path} has {size:,} bytes, not the {shard['bytes']:,} of {FILE}")


def sha256_of(path: Path, tell: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal; `tell` hears of every chunk how many bytes it had."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if tell is not None:
                tell(len(chunk))
    return digest.hexdigest()
