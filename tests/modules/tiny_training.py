"""A run small enough for a test, with everything that could break exactness.

Dropout, labels, averages, Adam, workers, and a schedule that follows the loss.

`python tiny_training.py '<json options>'` runs it as a process of its own, for the tests with several processes.
"""

import json
import sys
from functools import partial

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from diffusion_lab.callbacks import (
    Checkpoints,
    EMACallback,
    FrechetDuringTraining,
    GradientNorm,
    LossByNoiseLevel,
    Preemption,
    SampleGrid,
    StopAtImages,
    TrainingLog,
)
from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.ema import ConstantDecay, PowerFunction
from diffusion_lab.guidance import Unguided
from diffusion_lab.loggers import CSVMetrics, hush_lightning
from diffusion_lab.losses.adaptive import AdaptiveDenoisingLoss
from diffusion_lab.losses.weightings import SigmoidWeighting
from diffusion_lab.modules import AtomicCheckpointIO, DiffusionModule, LinearDecay
from diffusion_lab.process.interpolants import VariancePreserving
from diffusion_lab.process.schedules.adaptive import AdaptiveSchedule
from diffusion_lab.rng import derive_seed
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.generate import Generation
from diffusion_lab.samplers.grids import uniform_logsnr

SHAPE = (1, 4, 4)
CLASSES = 3
BATCH = 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.label = nn.Embedding(CLASSES + 1, 16)
        self.layers = nn.Sequential(nn.Linear(17, 32), nn.SiLU(), nn.Dropout(0.2), nn.Linear(32, 16))
        for p in self.parameters():
            nn.init.normal_(p, std=0.2, generator=generator)

    def forward(self, x, logsnr, cond=None):
        label = torch.full((x.shape[0],), -1) if cond is None else cond["label"]
        h = x.flatten(1) + self.label((label + 1).to(x.device))
        return self.layers(torch.cat([h, logsnr[:, None] / 10], dim=1)).view_as(x)


class Stream(IterableDataset):
    """Rows of the endless sequence of global batches, as (micro-batch, rank, worker) need them."""

    def __init__(self, start, rank, world, micros):
        self.start, self.rank, self.world, self.micros = start, rank, world, micros

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        turn, step, rows = 0, self.start // BATCH, BATCH // self.micros
        while True:
            for micro in range(self.micros):
                if turn % workers == worker:
                    own = range(micro * rows + self.rank, (micro + 1) * rows, self.world)
                    yield self.batch([step * BATCH + i for i in own])
                turn += 1
            step += 1

    @staticmethod
    def batch(indices):
        x0 = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in indices])
        return {"x0": x0.clamp(-1, 1), "label": torch.tensor([i % CLASSES for i in indices])}


