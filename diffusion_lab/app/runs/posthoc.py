"""Averages that nobody tracked, made from a run's snapshots when they are asked for.

    ema=posthoc_0.075              relative width 0.075, as of the newest checkpoint
    ema=posthoc_0.075@44800        as of 44,800 images, a moment at which snapshots were taken

The averages of the newest checkpoint count as snapshots, at full precision: at the end of a run a width that was
tracked gives the tracked average itself. Snapshots beyond that checkpoint are not used, for a run that is resumed
leaves them behind. What is made depends on nothing after its moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffusion_lab.app.errors import UserError
from diffusion_lab.ema import sigma_rel_to_gamma
from diffusion_lab.ema_posthoc import combine, solve_weights
from diffusion_lab.modules.snapshot_io import Snapshot, list_snapshots, read_snapshot

FOLDER = "snapshots"
WORD = "posthoc"
FORM = re.compile(r"posthoc_([0-9.eE+-]+)(?:@([0-9]+))?")
# of the profile, relative: above the first it is said, above the second it is not that profile any more
NOTED, REFUSED = 0.02, 0.2


@dataclass(frozen=True)
class Wanted:
    """What `ema=posthoc_...` asks for.

    Attributes:
        sigma_rel: Width of the profile, relative to the run so far.
        gamma: Its exponent.
        images: Images behind the average; None is as many as there are.
    """

    sigma_rel: float
    gamma: float
    images: int | None

    @property
    def name(self) -> str:
        """The shortest way to ask for it."""
        return f"{WORD}_{self.sigma_rel!r}" + ("" if self.images is None else f"@{self.images}")


def is_one(ema: str | None) -> bool:
    """Whether an average is one to be made from snapshots, by its name."""
    return ema is not None and ema.startswith(WORD)


def parse(ema: str | None) -> Wanted | None:
    """Read the name of an average; None if it is not one to be made from snapshots.

    Raises:
        UserError: If it begins like one and is none, or the width is out of range.
    """
    if ema is None or not is_one(ema):
        return None
    match = FORM.fullmatch(ema)
    try:
        sigma_rel = float(match.group(1)) if match else None
    except ValueError:
        sigma_rel = None
    if match is None or sigma_rel is None:
        raise UserError(
            f"ema={ema}: posthoc_<width> is meant, or posthoc_<width>@<images>, e.g. posthoc_0.075@44800"
        )
    try:
        gamma = sigma_rel_to_gamma(sigma_rel)
    except (ValueError, OverflowError):
        raise UserError(f"ema={ema}: the relative width must be in (0, 0.28]") from None
    return Wanted(sigma_rel, gamma, None if match.group(2) is None else int(match.group(2)))


def make(
    folder: Path, wanted: Wanted, averages: Mapping[str, Mapping[str, Tensor]], images_seen: int
) -> tuple[dict[str, Tensor], int]:
    """Make an average of a run.

    Args:
        folder: The run folder.
        wanted: Which one.
        averages: Those of the newest good checkpoint, as state dicts.
        images_seen: Images behind that checkpoint.

    Returns:
        The state dict, and the images behind it.

    Raises:
        UserError: If the run has no snapshots, none of that moment, or too few for that profile.
    """
    found, damaged = list_snapshots(folder / FOLDER)
    for line in damaged:
        print(line)
    known = [item for item in found if item.images_seen <= images_seen]
    if not known:
        raise UserError(
            f"ema={wanted.name}: {folder} has no snapshots of its averages; "
            "they are made by training with averages=posthoc callbacks=[default,ema_snapshots]"
        )
    # what a checkpoint holds under the name of a snapshot is the same average, later
    profiles = {item.average: item for item in known if item.average in averages}
    moments = sorted({item.images_seen for item in known} | ({images_seen} if profiles else set()))
    time = moments[-1] if wanted.images is None else wanted.images
    if time not in moments:
        near = min(moments, key=lambda moment: abs(moment - time))
        raise UserError(
            f"ema={wanted.name}: there are snapshots of {len(moments)} moments, from {moments[0]:,} to "
            f"{moments[-1]:,} images, and none of {time:,}; the nearest is @{near}"
        )
    ending = profiles if time == images_seen else {}
    used = [item for item in known if item.images_seen <= time]
    used = [item for item in used if not (item.images_seen == time and item.average in ending)]
    times = [item.images_seen for item in used] + [time] * len(ending)
    widths = [item.sigma_rel for item in used] + [item.sigma_rel for item in ending.values()]
    solution = solve_weights(times, [sigma_rel_to_gamma(width) for width in widths], time, wanted.gamma)
    if solution.error > REFUSED:
        raise UserError(
            f"ema={wanted.name}: {len(set(times))} snapshots of width {_listed(widths)} cannot make this profile "
            f"(they miss {100 * solution.error:.0f} % of it): take more, or a width nearer to those"
        )
    if solution.error > NOTED:
        print(f"ema={wanted.name}: its profile is off by {100 * solution.error:.0f} %, for want of snapshots")
    states = _states(used, [averages[name] for name in ending])
    try:
        return combine(states, solution.weights, copied=known[0].buffers), time
    except ValueError as error:
        raise UserError(f"ema={wanted.name}: {folder / FOLDER}: {error}") from error


def _states(
    snapshots: Sequence[Snapshot], last: Sequence[Mapping[str, Tensor]]
) -> Iterator[Mapping[str, Tensor]]:
    for snapshot in snapshots:
        yield read_snapshot(snapshot)
    yield from last


def _listed(widths: Sequence[float]) -> str:
    return " and ".join(f"{width:g}" for width in sorted(set(widths)))
