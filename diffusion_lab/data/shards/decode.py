"""From the bytes of a member to an array or a label: our own decoders, and no others.

    png jpg jpeg webp bmp    Pillow, as `pictures.py` prepares them: uint8
    npy                      NumPy, an array of numbers of the shape that is expected: uint8, or float32
    cls txt json             a label: a number in text, or a number below a key of an object

Nothing is unpickled, whatever the extension says. What else lies in a shard (.pickle, .pyd, .pth, ...) is never read.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence

import numpy as np

from diffusion_lab.data.pictures import BROKEN, SUFFIXES, Preparation
from diffusion_lab.data.shards.index import UNREADABLE, parse_label

PICTURES = tuple(sorted(suffix[1:] for suffix in SUFFIXES))
ARRAYS = ("npy",)
# what decoding a damaged or hostile member raises
UNDECODABLE = (*BROKEN, MemoryError, OverflowError, RecursionError)


def kind_of(extension: str) -> str | None:
    """Return "picture", "array" or None by the last part of an extension."""
    last = extension.rpartition(".")[2]
    return "picture" if last in PICTURES else "array" if last in ARRAYS else None


def decode_picture(content: bytes, preparation: Preparation) -> np.ndarray:
    """Return a picture's pixels, see `Preparation`.

    Raises:
        OSError, ValueError, ...: One of `UNDECODABLE`.
    """
    return preparation(io.BytesIO(content))


def decode_array(content: bytes, shape: Sequence[int]) -> np.ndarray:
    """Return an array of `shape`: uint8 as it is, other numbers as float32.

    The header is compared before anything as large as it says is allocated.

    Raises:
        ValueError: If it is no .npy file, or of another shape or type.
    """
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    found, fortran, dtype = read(file)
    if tuple(found) != tuple(shape):
        raise ValueError(f"its shape is {tuple(found)}, not {tuple(shape)}")
    if dtype.kind not in "fiu" or dtype.hasobject:
        raise ValueError(f"its numbers are of type {dtype}")
    body = content[file.tell() :]
    if len(body) != math.prod(found) * dtype.itemsize:
        raise ValueError(f"it has {len(body)} bytes of numbers, not {math.prod(found) * dtype.itemsize}")
    array = np.frombuffer(body, dtype=dtype).reshape(found, order="F" if fortran else "C")
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def decode_label(content: bytes, key: str | None) -> int:
    """Return the label in a .cls or .txt, or in a .json below `key`; `UNREADABLE` if it is no natural number.

    Raises:
        ValueError: If it is no JSON object.
    """
    if key is None:
        return parse_label(content)
    value = json.loads(content)
    found = value.get(key) if isinstance(value, dict) else None
    return (
        found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 10**9 else UNREADABLE
    )
