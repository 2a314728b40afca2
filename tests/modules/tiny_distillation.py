"""Distillation small enough for a test: 2x2 images, a teacher that stands still, a method of two parts that take turns.

`python tiny_distillation.py <folder>` runs the two phases as one of several processes.
"""

import sys
from functools import partial
from pathlib import Path

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from diffusion_lab.callbacks import Checkpoints, GradientNorm, KeptWeights, StopAtImages, TrainingLog
from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.losses import LossTerms, TruncatedSNR
from diffusion_lab.losses.distillation import ProgressiveLoss
from diffusion_lab.modules import AtomicCheckpointIO
from diffusion_lab.modules.distillation import DistillationModule, Phase, ProgressiveModule
from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.process import Cosine, VariancePreserving

SHAPE = (1, 2, 2)
BATCH = 8
SCHEDULE = Cosine(logsnr_min=-10.0, logsnr_max=10.0)


class Net(nn.Module):
    """A small network; with `further` it has a layer that its teacher has not."""

    def __init__(self, seed=0, further=False, width=16):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, width), nn.SiLU(), nn.Dropout(0.3), nn.Linear(width, 4))
        if further:
            self.further = nn.Linear(1, width)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=generator)

    def forward(self, x, logsnr, cond=None):
        return self.layers(torch.cat([x.flatten(1), logsnr[:, None] / 10], dim=1)).view_as(x)


def denoiser(seed=0, **options):
    return NetworkDenoiser(network=Net(seed, **options), interpolant=VariancePreserving(), prediction=V())


class Hearing(nn.Module):
    """A small network that hears labels, and the scalars that are named."""

    def __init__(self, seed=0, scalars=()):
        super().__init__()
        self.conditioning = Conditioning(features=4, width=12, num_classes=2, scalars=list(scalars))
        self.first, self.drop, self.last = nn.Linear(4, 12), nn.Dropout(0.3), nn.Linear(12, 4)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.4, generator=generator)

    def forward(self, x, logsnr, cond=None):
        self.conditioning.check(cond, "Hearing")
        h = self.first(x.flatten(1)) + self.conditioning(logsnr, cond, len(x))
        return self.last(self.drop(torch.tanh(h))).view_as(x)


def hearing_teacher(seed=2):
    return NetworkDenoiser(network=Hearing(seed), interpolant=VariancePreserving(), prediction=V())


class Stream(IterableDataset):
    def __init__(self, start, rank, world, micros):
        self.start, self.rank, self.world, self.micros = start, rank, world, micros

    def __iter__(self):
        step, rows = self.start // BATCH, BATCH // self.micros
        while True:
            for micro in range(self.micros):
                own = range(micro * rows + self.rank, (micro + 1) * rows, self.world)
                generators = (torch.Generator().manual_seed(step * BATCH + i) for i in own)
                yield {"x0": torch.stack([torch.randn(SHAPE, generator=g).clamp(-1, 1) for g in generators])}
            step += 1


class Data(pl.LightningDataModule):
    shape, num_classes, name, batch_size = SHAPE, 0, "tiny", BATCH

    def train_dataloader(self):
        t = self.trainer
        start = t.lightning_module.images_seen
        return DataLoader(
            Stream(start, t.global_rank, t.world_size, t.accumulate_grad_batches), batch_size=None
        )


class TwoParts(DistillationModule):
    """The student and an auxiliary network, which learn in turn; each loss sees both networks."""

    def __init__(self, **options):
        super().__init__(loss=nn.Module(), **options)
        self.auxiliary = denoiser(seed=5)
        self.seen = []

    def parts(self):
        return {**super().parts(), "auxiliary": self.auxiliary}

    def phases(self):
        return (
            Phase(name="auxiliary", parts=("auxiliary",), steps=2),
            Phase(name="student", parts=("denoiser",)),
        )

    def distil(self, x0, cond, rng):
        logsnr = 6 * rng.stratified("noise_level").float() - 3
        x = x0 + 0.5 * rng.randn("noise", x0.shape[1:])
        with torch.no_grad():
            answer = self.guided(x, logsnr)
        both = self.denoiser(x, logsnr) - 0.3 * self.auxiliary(x, logsnr) - 0.7 * answer
        per_example = both.square().flatten(1).mean(1)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=logsnr)


OPTIMIZER = partial(torch.optim.Adam, lr=1e-2, betas=(0.0, 0.99))


def two_parts(**options):
    options = {"optimizer": OPTIMIZER, "denoiser": denoiser(seed=1), "teacher": denoiser(seed=2), **options}
    return TwoParts(seed=0, global_batch_size=BATCH, **options)


def progressive(max_images=12 * BATCH, **options):
    options = {
        "loss": ProgressiveLoss(schedule=SCHEDULE, weighting=TruncatedSNR(schedule=SCHEDULE)),
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "denoiser": denoiser(seed=1),
        "teacher": denoiser(seed=2),
        "steps_from": 8,
        "longer": {1: 2.0},
        **options,
    }
    return ProgressiveModule(max_images=max_images, seed=0, global_batch_size=BATCH, **options)


def fit(
    folder,
    module,
    max_images,
    *,
    resume=None,
    every=BATCH,
    extra=(),
    accumulate=1,
    strategy="auto",
    devices=1,
    logged=BATCH,
    logger=False,
):
    folder.mkdir(parents=True, exist_ok=True)
    # whatever state the process is in must not matter
    torch.manual_seed(hash(str(folder)) % 1000)
    callbacks = [
        TrainingLog(every_images=logged),
        GradientNorm(every_images=BATCH, clip=1.0),
        *extra,
        KeptWeights(dirpath=str(folder / "kept")),
        Checkpoints(every_images=every, keep=99, dirpath=str(folder / "checkpoints")),
        StopAtImages(max_images=max_images),
    ]
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=-1, callbacks=callbacks, logger=logger,
        plugins=[AtomicCheckpointIO()], accumulate_grad_batches=accumulate, use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(folder),
    )  # fmt: skip
    trainer.fit(
        module, datamodule=Data(), ckpt_path=None if resume is None else str(resume), weights_only=True
    )
    return trainer


def state(module, trainer):
    """Weights and optimizer state, flat."""
    found = {k: v.detach().clone() for k, v in module.state_dict().items()}
    for i, slots in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer.{i}.{k}": torch.as_tensor(v).clone() for k, v in slots.items()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    module = two_parts()
    module.denoiser.network.layers[2].p = module.auxiliary.network.layers[2].p = 0.0
    trainer = fit(Path(sys.argv[1]), module, 7 * BATCH, strategy="ddp", devices=2)
    if trainer.is_global_zero:
        torch.save(state(module, trainer), Path(sys.argv[1]) / "state.pt")
