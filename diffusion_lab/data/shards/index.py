"""The index of a shard: where in a tar file each member of each sample lies.

A tar file is a chain of headers and contents that can only be walked from its beginning. It is walked once, by Python's
`tarfile`, and what was found is kept beside it as `<shard>.index.npz` (or, where that cannot be written, in a cache
folder), so that from then on any sample is one read at a known place:

    member m:   sample[m], extension[m], offset[m], size[m]          sample i:   label[i] (of its .cls), name

WebDataset's rule: a member `a/b/0001.seg.png` belongs to the sample `a/b/0001` and has the extension `seg.png`. Names
are only names; nothing is ever extracted. Members that are no plain files (links, devices, sparse files) and those
without an extension are passed over.

An index is used only if size, time of change and a hash of both ends of the tar file are what they were.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.pictures import reason

VERSION = 1
SUFFIX = ".index.npz"
ABSENT, UNREADABLE = -1, -2
"""Labels of samples without a .cls, and of those whose .cls is no number."""

_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]+)$", re.S)
_META = re.compile(r"__[^/]*__($|/)")
_BLOCK = 512
_ENDS = 4096
# what walking a hostile or damaged tar file raises
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of a shard lie.

    Attributes:
        path: The tar file.
        extensions: Names of the kinds of members, in lower case.
        sample: Number of the sample of each member, int32 `(M,)`.
        extension: Number of the kind of each member, int32 `(M,)`.
        offset: First byte of each member's content, int64 `(M,)`.
        size: Bytes of each member's content, int64 `(M,)`.
        label: What each sample's .cls says, or `ABSENT` or `UNREADABLE`, int64 `(N,)`.
        kept: Where the index was read from or written to; None if nowhere.
    """

    path: Path
    extensions: tuple[str, ...]
    sample: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    kept: Path | None = None
    _names: list[str] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def names(self) -> list[str]:
        """Names of the samples, read when an error message first needs one."""
        if self._names is not None:
            return self._names
        assert self.kept is not None
        try:
            with np.load(self.kept, allow_pickle=False) as stored:
                found = _split(stored["names"])
        except Exception:  # gone or damaged since; a name is only for a message
            found = []
        return found if len(found) == len(self) else [f"sample {k}" for k in range(len(self))]


def open_index(path: Path, cache: Path | None = None) -> ShardIndex:
    """Return the index of a shard: the one kept with it if it still fits, else a new one, which is kept.

    Args:
        path: The tar file.
        cache: Folder for indices of shards whose own folder cannot be written; None for the user's cache.

    Raises:
        DataError: If the shard is missing, compressed, cut short, damaged, or has two members of one name.
    """
    stamp = _stamp(path)
    places = [path.with_name(path.name + SUFFIX), _cache_folder(cache) / _cached_name(path)]
    for place in places:
        found = _load(place, path, stamp)
        if found is not None:
            return found
    index = build_index(path)
    for place in places:
        if _save(index, place, stamp):
            return replace(index, kept=place, _names=None)
    return index


def build_index(path: Path) -> ShardIndex:
    """Walk a tar file.

    Raises:
        DataError: See `open_index`.
    """
    table: list[tuple[int, int, int, int]] = []
    samples: dict[str, int] = {}
    extensions: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                key = None if not info.isreg() or info.issparse() else _key(info.name)
                if key is None:
                    continue
                sample = samples.setdefault(key[0], len(samples))
                extension = extensions.setdefault(key[1], len(extensions))
                if (sample, extension) in seen:
                    raise DataError(f"shard {path} holds two members called {printable(info.name)}")
                seen.add((sample, extension))
                table.append((sample, extension, info.offset_data, info.size))
            end = tar.offset
            file.seek(end)
            ended = file.read(_BLOCK) == bytes(_BLOCK)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is missing") from error
    except _DAMAGE as error:
        with_gzip = path.is_file() and _head(path)[:2] == b"\x1f\x8b"
        why = "it is compressed, and only plain tar files can be indexed" if with_gzip else reason(error)
        raise DataError(f"shard {path} is not a readable tar file: {why}") from error
    if not ended:
        raise DataError(
            f"shard {path} is cut short or damaged: no header at byte {end:,}, behind {len(table)} members"
        )
    columns = np.array(table, dtype=np.int64).reshape(-1, 4)
    return ShardIndex(
        path=path,
        extensions=tuple(extensions),
        sample=columns[:, 0].astype(np.int32),
        extension=columns[:, 1].astype(np.int32),
        offset=np.ascontiguousarray(columns[:, 2]),
        size=np.ascontiguousarray(columns[:, 3]),
        label=_labels(path, columns, extensions.get("cls"), len(samples)),
        _names=list(samples),
    )


