"""Checkpoints that are either whole and harmless, or refused.

Writing.  The archive goes to a temporary file in the same folder, is flushed to the disk, and only then
renamed over its final name; the folder entry is flushed too. So a crash, a kill or a full disk at any moment
leaves either the old file or the new one, never half of one. The SHA-256 of the archive, taken while it is
written, follows it as a trailer of 40 bytes, which `torch.load` ignores:

    [ zip archive of torch.save ][ b"DLABSHA2" ][ 32 bytes SHA-256 of the archive ]

Reading.  The trailer is checked first, then the archive is read with `weights_only=True`: tensors and plain
containers, no code. A file without a trailer (made by another tool) is accepted if its archive is complete
and harmless.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from diffusion_lab.modules.errors import CheckpointNotSaved, CheckpointTruncated, CheckpointUnsafe, RunError

MAGIC = b"DLABSHA2"
TRAILER = len(MAGIC) + hashlib.sha256().digest_size
CHUNK = 1 << 20
NAME = re.compile(r"images-(\d+)\.ckpt")


def checkpoint_name(images_seen: int) -> str:
    """File name of the checkpoint taken after `images_seen` images; names sort as the clock runs."""
    return f"images-{images_seen:010d}.ckpt"


def images_of(path: Path) -> int | None:
    """Inverse of `checkpoint_name`; None for any other file."""
    match = NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


class _HashingWriter:
    """What `torch.save` writes to: hashes on the way, and keeps an OSError for later.

    An exception out of `write` would cross the C++ archive writer, whose destructor writes again and may abort the
    process on a full disk. So the first error is kept, and raised once the archive is closed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                _write(self.file, view)
                self.sha256.update(view)
            except OSError as error:
                self.error = error
        return view.nbytes

    def flush(self) -> None:
        """Flushed by the caller, which can report an error."""


def _write(file: BinaryIO, data: Any) -> None:
    """Write all of `data`; a function of its own so that a test can make the disk full."""
    file.write(data)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `checkpoint` to `path` atomically, with its checksum.

    Raises:
        CheckpointNotSaved: If the disk refuses. The temporary file is removed; a file already at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            writer = _HashingWriter(file)
            torch.save(checkpoint, writer)  # type: ignore[arg-type]
            if writer.error is not None:
                raise writer.error
            _write(file, MAGIC + writer.sha256.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointNotSaved(
            f"checkpoint {path} was not saved: {error.strerror or error}; earlier checkpoints are intact"
        ) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _verify_trailer(path: Path) -> bool:
    """Check the checksum; False if the file carries none. Raises CheckpointTruncated if it carries a wrong one."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < TRAILER:
            return False
        file.seek(size - TRAILER)
        trailer = file.read(TRAILER)
        if not trailer.startswith(MAGIC):
            return False
        file.seek(0)
        sha256, left = hashlib.sha256(), size - TRAILER
        while left > 0:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                break
            sha256.update(chunk)
            left -= len(chunk)
    if sha256.digest() != trailer[len(MAGIC) :]:
        raise CheckpointTruncated(f"checkpoint {path} is damaged: its content does not match its checksum")
    return True


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint after checking it.

    Args:
        path: The file.
        map_location: As in `torch.load`.

    Raises:
        CheckpointTruncated: If the file is cut short or damaged.
        CheckpointUnsafe: If it holds anything but tensors and plain containers.
        RunError: If there is no such file, or it cannot be read.
    """
    path = Path(path)
    whole = False
    try:
        whole = _verify_trailer(path)
        with path.open("rb") as file:
            head = file.read(2)
        if head != b"PK":
            # not an archive: an old pickle could carry code, anything else is rubble
            if head[:1] == b"\x80":
                raise CheckpointUnsafe(f"checkpoint {path} is a bare pickle, which can carry code: refused")
            raise CheckpointTruncated(f"checkpoint {path} is damaged: it does not start like a checkpoint")
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(
            r"(?:GLOBAL|Unsupported global:?|Unsupported class) (?:GLOBAL )?([\w.]+)", str(error)
        )
        what = f" ({found.group(1)})" if found else ""
        raise CheckpointUnsafe(
            f"checkpoint {path} holds something other than tensors and plain values{what}: refused"
        ) from error
    except FileNotFoundError as error:
        raise RunError(f"checkpoint {path} does not exist") from error
    except PermissionError as error:
        raise RunError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        if isinstance(error, RunError) or whole:
            raise
        raise CheckpointTruncated(f"checkpoint {path} is cut short or damaged") from error


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Checkpoints of a folder, newest first, by the images seen in their names."""
    found = [p for p in Path(folder).glob("images-*.ckpt") if images_of(p) is not None]
    return sorted(found, key=lambda p: images_of(p) or 0, reverse=True)


def find_resumable(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that can be resumed from.

    Every candidate is read in full, as a resume will.

    Returns:
        The path, or None if there is no good one, and one line for each newer file that had to be skipped.
    """
    messages = []
    for path in list_checkpoints(folder):
        try:
            load_checkpoint(path)
        except RunError as error:
            messages.append(f"skipped: {error}")
            continue
        return path, messages
    return None, messages


class AtomicCheckpointIO(CheckpointIO):
    """The functions above as Lightning's checkpoint plugin: `Trainer(plugins=[AtomicCheckpointIO()])`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write atomically; see `save_checkpoint`."""
        if storage_options is not None:
            raise ValueError("AtomicCheckpointIO writes local files and takes no storage_options")
        save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read with checks; `weights_only=False` is not honoured. See `load_checkpoint`."""
        return load_checkpoint(path, map_location="cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint if it is there."""
        Path(path).unlink(missing_ok=True)
