"""Which files a data set's shards are.

    train-{000000..000099}.tar      a brace pattern, relative to the folder; several are joined by "::"
    (nothing)                       train-*.tar for training, test-*.tar or val-*.tar for testing, else every *.tar

Only files of this machine: what looks like a URL or a command (`pipe:`) is refused here, and left to the stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from diffusion_lab.data.errors import DataError

MOST = 1_000_000
"""Shards that a pattern may stand for."""

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
_LETTERS = re.compile(r"\{([A-Za-z])\.\.([A-Za-z])(?:\.\.-?\d+)?\}")
_TEST = ("test", "val")


def scheme(url: str) -> str:
    """Return what a URL starts with, up to the colon and in lower case; "" for a path."""
    found = _SCHEME.match(url.strip())
    return found.group()[:-1].lower() if found else ""


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern stands for, in its own order.

    Raises:
        DataError: If its braces do not match, or it stands for more than a million names.
    """
    from braceexpand import braceexpand

    # counted first: the library makes them all before it gives the first
    try:
        if sum(_at_most(part) for part in pattern.split("::")) > MOST:
            raise DataError(f"{pattern!r} stands for more than {MOST:,} shards")
        return [name for part in pattern.split("::") for name in braceexpand(part)]
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{pattern!r} is not a pattern of shards: {error}") from error


def _at_most(pattern: str) -> int:
    """Return a number of names that a pattern stands for at most."""
    most = math.prod(abs(int(a) - int(b)) + 1 for a, b in _RANGE.findall(pattern))
    most *= math.prod(abs(ord(a) - ord(b)) + 1 for a, b in _LETTERS.findall(pattern))
    # each alternative of each group; nested ones are counted too often
    return most * math.prod(group.count(",") + 1 for group in pattern.split("{")[1:])


def local_only(where: str) -> None:
    """Refuse what is no path.

    Raises:
        DataError: If it is a URL or a command.
    """
    if found := scheme(where):
        raise DataError(
            f"{where!r}: shards are read by index from files of this machine, not from {found}: "
            f"(dataset=shards_stream reads URLs)"
        )


def _plain(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith(".") and p.is_file())


def _named(root: Path, names: Sequence[str]) -> list[Path]:
    """Return the shards called `<name>-*.tar` or lying in a folder of that name, for the first name that has any."""
    for name in names:
        found = [p for p in _plain(root) if re.match(rf"{name}[-_.]", p.name)]
        if found or (found := _plain(root / name)):
            return found
    return []


def has_shards(root: Path) -> bool:
    """Whether a folder holds shards."""
    return root.is_dir() and bool(_plain(root) or _named(root, ("train",)))


def shard_paths(root: Path, split: str, pattern: str | None = None) -> list[Path]:
    """Return the shards of a split in order; none for a test split that has none of its own.

    Args:
        root: The folder.
        split: "train" or "test".
        pattern: Brace pattern relative to `root`, or None to look.

    Raises:
        DataError: If a shard is missing, there are none to train on, or the pattern is a URL.
    """
    local_only(str(root))
    if pattern is not None:
        for part in pattern.split("::"):
            local_only(part)
        paths = [root / name for name in expand(pattern)]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(f"shard {missing[0]} is missing ({len(missing)} of {len(paths)} are)")
        return paths
    if split == "test":
        return _named(root, _TEST)
    tests = _named(root, _TEST)
    paths = _named(root, ("train",)) or [path for path in _plain(root) if path not in tests]
    if not paths:
        raise DataError(
            f"{root} holds no shards to train on (*.tar): make some with python -m diffusion_lab.data.convert"
        )
    return paths
