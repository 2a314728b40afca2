"""Style transfer by two students of few steps: digits are taken to noise under their own label, and back under another.

python benchmarks/style_transfer.py encoder=<run> decoder=<run> [steps=8] [scale=2] [n=360] [seed=0] [out=<png>]

The encoder is a run of experiment=guided_distillation/digits_encoder, the decoder one of .../digits_steps; of each the
student of `steps` steps is taken, or its only weights: a run of .../digits serves as both with more steps. Encoding is
at guidance scale 1, decoding at `scale`.

    picture       a test image a row: itself, decoded under its own label, under every label
    recognised    the share of transferred digits that a classifier reads as the new label
    distance      root mean square to the source: of the digit decoded under its own label at scale 1, of the
                  transferred one, and of one decoded from fresh noise under the same label, so that the last two
                  differ by what the noise kept

Meng et al., "On Distillation of Guided Diffusion Models", 2023, section 5.4.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.app.build import Loaded, data_module, instantiate, load_denoiser
from diffusion_lab.app.runs.weights import kept_weights
from diffusion_lab.callbacks.pictures import tile
from diffusion_lab.guidance import Distilled
from diffusion_lab.images import to_float, to_uint8
from diffusion_lab.metrics.features import DigitsCNN
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.samplers.inversion import invert, towards_noise

ROWS = 12


def load(folder: Path, steps: int) -> Loaded:
    """Read the student of `steps` steps, or the only one there is."""
    name = f"steps_{steps}"
    return load_denoiser(folder, name if name in kept_weights(folder) else None)


def transferred(
    encoder: Loaded,
    decoder: Loaded,
    x0: Tensor,
    label: Tensor,
    to: Tensor,
    *,
    steps: int,
    scale: float,
    scale_in: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return images `(N, 1, 8, 8)` decoded under `to` and the noise that they were decoded from."""
    schedule = instantiate(decoder.config["schedule"], "schedule")
    told = Distilled(encoder.denoiser, scale=scale_in)
    noise = invert(
        told, x0, towards_noise(schedule, steps), cond={"label": label}, rng=SampleRNG(range(len(x0)))
    )
    return decoded(decoder, noise, to, steps=steps, scale=scale), noise


def decoded(decoder: Loaded, noise: Tensor, to: Tensor, *, steps: int, scale: float) -> Tensor:
    """Return the images that noise becomes under a label."""
    schedule = instantiate(decoder.config["schedule"], "schedule")
    told = Distilled(decoder.denoiser, scale=scale)
    return DDIM()(told, noise, uniform_u(schedule, steps), cond={"label": to})


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square difference."""
    return float((a - b).square().mean().sqrt())


def main(words: list[str]) -> None:
    """Transfer, measure and draw."""
    given = dict(word.split("=", 1) for word in words)
    if not {"encoder", "decoder"} <= set(given):
        raise SystemExit(__doc__)
    steps, scale, n = int(given.get("steps", 8)), float(given.get("scale", 2)), int(given.get("n", 360))
    encoder, decoder = (load(Path(given[part]), steps) for part in ("encoder", "decoder"))
    data = data_module(decoder.config)
    data.setup("fit")
    images, labels = data.test_images()
    x0, label = to_float(torch.as_tensor(images)[:n]), torch.as_tensor(labels)[:n].long()
    generator = torch.Generator().manual_seed(int(given.get("seed", 0)))
    to = (label + torch.randint(1, 10, (len(x0),), generator=generator)) % 10

    new, noise = transferred(encoder, decoder, x0, label, to, steps=steps, scale=scale)
    own = decoded(decoder, noise, label, steps=steps, scale=1.0)
    fresh = decoded(decoder, torch.randn(noise.shape, generator=generator), to, steps=steps, scale=scale)
    recognised = [
        float((DigitsCNN().features_and_logits(to_uint8(x))[1].argmax(1) == to).double().mean())
        for x in (new, fresh)
    ]
    print(
        f"encoder {encoder.ema}, decoder {decoder.ema}, {steps} steps each, scale {scale}, {len(x0)} digits"
    )
    print(f"noise        mean {float(noise.mean()):+.3f}, std {float(noise.std()):.3f}")
    print(f"recognised   {recognised[0]:.3f} of the transferred, {recognised[1]:.3f} from fresh noise")
    print(
        f"distance     {rms(own, x0):.3f} own label, {rms(new, x0):.3f} transferred, {rms(fresh, x0):.3f} fresh noise"
    )

    shown = []
    for i in range(min(ROWS, len(x0))):
        every = decoded(
            decoder, noise[i : i + 1].expand(10, -1, -1, -1), torch.arange(10), steps=steps, scale=scale
        )
        shown += [x0[i : i + 1], own[i : i + 1], every]
    out = Path(given.get("out", "style_transfer.png"))
    tile(torch.cat(shown), 12).save(out)
    print(f"picture      {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
