"""Latents to images: what `sample.py` draws from a run trained on latents is decoded, by the same frozen autoencoder.

    python -m diffusion_lab.data.decode <samples> [autoencoder=<folder or hub id>] [out=<folder>]

    <samples>/decoded/samples.npz, grid.png, record.json      images: uint8 (N, H, W, C)

x0 = scale (latent - shift) is undone with the numbers of the run's config; the autoencoder is the one that the run's
latents.json names, unless another is named here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffusion_lab.data.autoencoder import Autoencoder
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.progress import progress
from diffusion_lab.images import to_uint8


def decode(
    x0: np.ndarray,
    autoencoder: Autoencoder,
    *,
    shift: Sequence[float],
    scale: Sequence[float],
    batch_size: int = 32,
) -> np.ndarray:
    """Decode samples.

    Args:
        x0: `(N, C, H, W)`, as the model makes them.
        autoencoder: The autoencoder.
        shift: As in `Latents`.
        scale: As in `Latents`.
        batch_size: Latents at a time.

    Returns:
        uint8 `(N, H', W', C')`.

    Raises:
        DataError: If the autoencoder's latents have another number of channels.
    """
    channels = int(autoencoder.module.config.latent_channels)
    if x0.ndim != 4 or x0.shape[1] != channels:
        raise DataError(
            f"autoencoder={autoencoder.name}: its latents have {channels} channels, these are {x0.shape[1:]}"
        )
    moved, scaled = (torch.tensor(list(values)).reshape(-1, 1, 1) for values in (shift, scale))
    done: list[np.ndarray] = []
    with progress("decoding", len(x0), unit="images") as tell:
        for first in range(0, len(x0), batch_size):
            part = torch.from_numpy(np.asarray(x0[first : first + batch_size], dtype=np.float32))
            images = to_uint8(autoencoder.decode(part / scaled + moved))
            done.append(images.permute(0, 2, 3, 1).contiguous().numpy())
            tell(first + len(part))
    return np.concatenate(done)


if __name__ == "__main__":
    from diffusion_lab.app.latents import decode_command

    raise SystemExit(decode_command())
