"""FFHQ and CelebA: faces, without labels, prepared as the papers that publish scores on them do.

    <root>/**/00000.png ... 69999.png                         FFHQ, 1024x1024 or thumbnails; one Lanczos resizing (EDM)
    <root>/img_align_celeba/000001.jpg ... 202599.jpg         CelebA, 178x218; a box at the face, then bilinear (DDIM)
    <root>/list_eval_partition.txt                            CelebA's own split

Either folder may hold shards instead (`python -m diffusion_lab.data.convert <root> <out> --no-labels`).

Sources:
    Karras, Laine & Aila, "A Style-Based Generator Architecture for Generative Adversarial Networks", 2019 (FFHQ).
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022 (its preparation).
    Liu, Luo, Wang & Tang, "Deep Learning Face Attributes in the Wild", 2015 (CelebA).
    Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021 (its box; score-SDE cuts the middle 140 pixels).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion_lab.data.errors import DataError
from diffusion_lab.data.image_folder import ImageFolder, Pictures
from diffusion_lab.data.loader import Source
from diffusion_lab.data.pictures import Preparation, Resize
from diffusion_lab.data.shards.paths import has_shards


class FFHQ(ImageFolder):
    """FFHQ: 70,000 faces.

    Args:
        root: Folder with the pictures, or shards.
        shape: `(3, size, size)`.
        test_from: Number of the first picture for testing, 60000 in FFHQ's own split; None trains and tests on all
            70,000, as published scores do. Shards have the splits that they were made with, or every tenth.
        resize: "adm", "bilinear", "bicubic" or "lanczos".
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.
        flip: See `DataModule`.
    """

    def __init__(
        self,
        *,
        root: str,
        shape: Sequence[int],
        test_from: int | None = None,
        resize: Resize = "lanczos",
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(
            root=root,
            shape=shape,
            num_classes=0,
            how_to_get="get images1024x1024 of github.com/NVlabs/ffhq-dataset, and set dataset.root to it",
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            flip=flip,
        )
        self.preparation = Preparation(size=self.shape[1], channels=self.shape[0], resize=resize)
        self.test_from, self.name = test_from, "ffhq"

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        if has_shards(self.root):
            return self.shards("all" if self.test_from is None else split)
        paths = _numbered(self, self.root)
        if self.test_from is not None:
            paths = [p for p in paths if (int(p.stem) >= self.test_from) == (split == "test")]
        if not paths:
            raise self.missing(f"{self.root} holds no numbered pictures for the {split} split")
        return Pictures(paths, None, self.preparation)


class CelebA(ImageFolder):
    """CelebA, aligned: 162,770 faces for training; 19,962 for testing.

    Args:
        root: Folder with img_align_celeba and list_eval_partition.txt, or shards.
        shape: `(3, size, size)`.
        box: (left, top, right, bottom) that is cut out; DDIM's by default.
        resize: "adm", "bilinear", "bicubic" or "lanczos".
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.
        flip: See `DataModule`.
    """

    def __init__(
        self,
        *,
        root: str,
        shape: Sequence[int],
        box: Sequence[int] = (25, 57, 153, 185),
        resize: Resize = "bilinear",
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(
            root=root,
            shape=shape,
            num_classes=0,
            how_to_get="get img_align_celeba.zip and list_eval_partition.txt of mmlab.ie.cuhk.edu.hk/projects/CelebA "
            "and unpack them there, or set dataset.root",
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            flip=flip,
        )
        self.preparation = Preparation(size=self.shape[1], channels=self.shape[0], box=box, resize=resize)
        self.name = "celeba"

    def source(self, split: str) -> Source:
        """See `DataModule.source`."""
        if has_shards(self.root):
            return self.shards(split)
        pictures, partition = self.root / "img_align_celeba", self.root / "list_eval_partition.txt"
        for path in (pictures, partition):
            if not path.exists():
                raise self.missing(f"there is no {path}")
        wanted = "2" if split == "test" else "0"
        try:
            rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
            names = [name for name, part in rows if part == wanted and Path(name).name == name]
        except ValueError as error:
            raise DataError(
                f"{partition} is damaged: each line is the name of a picture and 0, 1 or 2"
            ) from error
        there = {path.name for path in pictures.iterdir()}
        gone = [name for name in names if name not in there]
        if gone or not names:
            raise self.missing(
                f"{pictures} lacks {len(gone):,} of {len(names):,} pictures of the {split} split"
            )
        return Pictures([pictures / name for name in names], None, self.preparation)


def _numbered(data: ImageFolder, root: Path) -> list[Path]:
    """Return the pictures below a folder whose names are numbers, in their order."""
    if not root.is_dir():
        raise data.missing(f"there is no folder {root}")
    paths = (p for p in root.rglob("*") if data.wanted(p.relative_to(root)) and p.stem.isdecimal())
    return sorted(paths, key=lambda p: int(p.stem))