class Data(pl.LightningDataModule):
    shape, num_classes, name, batch_size = SHAPE, CLASSES, "tiny", BATCH

    def __init__(self, num_workers=0, spoil=None):
        super().__init__()
        self.num_workers, self.spoil = num_workers, spoil

    def train_dataloader(self):
        trainer = self.trainer
        stream = Stream(
            trainer.lightning_module.images_seen,
            trainer.global_rank,
            trainer.world_size,
            trainer.accumulate_grad_batches,
        )
        return DataLoader(stream, batch_size=None, num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        # an example that is not a number, in the step that starts at `spoil` images
        if self.spoil is not None and self.trainer.lightning_module.images_seen == self.spoil:
            batch["x0"][-1] = float("nan")
        return batch

    def test_images(self):
        whole = Stream.batch(range(40))
        return ((whole["x0"] + 1) * 127.5).round().to(torch.uint8), whole["label"]

    train_images = test_images


def make_module(seed=0, global_batch_size=BATCH, **options):
    schedule = AdaptiveSchedule(logsnr_min=-10.0, logsnr_max=10.0, bins=8, halflife_images=40)
    return DiffusionModule(
        denoiser=NetworkDenoiser(network=Net(), interpolant=VariancePreserving(), prediction=V()),
        loss=AdaptiveDenoisingLoss(
            schedule=schedule, weighting=SigmoidWeighting(bias=0.0), label_dropout=0.3
        ),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        lr_schedule=LinearDecay(max_images=1000, warmup_images=40),
        seed=seed,
        global_batch_size=global_batch_size,
        **options,
    )


def make_callbacks(folder, max_images, every=40, log_every=24):
    return [
        EMACallback(
            profiles={"ema": ConstantDecay(half_life_images=50), "power": PowerFunction(sigma_rel=0.1)}
        ),
        TrainingLog(every_images=log_every),
        GradientNorm(every_images=log_every, clip=1.0),
        LossByNoiseLevel(every_images=3 * BATCH, bins=5),
        Preemption(),
        Checkpoints(every_images=every, keep=3, dirpath=str(folder / "checkpoints")),
        StopAtImages(max_images=max_images),
    ]


class Flat:
    """Features: the pixels."""

    name, dim, sha256, resize = "flat", 16, "0" * 64, "none"

    def __call__(self, images):
        assert images.dtype == torch.uint8
        return images.flatten(1).float()


def generation(shape=SHAPE, steps=5):
    return Generation(sampler=DDIM(), grid=uniform_logsnr(-8.0, 8.0, steps), guidance=Unguided, shape=shape)


def make_scores(folder, every=40):
    """Pictures and distances whose counts do not divide by two processes."""
    return [
        SampleGrid(
            generation=generation(),
            every_images=every,
            num_per_class=3,
            dirpath=str(folder / "samples"),
            moments=3,
        ),
        FrechetDuringTraining(
            generation=generation(), every_images=every, n=31, extractor=Flat(), batch_size=7
        ),
    ]


def make_trainer(
    folder, callbacks, *, accumulate=1, devices=1, loggers=None, nodes=1, strategy=None, precision="32-true"
):
    hush_lightning()
    # named, because Lightning takes bfloat16 in its place on a CPU
    half = [MixedPrecision("16-mixed", "cpu")] if precision == "16-mixed" else []
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy or ("ddp" if devices > 1 else "auto"),
        precision=None if half else precision,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=[CSVMetrics(dirpath=str(folder))] if loggers is None else loggers,
        plugins=[AtomicCheckpointIO(), *half],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )


def fit(
    folder,
    max_images,
    *,
    resume=None,
    workers=0,
    accumulate=1,
    devices=1,
    extra=(),
    every=40,
    spoil=None,
    loggers=None,
    seed=0,
    module=None,
    data=None,
    strategy=None,
    precision="32-true",
):
    """Train up to `max_images`, from the checkpoint `resume` if given; return module and trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    # whatever state the process is in must not matter
    torch.manual_seed(derive_seed(str(folder), max_images))
    module = module or make_module(seed=seed)
    callbacks = [*extra, *make_callbacks(folder, max_images, every=every)]
    trainer = make_trainer(
        folder, callbacks, accumulate=accumulate, devices=devices, loggers=loggers, strategy=strategy,
        precision=precision,
    )  # fmt: skip
    trainer.fit(
        module,
        datamodule=data or Data(workers, spoil),
        ckpt_path=None if resume is None else str(resume),
        weights_only=True,
    )
    return module, trainer


def everything(module, trainer):
    """Flatten weights, averages and optimizer state into one dict of tensors."""
    state = {f"raw.{k}": v for k, v in module.state_dict().items()}
    for name, average in module.averages.items():
        state |= {f"{name}.{k}": v for k, v in average.state_dict().items()}
    for i, (_, slots) in enumerate(trainer.optimizers[0].state_dict()["state"].items()):
        state |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in slots.items()}
    return {k: v.detach().cpu().clone() for k, v in state.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys() and len(a) > 10
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, different


if __name__ == "__main__":
    from pathlib import Path

    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    folder = Path(options.pop("folder"))
    out = options.pop("out", None)
    tiny = make_module()
    if options.pop("still", False):
        tiny.denoiser.network.layers[2].p = 0.0
    if options.pop("scores", False):
        options["extra"] = make_scores(folder)
    module, trainer = fit(folder, module=tiny, **options)
    if out is not None and trainer.is_global_zero:
        torch.save({"state": everything(module, trainer), "images_seen": module.images_seen}, out)
