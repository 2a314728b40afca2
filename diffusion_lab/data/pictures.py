"""From the bytes of a picture to pixels: one preparation for folders, shards and streams.

A picture is turned upright (EXIF), laid on white where it is transparent, reduced to 8 bits, cut to a box where a data
set asks for one, and centre-cropped to a square, resized with antialiasing: Pillow's box filter while it more than
halves, then bicubic (ADM's preprocessing), or one pass of another filter where the papers on a data set use that.

Only the formats listed are tried, whatever a file is called: Pillow would start a program for some others.

References:
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021 (preprocessing).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion_lab.data.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

# what Pillow's decoders raise over damaged files
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Pillow's own limit against decompression bombs; a thin strip would pass it and be enlarged beyond
MOST_PIXELS = 89_478_485

Resize = Literal["adm", "bilinear", "bicubic", "lanczos"]
Box = tuple[int, int, int, int]


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Return the centre square of `picture`, resized to `size` pixels a side; mode as given, "L" or "RGB".

    Raises:
        ValueError: If the picture is so thin that resizing it would take gigabytes.
    """
    if picture.size == (size, size):
        return picture
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return _fit(picture, size, Image.Resampling.BICUBIC)


def _fit(picture: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize so that the shorter side has `size` pixels, and cut the middle out."""
    scale = size / min(picture.size)
    wide = tuple(max(size, round(side * scale)) for side in picture.size)
    if wide[0] * wide[1] > MOST_PIXELS:
        raise ValueError(
            f"{picture.width} x {picture.height} pixels are too long and thin for a square of {size}"
        )
    picture = picture.resize((wide[0], wide[1]), resample)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """Return `picture` upright, without transparency, in `mode`, "L" or "RGB"; the same object if it is so already.

    Raises:
        ValueError: If its pixels are 32-bit integers or floats, whose range nobody knows.
    """
    if picture.getexif().get(0x0112, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        # convert() clips such grey levels at 255, which turns all but the darkest white
        picture = Image.fromarray(np.round(np.asarray(picture) / 257.0).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}, not 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture.load()
    return picture if picture.mode == mode else picture.convert(mode)


class Preparation:
    """How the pictures of a data set become pixels.

    Args:
        size: Side in pixels.
        channels: 1 for grey, 3 for colour.
        box: (left, top, right, bottom) that is cut out first, in pixels of the upright picture; None for all of it.
        resize: "adm", or the filter of one resizing pass.

    Raises:
        ValueError: If there are not 1 or 3 channels, the box is empty, or there is no such filter.
    """

    def __init__(
        self, *, size: int, channels: int, box: Sequence[int] | None = None, resize: Resize = "adm"
    ) -> None:
        if channels not in (1, 3) or size < 1:
            raise ValueError(
                f"pictures have 1 or 3 channels and a side of at least 1, got {channels}, {size}"
            )
        if resize not in ("adm", "bilinear", "bicubic", "lanczos"):
            raise ValueError(f"resize is adm, bilinear, bicubic or lanczos, got {resize!r}")
        if box is not None and (len(box) != 4 or not 0 <= box[0] < box[2] or not 0 <= box[1] < box[3]):
            raise ValueError(f"a box is (left, top, right, bottom), got {tuple(box)}")
        self.size, self.channels, self.resize = size, channels, resize
        self.mode = "L" if channels == 1 else "RGB"
        self.box: Box | None = None if box is None else (box[0], box[1], box[2], box[3])

    def __call__(self, file: Path | IO[bytes]) -> np.ndarray:
        """Return the pixels of one picture, uint8 `(size, size, channels)`, or `(size, size)` for grey.

        Raises:
            OSError, SyntaxError, ValueError, ...: One of `BROKEN`, if it cannot be decoded or is smaller than the box.
        """
        with Image.open(file, formats=FORMATS) as opened:
            picture = eight_bits(opened, self.mode)
            if self.box is not None:
                if picture.width < self.box[2] or picture.height < self.box[3]:
                    raise ValueError(
                        f"its {picture.width}x{picture.height} pixels do not hold the box {self.box}"
                    )
                picture = picture.crop(self.box)
            if self.resize == "adm" or picture.size == (self.size, self.size):
                picture = centre_crop(picture, self.size)
            else:
                picture = _fit(picture, self.size, Image.Resampling[self.resize.upper()])
            return np.asarray(picture)


def channels_first(pixels: np.ndarray) -> Tensor:
    """Return pixels `(B, H, W, C)` or `(B, H, W)` as a tensor `(B, C, H, W)` of its own."""
    if pixels.ndim == 3:
        return torch.from_numpy(pixels[:, None].copy())
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def read_picture(path: Path, size: int, channels: int) -> Tensor:
    """Return a picture with ADM's preparation as uint8 `(channels, size, size)`.

    Raises:
        DataError: If it cannot be decoded; names the file.
    """
    return read_pictures([path], Preparation(size=size, channels=channels))[0]


def read_pictures(paths: Sequence[Path], preparation: Preparation) -> Tensor:
    """Return pictures as uint8 `(len(paths), channels, size, size)`.

    Raises:
        DataError: If one cannot be decoded; names the file.
    """
    colour = () if preparation.channels == 1 else (3,)
    pixels = np.empty((len(paths), preparation.size, preparation.size, *colour), dtype=np.uint8)
    for row, path in enumerate(paths):
        try:
            pixels[row] = preparation(path)
        except BROKEN as error:
            raise DataError(f"{path} is not a readable image: {reason(error)}") from error
    return channels_first(pixels)


def reason(error: BaseException) -> str:
    """Return what an error says, in one line of at most 200 characters, the same each time and printable."""
    text = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "", str(error)).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:200]
