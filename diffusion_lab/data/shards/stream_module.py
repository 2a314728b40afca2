"""Shards at URLs as a data set: the second way, where they do not fit on a disk; see `stream.py` for what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from diffusion_lab.data.base import DataModule
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.loader import Batch, Source
from diffusion_lab.data.order import GlobalBatches
from diffusion_lab.data.pictures import Preparation, Resize
from diffusion_lab.data.shards.paths import expand
from diffusion_lab.data.shards.stream import Decoder, Stream, check_urls, read_through
from diffusion_lab.rng import derive_seed


class ShardStream(DataModule):
    """Samples streamed from tar files, drawn with replacement. A run that is resumed does not repeat exactly.

    Args:
        urls: Training shards: a brace pattern of URLs or paths; several are joined by "::".
        test_urls: Shards for testing, read into memory when first needed; None for no test set.
        allow_pipe: Whether `pipe:<command>` may be run to read a shard.
        shape: Shape of one example; `(1 or 3, size, size)` for pictures.
        num_classes: Number of classes; 0 to read no labels.
        image: Extension of the member that is the example; "auto" finds it.
        label: Extension of the label: "cls", "txt" or "json:<key>".
        box: (left, top, right, bottom) cut out of each picture first; None for all of it.
        resize: "adm", "bilinear", "bicubic" or "lanczos".
        shuffle: Samples that each worker holds back to mix them.
        max_corrupt: Share of the samples that may be unreadable.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`; here the order depends on it.
        flip: See `DataModule`.

    Raises:
        DataError: If a pattern is malformed.
        ValueError: If an argument is out of range.
    """

    name = "shards_stream"

    def __init__(
        self,
        *,
        urls: str,
        test_urls: str | None = None,
        allow_pipe: bool = False,
        shape: Sequence[int],
        num_classes: int,
        image: str = "auto",
        label: str = "cls",
        box: Sequence[int] | None = None,
        resize: Resize = "adm",
        shuffle: int = 2_000,
        max_corrupt: float = 0.01,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip)
        if not 0.0 <= max_corrupt <= 1.0 or shuffle < 0:
            raise ValueError(f"max_corrupt is a share and shuffle a count, got {max_corrupt}, {shuffle}")
        self.urls, self.test_urls = expand(urls), None if test_urls is None else expand(test_urls)
        self.allow_pipe, self.shuffle, self.max_corrupt = allow_pipe, shuffle, max_corrupt
        self.shape, self.num_classes = tuple(shape), num_classes
        square = len(self.shape) == 3 and self.shape[0] in (1, 3) and self.shape[1] == self.shape[2]
        self.decoder = Decoder(
            shape=self.shape,
            num_classes=num_classes,
            preparation=Preparation(size=self.shape[1], channels=self.shape[0], box=box, resize=resize)
            if square
            else None,
            image=image,
            label=label,
        )

    def setup(self, stage: str | None = None) -> None:
        """Check all URLs, so that what is refused or missing is said before anything is trained."""
        check_urls([*self.urls, *(self.test_urls or [])], self.allow_pipe)

    def source(self, split: str) -> Source:
        """Return the test samples, read into memory. There is no such source of training samples.

        Raises:
            DataError: If there are no `test_urls`, or the training samples are asked for.
        """
        if split != "test":
            raise DataError(
                "a stream cannot be read by index, so it gives no whole training set: use dataset=shards"
            )
        if self.test_urls is None:
            raise DataError("the stream has no test samples: set dataset.test_urls")
        check_urls(self.test_urls, self.allow_pipe)
        return read_through(self.test_urls, self.decoder, self.max_corrupt, self.allow_pipe)

    def loader(self, *, start: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> DataLoader[Batch]:
        """Return the endless training loader of one process.

        From another `start` come other draws: the batches are not those of an uninterrupted run, and it says so.
        """
        check_urls(self.urls, self.allow_pipe)
        if start and rank == 0:
            print(
                f"a stream cannot be taken up where it was left: behind {start:,} images it goes on with other draws "
                "(dataset=shards resumes exactly)",
                flush=True,
            )
        # checks that the batch divides among the processes
        GlobalBatches(start=start, batch_size=self.batch_size, rank=rank, world=world, accumulate=accumulate)
        stream = Stream(
            self.urls,
            self.decoder,
            rows=self.batch_size // (world * accumulate),
            seed=derive_seed("stream", self.seed, start, rank),
            shuffle=self.shuffle,
            flip=self.flip,
            max_corrupt=self.max_corrupt,
            allow_pipe=self.allow_pipe,
        )
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # not from the global random state
            generator=torch.Generator(),
        )
