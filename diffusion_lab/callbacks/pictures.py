"""Pictures of samples: grids of images, and dots for data in the plane."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_lab.images import to_uint8

CANVAS = 192
EXTENT = 3.0


def tile(images: Tensor, columns: int, *, smallest: int = 384, gap: int = 1) -> Image.Image:
    """Lay images out in rows.

    Args:
        images: `(N, C, H, W)` in [-1, 1], C being 1 or 3.
        columns: Images in a row.
        smallest: Small pictures are enlarged by a whole factor until they are about this wide.
        gap: Pixels between images.
    """
    # a picture of a sample that is not a number is a black one, not the end of the run
    pixels = to_uint8(torch.nan_to_num(images, nan=-1.0)).cpu()
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    n, _, height, width = pixels.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 96, dtype=np.uint8)
    for i, image in enumerate(pixels[:, :3]):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(sheet)
    factor = max(1, round(smallest / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def scatter(points: Tensor) -> Tensor:
    """Draw points of the plane as one image.

    Args:
        points: `(N, D)`; the first two coordinates are drawn, within +-3.

    Returns:
        `(1, 192, 192)` in [-1, 1], dark dots on white.
    """
    xy = points[:, :2].detach().float().cpu()
    if xy.shape[1] == 1:
        xy = torch.cat([xy, torch.zeros_like(xy)], dim=1)
    place = ((torch.nan_to_num(xy) / EXTENT + 1.0) * 0.5 * (CANVAS - 1)).round().long()
    inside = ((place >= 0) & (place < CANVAS)).all(dim=1)
    canvas = torch.ones(1, CANVAS, CANVAS)
    canvas[0, CANVAS - 1 - place[inside, 1], place[inside, 0]] = -1.0
    return canvas
