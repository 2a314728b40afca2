"""The end of a sweep of sample.py or evaluate.py: what every job came to, side by side.

    python sample.py run=<folder> sampler=ddim,heun,unipc --multirun    ->    <run>/comparisons/<time>-sample.html

A job becomes a row: the overrides in which it differs from the others, its first samples, its Fréchet distance with
the floor, the evaluations of the network and the seconds. Samples of `sample.py` are scored here, with the metrics
that the run recorded; where that cannot be done the row says why. Rows whose distances may not stand in one table (see
`Record.differences`) are kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text
from torch import Tensor

from diffusion_lab.app.build import data_module
from diffusion_lab.app.config.choices import read_run
from diffusion_lab.app.config.messages import translate
from diffusion_lab.app.display import Ticker, show
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.evaluate import Scored, read_samples
from diffusion_lab.app.runs import record
from diffusion_lab.app.runs.places import workplace
from diffusion_lab.app.sampling.job import device_of
from diffusion_lab.app.scoring.judging import Samples, Yardstick, score, yardstick
from diffusion_lab.app.scoring.sheet import First, Row, Sheet, differing, grouped
from diffusion_lab.app.session import Outcome, Session
from diffusion_lab.data.image_sets import ImageSet
from diffusion_lab.data.stored_images import split_of
from diffusion_lab.files import write_atomically
from diffusion_lab.metrics.protocol import Record

FOLDER = "comparisons"
# kept of every set for its picture
FIRST_IMAGES, FIRST_POINTS = 160, 4000


def finish(session: Session) -> None:
    """Write the page of a sweep, and print its table and its place; nothing where no two jobs can be compared.

    Raises:
        UserError: If the page cannot be written.
    """
    sheet = collect(session.app, session.typed, session.outcomes)
    if sheet is None:
        _numbers(session.outcomes)
        return
    from diffusion_lab.app.report.comparison import write_up
    from diffusion_lab.app.report.comparison_text import table

    runs = session.outcomes[0].config.paths.runs
    folder = (workplace(sheet.runs[0]) if len(sheet.runs) == 1 else Path(runs)) / FOLDER
    text = write_up(sheet)
    try:
        path = _free(folder, f"{datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}-{session.app}")
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"no comparison could be written in {folder}: {error.strerror or error}") from error
    for group in sheet.groups:
        show(table(sheet, group))
    for number, line in enumerate(sheet.footnotes, 1):
        print(f"({number}) {line}")
    print(f"comparison  {path}")


def _numbers(outcomes: Sequence[Outcome]) -> None:
    """Print what the jobs of a sweep came to that judged models and drew nothing: a line a job."""
    told = [outcome for outcome in outcomes if isinstance(outcome.returned, list)]
    if len(told) < 2:
        return
    varied = differing([outcome.overrides for outcome in told])
    keys = list(dict.fromkeys(key for values in varied for key in values))
    out = Table(box=None, pad_edge=False, header_style="dim")
    for name in [*keys, "measure", "value"]:
        out.add_column(Text(name))
    for outcome, values in zip(told, varied, strict=True):
        for item in outcome.returned:
            out.add_row(*(Text(str(text)) for text in [*values.values(), item["label"], item["shown"]]))
    show(out)


def collect(app: str, typed: Sequence[str], outcomes: Sequence[Outcome]) -> Sheet | None:
    """Bring together what the jobs of a sweep came to; None if there are no two of them, one a success.

    Args:
        app: "sample" or "evaluate".
        typed: The arguments of the command line.
        outcomes: Of every job.
    """
    good = [outcome for outcome in outcomes if isinstance(outcome.returned, Path | Scored)]
    bad = [(outcome, outcome.failure) for outcome in outcomes if outcome.failure is not None]
    if not good or len(good) + len(bad) < 2:
        return None
    varied = differing([outcome.overrides for outcome in outcomes])
    of = {id(outcome): values for outcome, values in zip(outcomes, varied, strict=True)}
    judges: dict[Path, Yardstick | str] = {}
    ticker = Ticker("comparing", len(good), unit="jobs")
    rows = []
    try:
        for outcome in good:
            rows.append(_row(outcome, of[id(outcome)], judges))
            ticker.update(len(rows))
    finally:
        ticker.close()
    runs = list(dict.fromkeys(run for outcome in good if (run := _run(outcome.config)) is not None))
    return Sheet(
        app=app,
        command=record.command(app, typed),
        runs=runs,
        names=[_name(run) for run in runs] or ["sets of images"],
        keys=list(dict.fromkeys(key for values in varied for key in values)),
        groups=grouped(rows),
        failures=[(of[id(outcome)], line) for outcome, line in bad],
        real=_real(runs[0], judges) if runs else None,
        device=_device([row.told for row in rows]),
    )


def _row(outcome: Outcome, varied: dict[str, str], judges: dict[Path, Yardstick | str]) -> Row:
    scored = outcome.returned if isinstance(outcome.returned, Scored) else None
    where = scored.where if scored is not None else outcome.returned
    skip = bool(outcome.config.get("skip_corrupt", False))
    samples = read_samples(where, latents=True, skip_corrupt=skip)
    told = record.read(samples.where / "record.json") if samples.where.is_dir() else {}
    records: list[Record] = []
    why: dict[str, str] = {}
    if scored is not None:
        records = scored.records
    elif about := told.get("posterior"):
        # a few draws for some images are no sample of the data
        why["distance"] = (
            f"not scored, draws from a posterior: PSNR {about['psnr_of_mean']:.2f} dB of their mean, "
            f"{about['psnr_of_draws']:.2f} dB of one, residual {about['residual']:.3g}"
        )
    else:
        try:
            records = _score(samples, outcome.config, judges)
        except Exception as error:  # the samples are there, whatever hinders scoring them
            why["distance"] = f"not scored: {_line(error)}"
    if not told:
        why["nfe"] = why["seconds"] = "the samples do not say how they were made"
    elif told.get("made", 1) == 0:
        why["seconds"] = "taken over from an earlier job"
    return Row(
        varied=varied,
        told=told,
        n=len(samples.images),
        first=_first(samples.images, samples.images.labels),
        distance=next((item for item in records if item.metric == "frechet"), None),
        others=tuple(item for item in records if item.metric != "frechet"),
        why=why,
    )


def _score(samples: Samples, config: DictConfig, judges: dict[Path, Yardstick | str]) -> list[Record]:
    """Score as `evaluate.py` does; data and extractor of a run are read once, and so is what hinders that."""
    run = _run(config)
    assert run is not None, "samples of sample.py are those of a run"
    if run not in judges:
        try:
            trained = read_run(run)
            if not isinstance(trained.get("metrics"), dict):
                raise UserError("the run recorded no metrics")
            judges[run] = yardstick(trained, trained["metrics"], device_of(config.device))
        except Exception as error:
            judges[run] = _line(error)
    judge = judges[run]
    if isinstance(judge, str):
        raise UserError(judge)
    return score(samples, judge)


def _line(error: Exception) -> str:
    return translate(error, [], [], list) or one_line(f"{type(error).__name__}: {error}")


def _run(config: DictConfig) -> Path | None:
    """Return the run that a job was about; None for two sets against each other."""
    return None if config.run is None else Path(config.run).resolve()


def _name(run: Path) -> str:
    trained = read_run(run)
    return f"{trained.get('name', 'run')}/{trained.get('run_id') or run.name}"


def _first(images: ImageSet, labels: Tensor | None, chosen: Sequence[int] | None = None) -> First:
    """Return the first images of a set, or of those chosen, with channels last, as they are drawn."""
    count = FIRST_IMAGES if len(images.shape) == 3 else FIRST_POINTS
    rows = torch.arange(len(images)) if chosen is None else torch.tensor(list(chosen), dtype=torch.int64)
    rows = rows[:count]
    shown = images.read(rows)
    known = labels[rows] if labels is not None else torch.full((len(rows),), -1)
    return First((shown.permute(0, 2, 3, 1) if shown.ndim == 4 else shown).numpy(), known.numpy())


def _real(run: Path, judges: Mapping[Path, Yardstick | str]) -> First | None:
    """Return real training images such that their classes come in turn; None where the data cannot be read."""
    from diffusion_lab.app.report.build import by_class

    judge = next((judge for judge in judges.values() if isinstance(judge, Yardstick)), None)
    try:
        real = judge.real if judge is not None else None
        images = real if real is not None else split_of(data_module(read_run(run)), "train")
        labels = images.labels
    except Exception:  # a sheet without real images is still a sheet
        return None
    if len(images.shape) != 3:
        return _first(images, labels)
    classes = 0 if labels is None else int(labels.max()) + 1
    known = None if labels is None else labels.numpy()
    return _first(images, labels, by_class(known, len(images), classes if classes <= 16 else 0))


def _device(told: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what all samples were drawn on; None if that is not one machine, or not known."""
    found = set()
    for item in told:
        hardware, settings = item.get("hardware") or {}, item.get("settings") or {}
        gpus = hardware.get("gpus") if settings.get("device") == "cuda" else None
        found.add(gpus[0] if gpus else f"{hardware.get('cpu')}, {hardware.get('cores')} cores")
    return found.pop() if len(found) == 1 and all("hardware" in item for item in told) else None


def _free(folder: Path, stem: str) -> Path:
    """Return a file that is not there yet: two sweeps may end in the same second."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (stem if k == 1 else f"{stem}-{k}" for k in range(1, 10_000))
    return next(path for name in names if not (path := folder / f"{name}.html").exists())
