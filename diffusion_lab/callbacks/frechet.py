"""The Fréchet distance while training, with its protocol in its name.

n samples on fixed seeds, their classes in turn, made by all processes together; the statistics of their
features are merged over the processes, and the first one computes the distance to the reference images:

    |mu - mu_ref|^2 + tr(cov + cov_ref - 2 (cov cov_ref)^(1/2))

The value is logged as `fd@<n>/<features>/<average>`: distances for different n, features or averages are
different numbers. With `file` each one also goes there as a record, with the protocol it was measured under: a JSON
object a line, and the number of images seen beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from diffusion_lab.callbacks.base import StepCallback, check_interval, due, paused
from diffusion_lab.callbacks.preemption import was_preempted
from diffusion_lab.callbacks.sampling import chosen, conditions, evaluating, labels_for, pick, share
from diffusion_lab.images import to_uint8
from diffusion_lab.loggers import log_metrics
from diffusion_lab.metrics.collect import Collected, Moments, Piece, collect, pieces_of
from diffusion_lab.metrics.features import FeatureExtractor
from diffusion_lab.metrics.measures.base import REFERENCE, SAMPLES
from diffusion_lab.metrics.measures.frechet import Frechet
from diffusion_lab.metrics.protocol import ALL_LABELS, UNKNOWN, Protocol, Record, Source, describe_seeds
from diffusion_lab.metrics.quality import judge
from diffusion_lab.metrics.reference import content_hash
from diffusion_lab.modules.diffusion import DiffusionModule
from diffusion_lab.modules.ranks import sum_over_ranks
from diffusion_lab.samplers.generate import Generation


class FrechetDuringTraining(StepCallback):
    """Measures every so many images, and at the end of the run.

    Args:
        generation: How samples are made.
        every_images: Interval.
        n: Number of samples.
        extractor: Features.
        ema: Which average to sample; "raw" for the live weights; None for the first average, or for these where there
            is none.
        reference: Which real images to compare with.
        seed: Seed of the first sample.
        batch_size: Samples made at once by a process.
        file: Where the records go; None writes none.

    Attributes:
        values: Distances by images seen.
        records: The same with their protocol, on the first process.

    Raises:
        ValueError: If a count is out of range.
    """

    def __init__(
        self,
        *,
        generation: Generation,
        every_images: int,
        n: int = 500,
        extractor: FeatureExtractor,
        ema: str | None = None,
        reference: Literal["test", "train"] = "test",
        seed: int = 0,
        batch_size: int = 250,
        file: str | None = None,
    ) -> None:
        super().__init__()
        check_interval(every_images, "FrechetDuringTraining")
        if n < 2 or batch_size < 1 or reference not in ("test", "train"):
            raise ValueError(
                "FrechetDuringTraining needs n >= 2, batch_size >= 1 and reference test or train, "
                f"got {n}, {batch_size}, {reference!r}"
            )
        self.generation, self.every_images, self.n = generation, every_images, n
        self.extractor, self.ema, self.reference = extractor, ema, reference
        self.seed, self.batch_size = seed, batch_size
        self.file = None if file is None else Path(file)
        self.values: dict[int, float] = {}
        self.records: dict[int, Record] = {}
        self._real: Collected | None = None
        self._labelled = False

    @property
    def name(self) -> str:
        """Name under which the value is logged, from the start of the run on."""
        return f"fd@{self.n}/{self.extractor.name}/{self.ema}"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the average, and show the extractor two blank samples: what does not fit is refused now, not at the end.

        Raises:
            RunError: If there is no such average.
            ValueError: Of the extractor, if the images are not of its kind.
        """
        if isinstance(pl_module, DiffusionModule):
            self.ema = chosen(pl_module, self.ema)
        self.extractor(as_stored(torch.zeros(2, *self.generation.shape)))

    def on_step(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Measure if due."""
        if due(module, self.every_images):
            self.measure(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the end, unless it was just measured or nothing was trained.

        A run that a signal ends is not at its end, and has no time.
        """
        preempted = was_preempted(trainer.callbacks)  # type: ignore[attr-defined]
        if isinstance(pl_module, DiffusionModule) and pl_module.stepped and not preempted:
            self.measure(trainer, pl_module)

    def measure(self, trainer: pl.Trainer, module: DiffusionModule) -> float:
        """Sample, compare and log; every process must call this.

        Returns:
            The distance; NaN on all processes but the first.
        """
        if module.images_seen not in self.values:
            module.guard.flush()
            with paused(module), torch.no_grad():
                fake = self._generated(trainer, module)
                distance = math.nan
                if trainer.is_global_zero:
                    distance = self._judge(module, fake, self._reference(trainer))
            self.values[module.images_seen] = distance
            log_metrics(trainer.loggers, {self.name: distance}, module.images_seen)
        return self.values[module.images_seen]

    def _judge(self, module: DiffusionModule, fake: Collected, real: Collected) -> float:
        """Compare, and keep the record."""
        protocol = Protocol(
            name=f"training-{self.n}",
            features=fake.features,
            features_sha256=fake.features_sha256,
            resize=fake.resize,
            quantisation=fake.quantisation,
            reference=self.reference,
            n=self.n,
            averaged=False,
        )
        source = Source(
            seeds=describe_seeds(range(self.seed, self.seed + self.n)),
            ema=chosen(module, self.ema),
            sampler=str(self.generation.sampler),
            grid=f"{len(self.generation.grid) - 1} steps",
            labels=ALL_LABELS if self._labelled else UNKNOWN,
        )
        (found,) = judge(
            {SAMPLES: fake, REFERENCE: real}, measures=[Frechet()], protocol=protocol, source=source
        )
        self.records[module.images_seen] = found
        if self.file is not None:
            told = {"images_seen": module.images_seen, **found.to_dict(), "conditions": found.conditions}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(told) + "\n")
        return found.value

    def _reference(self, trainer: pl.Trainer) -> Collected:
        """The real images as the extractor sees them, computed once."""
        if self._real is None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            images, _ = data.test_images() if self.reference == "test" else data.train_images()
            images = as_stored(torch.as_tensor(images))
            self._real = collect(
                pieces_of(images, None, self.batch_size),
                self.extractor,
                [Moments()],
                n=len(images),
                shape=images.shape[1:],
                name=self.reference,
                sha256=content_hash(images),
                quantised=images.dtype == torch.uint8,
            )
        return self._real

    def _generated(self, trainer: pl.Trainer, module: DiffusionModule) -> Collected:
        """The samples of all processes as the extractor sees them."""
        blank = as_stored(torch.zeros(1, *self.generation.shape))
        # drawn before they are looked at: whatever the extractor is, the network is back in its mode by then
        pieces = list(self._pieces(trainer, module))
        mine = collect(
            pieces,
            self.extractor,
            [Moments()],
            n=self.n,
            shape=self.generation.shape,
            quantised=blank.dtype == torch.uint8,
        )
        # a process without a share still takes part, on the device that the processes talk through
        return mine.all_reduce(lambda x: sum_over_ranks(x.to(module.device)).to(x.device))

    def _pieces(self, trainer: pl.Trainer, module: DiffusionModule) -> Iterator[Piece]:
        mine = share(self.n, trainer)
        num_classes = int(getattr(trainer.datamodule, "num_classes", 0) or 0)  # type: ignore[attr-defined]
        self._labelled = num_classes > 0
        denoiser = pick(module, self.ema)
        with evaluating(denoiser):
            for start in range(0, len(mine), self.batch_size):
                indices = mine[start : start + self.batch_size]
                seeds, labels = [self.seed + i for i in indices], labels_for(indices, num_classes)
                samples = self.generation(
                    denoiser,
                    seeds=seeds,
                    cond=conditions(trainer, seeds, labels, module.device),
                    device=module.device,
                )
                yield torch.tensor(indices), as_stored(samples), None


def as_stored(samples: Tensor) -> Tensor:
    """Return samples as a file would hold them: images `(N, C, H, W)` as bytes, points `(N, D)` as they are."""
    return to_uint8(samples) if samples.ndim == 4 and samples.is_floating_point() else samples
