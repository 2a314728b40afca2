r"""How good is a set of images? One pass over their features, and a record for every number.

    samples --extractor--> features --GaussianStats--> Fréchet distance to the reference     real: that of train images
                       \-> logits   --argmax--------> share recognised as the class asked for   real: the reference's

Both distances, of samples and of real training images, are measured against the same reference at the same n, because
the distance is biased by n: the printed pair is comparable, and the second is the floor.

`evaluate` takes a stream of batches and holds one matrix of the feature dimension, whatever n; with `reduce` every
process brings its share. `evaluate_images` is the same for tensors in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_lab.images import QUANTISATION
from diffusion_lab.metrics.features import Classifier, FeatureExtractor
from diffusion_lab.metrics.frechet import frechet_from_stats
from diffusion_lab.metrics.protocol import Protocol, Record, Source, standard_protocol
from diffusion_lab.metrics.reference import Reference, reference_statistics
from diffusion_lab.metrics.stats import GaussianStats, Reduce

UNQUANTISED = "none (floats)"


@torch.no_grad()
def evaluate(
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    extractor: FeatureExtractor,
    reference: Reference,
    real: Reference | None = None,
    protocol: Protocol | None = None,
    source: Source | None = None,
    reduce: Reduce | None = None,
    device: torch.device | str = "cpu",
) -> list[Record]:
    """Judge a stream of images in one pass.

    Args:
        batches: Pairs of images `(N, C, H, W)` uint8 and the labels `(N,)` asked for, or None; a label below 0 asks for
            nothing and is not judged.
        extractor: The features, on `device`.
        reference: Real images to compare with.
        real: Other real images, for the floor; as many as there are samples.
        protocol: Conditions to fulfil; None takes `standard_protocol`.
        source: Where the images came from.
        reduce: Sums a float64 tensor over all processes, each of which calls this with its share; None for one process.
        device: Where the extractor is.

    Returns:
        The record of the Fréchet distance, then that of the accuracy where there are labels and a classifier.

    Raises:
        ValueError: If images and reference differ in shape, the reference was made with other features, or there are
            fewer than two images.
    """
    for other in (reference, *([real] if real is not None else [])):
        if (other.features, other.features_sha256) != (extractor.name, extractor.sha256):
            raise ValueError(
                f"statistics of {other.name} were made with {other.features} {other.features_sha256[:8]}, "
                f"not with {extractor.name} {extractor.sha256[:8]}"
            )
        if other.shape != reference.shape:
            raise ValueError(f"{other.name} has images {other.shape}, {reference.name} {reference.shape}")
    judge = extractor if isinstance(extractor, Classifier) else None
    stats = GaussianStats(dim=extractor.dim if extractor.dim is not None else reference.stats.dim)
    correct = judged = 0
    quantised = True
    for images, labels in batches:
        if tuple(images.shape[1:]) != reference.shape:
            raise ValueError(
                f"images {tuple(images.shape[1:])} cannot be compared with {reference.shape} of {reference.name}"
            )
        quantised = quantised and images.dtype == torch.uint8
        if judge is not None and labels is not None:
            features, logits = judge.features_and_logits(images.to(device))
            asked = labels.to(logits.device) >= 0
            correct += int(((logits.argmax(dim=1) == labels.to(logits.device)) & asked).sum())
            judged += int(asked.sum())
        else:
            features = extractor(images.to(device))
        stats.update(features)
    if reduce is not None:
        stats = stats.all_reduce(reduce)
        counts = reduce(torch.tensor([correct, judged], dtype=torch.float64, device=stats.mean.device))
        correct, judged = (round(count) for count in counts.tolist())
    if stats.n < 2:
        raise ValueError(f"a distance needs at least two images, there are {stats.n}")

    quantisation = QUANTISATION if quantised else UNQUANTISED
    if protocol is None:
        protocol = standard_protocol(
            features=extractor.name,
            features_sha256=extractor.sha256,
            resize=extractor.resize,
            quantisation=quantisation,
            train_n=real.n if real is not None else None,
        )

    def record(metric: str, value: float, n: int, real_value: float | None, real_n: int | None) -> Record:
        return Record(
            metric=metric,
            value=value,
            real=real_value,
            real_n=real_n,
            protocol=protocol,
            features=extractor.name,
            features_sha256=extractor.sha256,
            resize=extractor.resize,
            quantisation=quantisation,
            n=n,
            reference=reference.name,
            reference_sha256=reference.sha256,
            reference_n=reference.n,
            source=source if source is not None else Source(),
        )

    floor = frechet_from_stats(real.stats, reference.stats) if real is not None else None
    distance = frechet_from_stats(stats, reference.stats)
    records = [record("frechet", distance, stats.n, floor, real.n if real is not None else None)]
    if judged > 0:
        ceiling_n = reference.n if reference.accuracy is not None else None
        records.append(record("accuracy", correct / judged, judged, reference.accuracy, ceiling_n))
    return records


def evaluate_images(
    images: Tensor,
    labels: Tensor | None,
    reference_images: Tensor,
    extractor: FeatureExtractor,
    protocol: Protocol | None = None,
    *,
    reference_labels: Tensor | None = None,
    reference_name: str = "test",
    real_images: Tensor | None = None,
    source: Source | None = None,
    cache: Path | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> list[Record]:
    """Judge images that are all in memory.

    Args:
        images: `(N, C, H, W)` uint8.
        labels: `(N,)` classes asked for, or None.
        reference_images: `(M, C, H, W)` uint8, real.
        extractor: The features; moved to `device`.
        protocol: Conditions to fulfil; None takes the standard one, with n the size of `real_images`.
        reference_labels: `(M,)` true classes, for the accuracy on real images.
        reference_name: What the reference is called.
        real_images: Other real images, in general the train split; as many of them as there are samples, spread evenly,
            give the floor.
        source: Where the images came from.
        cache: Folder for the statistics of real images.
        batch_size: Images in one pass.
        device: Where to compute.

    Returns:
        As `evaluate`.

    Raises:
        ValueError: As `evaluate`, or if images and labels differ in number.
    """
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    if isinstance(extractor, nn.Module):
        extractor.to(device)

    def statistics(of: Tensor, name: str, classes: Tensor | None) -> Reference:
        return reference_statistics(
            of, extractor, name=name, labels=classes, folder=cache, batch_size=batch_size, device=device
        )

    real = None
    if real_images is not None:
        real = statistics(real_images[spread(len(real_images), len(images))], "real", None)
        if protocol is None:
            protocol = standard_protocol(
                features=extractor.name,
                features_sha256=extractor.sha256,
                resize=extractor.resize,
                quantisation=QUANTISATION if images.dtype == torch.uint8 else UNQUANTISED,
                train_n=len(real_images),
            )
    starts = range(0, len(images), batch_size)
    return evaluate(
        (
            (images[i : i + batch_size], None if labels is None else labels[i : i + batch_size])
            for i in starts
        ),
        extractor=extractor,
        reference=statistics(reference_images, reference_name, reference_labels),
        real=real,
        protocol=protocol,
        source=source,
        device=device,
    )


def spread(length: int, n: int) -> Tensor:
    """Return indices of `n` of `length` items at even distances (all of them where there are not so many)."""
    n = min(n, length)
    return torch.arange(n, dtype=torch.int64) * length // max(n, 1)