def printable(name: str) -> str:
    """Return a member's name fit for a terminal: quoted, controls escaped, not too long."""
    return ascii(name if len(name) <= 120 else f"{name[:60]}...{name[-57:]}")


def parse_label(content: bytes) -> int:
    """Return the number in a .cls; `UNREADABLE` if it is none, or not one that could number a class."""
    text = content.strip()
    return int(text) if len(text) <= 9 and text.isdigit() else UNREADABLE


def _key(name: str) -> tuple[str, str] | None:
    """Part a member's name into sample and extension; None for what belongs to no sample."""
    found = None if _META.match(name) else _NAME.match(name)
    return (found.group(1), found.group(2).lower()) if found else None


def _labels(path: Path, columns: np.ndarray, kind: int | None, n: int) -> np.ndarray:
    labels = np.full(n, ABSENT, dtype=np.int64)
    if kind is not None:
        with path.open("rb") as file:
            for sample, extension, offset, size in columns.tolist():
                if extension == kind:
                    small = os.pread(file.fileno(), size, offset) if size <= 32 else b""
                    labels[sample] = parse_label(small)
    return labels


# ---- keeping it ------------------------------------------------------------------------------------------------------


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_ENDS)


def _stamp(path: Path) -> np.ndarray:
    """What tells one tar file from another: size, time of change, and 32 bytes of hash of both ends."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            ends = file.read(_ENDS) + os.pread(file.fileno(), _ENDS, max(0, status.st_size - _ENDS))
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is missing") from error
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {reason(error)}") from error
    digest = np.frombuffer(hashlib.sha256(ends).digest(), dtype=np.int64)
    return np.concatenate([np.array([VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64), digest])


def _cache_folder(cache: Path | None) -> Path:
    if cache is not None:
        return cache
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "diffusion_lab" / "tar_index"


def _cached_name(path: Path) -> str:
    digest = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{path.name[:80]}-{digest[:16]}{SUFFIX}"


def _join(names: Sequence[str]) -> np.ndarray:
    """Names as bytes, parted by zeros."""
    text = "\0".join(name.replace("\0", "?") for name in names)
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _split(joined: np.ndarray) -> list[str]:
    text = joined.tobytes().decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []


def _arrays(index: ShardIndex) -> dict[str, np.ndarray]:
    return {name: getattr(index, name) for name in ("sample", "extension", "offset", "size", "label")}


def _save(index: ShardIndex, place: Path, stamp: np.ndarray) -> bool:
    aside = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.savez(
                file,
                stamp=stamp,
                extensions=_join(index.extensions),
                names=_join(index.names),
                **_arrays(index),  # type: ignore[arg-type]
            )
        aside.replace(place)
    except OSError:
        return False
    finally:
        try:
            aside.unlink(missing_ok=True)
        except OSError:
            pass
    return True


def _load(place: Path, path: Path, stamp: np.ndarray) -> ShardIndex | None:
    """Return the index kept at `place` if it is one of this very tar file."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            arrays = {name: stored[name] for name in ("sample", "extension", "offset", "size", "label")}
            extensions = tuple(_split(stored["extensions"]))
    except Exception:  # whatever lies there, and NumPy may raise almost anything over it: it is made anew
        return None
    # whoever can put a tar file there can put an index beside it
    sample, extension, offset, size, label = arrays.values()
    n, total = len(label), int(stamp[1])
    whole = (
        all(
            a.ndim == 1 and a.dtype.kind == "i" and len(a) == len(sample)
            for a in (sample, extension, offset, size)
        )
        and label.ndim == 1
        and label.dtype == np.int64
        and bool(((sample >= 0) & (sample < n) & (extension >= 0) & (extension < len(extensions))).all())
        and bool(((offset >= 0) & (size >= 0) & (size <= total) & (offset <= total - size)).all())
    )
    if not whole:
        return None
    return ShardIndex(path=path, extensions=extensions, kept=place, **arrays)
