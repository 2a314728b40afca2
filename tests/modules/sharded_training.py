"""The tiny run sharded over processes, to be started as `python sharded_training.py '<json options>'`.

Its network has what could go wrong when it is cut: blocks, first dimensions that do not divide by two, weights in
channels-last order, a layer that is normalised after each step, a buffer; and beside it stands a loss that learns.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import torch
from tiny_training import BATCH, CLASSES, Data, fit, make_scores
from torch import nn

from diffusion_lab.callbacks import Throughput
from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.losses import DenoisingLoss
from diffusion_lab.losses.uncertainty import UncertaintyLoss
from diffusion_lab.losses.weightings import SigmoidWeighting
from diffusion_lab.modules import DiffusionModule, LinearDecay
from diffusion_lab.modules.sharding import Sharded
from diffusion_lab.networks.magnitude_preserving import MPLinear
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.sharded import local_bytes

WIDTH = 33


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), MPLinear(WIDTH, WIDTH)

    def forward(self, h):
        return h + self.b(torch.nn.functional.silu(self.a(h)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(CLASSES + 1, 16)
        self.into, self.out = nn.Linear(17, WIDTH), nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        # in another order of memory than the parts that are cut from it
        self.convs = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 1, 3, padding=1))
        self.register_buffer("shift", torch.full((1,), 0.25))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.2, generator=generator)
        self.convs.to(memory_format=torch.channels_last)

    def forward(self, x, logsnr, cond=None):
        label = torch.full((x.shape[0],), -1) if cond is None else cond["label"]
        h = x.flatten(1) + self.label((label + 1).to(x.device)) + self.shift
        h = self.into(torch.cat([h, logsnr[:, None] / 10], dim=1))
        for block in self.blocks:
            h = block(h)
        return self.convs(x) + self.out(h).view_as(x)


def make_module(compile_network=False):
    loss = DenoisingLoss(schedule=Cosine(), weighting=SigmoidWeighting(bias=0.0), label_dropout=0.3)
    return DiffusionModule(
        denoiser=NetworkDenoiser(network=Net(), interpolant=VariancePreserving(), prediction=V()),
        loss=UncertaintyLoss(loss=loss, features=4),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
        lr_schedule=LinearDecay(max_images=1000, warmup_images=40),
        seed=0,
        global_batch_size=BATCH,
        compile_network=compile_network,
    )


def train(folder, max_images, *, scores=False, compile_network=False, sharded=True, **options):
    extra = [Throughput(every_images=3 * BATCH), *(make_scores(folder) if scores else [])]
    options["strategy"] = Sharded() if sharded else None
    return fit(folder, max_images, module=make_module(compile_network), data=Data(), extra=extra, **options)


def held(module, trainer):
    """Bytes that this process holds, by kind."""
    slots = [v for s in trainer.optimizers[0].state.values() for v in s.values() if torch.is_tensor(v)]
    return {
        "weights": local_bytes(module.denoiser.parameters()),
        "average": local_bytes(module.averages["ema"].parameters()),
        "optimizer": local_bytes(slots),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    where = Path(given.pop("folder"))
    module, trainer = train(where, **given)
    told = {**held(module, trainer), "images_seen": module.images_seen}
    (where / f"held-{os.environ['RANK']}.json").write_text(json.dumps(told))
