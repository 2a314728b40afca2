r"""What a measure is: a rule from summaries of image sets to named numbers.

A measure is given up to five sets, each as the collectors that it asked for:

    samples      the images that are judged
    reference    real images to compare with, in general the test split
    real         real images that stand in for samples, as many of them: what they score is the floor, or the ceiling
    train        all images that the model was trained on, for what was copied from them
    held_out     real images that it was not trained on, for the same question

and returns a `Reading` for each number, with that of real images beside it where it makes sense. Adding a measure means
one file here, one in conf/measures and one test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from diffusion_lab.metrics.collect import Collect, Collected
from diffusion_lab.metrics.features import Classifier, FeatureExtractor, offered

SAMPLES, REFERENCE, REAL, TRAIN, HELD_OUT = "samples", "reference", "real", "train", "held_out"


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A kind of number.

    Attributes:
        name: Its key in files, such as "frechet".
        short: What tables call it, `FD`.
        published: What it is called when it comes from the published Inception network, `FID`; "" for the same.
        better: Which way is better.
        percent: Whether it is a share, shown in per cent.
    """

    name: str
    short: str
    published: str = ""
    better: Literal["lower", "higher"]
    percent: bool = False


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A number that was read.

    Attributes:
        quantity: Its kind.
        value: The number.
        n: Number of samples that it is of.
        spread: Its standard deviation over parts or subsets, where the measure has them; else None.
        real: The same number for real images; None if not taken.
        real_n: Number of real images behind `real`.
        against: The part of the set that the samples were compared with, such as `TRAIN`; "" for the reference.
    """

    quantity: Quantity
    value: float
    n: int
    spread: float | None = None
    real: float | None = None
    real_n: int | None = None
    against: str = ""


Sets = Mapping[str, Collected]
"""The sets that there are, by their part in the comparison: `SAMPLES`, `REFERENCE`, `REAL`, `TRAIN`, `HELD_OUT`."""


class Measure(Protocol):
    """A rule from sets of images to numbers; a frozen dataclass with its settings."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def labels(self) -> bool:
        """Whether it needs the classes that the samples were asked for, and an extractor that tells classes."""
        ...

    @property
    def must(self) -> Mapping[str, Sequence[Collect]]:
        """What it needs, by set; without one of these it does not apply."""
        ...

    @property
    def may(self) -> Mapping[str, Sequence[Collect]]:
        """What it uses of sets that may be missing."""
        ...

    def __call__(self, sets: Sets) -> list[Reading]:
        """Return the numbers; nothing if there is nothing to be measured after all.

        Raises:
            ValueError: If the sets are too small.
        """
        ...


def hindrance(
    measure: Measure, extractor: FeatureExtractor, there: Mapping[str, Any], *, labelled: bool
) -> str:
    """Return in words why a measure does not apply; "" if it does.

    Args:
        measure: The measure.
        extractor: The features.
        there: The sets there are, by their part; statistics from a file hold just some summaries, a `Collected`.
        labelled: Whether the samples were asked for by class.
    """
    if measure.labels and not isinstance(extractor, Classifier):
        return f"{extractor.name} tells no classes of the data"
    if measure.labels and not labelled:
        return "the samples have no labels"
    can = offered(extractor)
    for part, wanted in measure.must.items():
        if part not in there:
            return f"there are no {part} images"
        for what in wanted:
            lacking = [output for output in what.wants if output not in can]
            if lacking:
                return f"{extractor.name} has no {' and no '.join(lacking)}"
            held = there[part]
            if isinstance(held, Collected) and what not in held.kept:
                return f"the statistics of the {part} do not hold {what!r}"
    return ""


def applicable(
    measures: Sequence[Measure],
    extractor: FeatureExtractor,
    there: Mapping[str, Any],
    *,
    labelled: bool,
    on_hindrance: Callable[[str, str], None] | None = None,
) -> list[Measure]:
    """Return the measures that apply.

    Args:
        measures: The measures.
        extractor: See `hindrance`.
        there: See `hindrance`.
        labelled: See `hindrance`.
        on_hindrance: Called with name and reason of each of the others.
    """
    found = []
    for measure in measures:
        reason = hindrance(measure, extractor, there, labelled=labelled)
        if not reason:
            found.append(measure)
        elif on_hindrance is not None:
            on_hindrance(measure.name, reason)
    return found


def wanted_of(measures: Sequence[Measure], part: str) -> list[Collect]:
    """Return all that measures need or use of a set."""
    return list(
        dict.fromkeys(
            what
            for measure in measures
            for needs in (measure.must, measure.may)
            for what in needs.get(part, ())
        )
    )
