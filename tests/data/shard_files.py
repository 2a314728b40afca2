"""Small shards for tests: pictures whose colour tells their number."""

import io
import tarfile

import numpy as np
from PIL import Image


def picture(k, side=8, kind="PNG"):
    """A plain picture of colour (k, 2k, 3k)."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (k % 256, 2 * k % 256, 3 * k % 256)).save(file, format=kind)
    return file.getvalue()


def array(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def member(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def write(path, members, format=tarfile.USTAR_FORMAT):
    """A tar file of (name, content[, fields]) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content, *fields in members:
            member(tar, name, content, **(fields[0] if fields else {}))
    return path


def samples(numbers, classes=10):
    """Members of labelled samples."""
    for k in numbers:
        yield f"{k:04d}.png", picture(k)
        yield f"{k:04d}.cls", str(k % classes).encode()


def shards(root, lengths=(40, 7, 23), prefix="train", classes=10):
    """Shards of unlike lengths, numbered through; returns their paths."""
    paths, first = [], 0
    for k, n in enumerate(lengths):
        paths.append(write(root / f"{prefix}-{k:03d}.tar", samples(range(first, first + n), classes)))
        first += n
    return paths


def spoil(path, name, content=None):
    """Replace the content of a member by as many other bytes."""
    with tarfile.open(path) as tar:
        info = tar.getmember(name)
    with path.open("r+b") as file:
        file.seek(info.offset_data)
        file.write((content or b"\x00\xff" * info.size)[: info.size])
