"""Score a run, an export, or samples that exist already: metrics.json, one row of a table, and the report.

The samples are those of `sample.py`, made by the same code; if the run holds just these already they are taken. The
reference is the test split of the run's data set; beside each distance stands that of as many real training images,
the floor. A value never leaves here without the protocol it was measured under (see `metrics/protocol.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table

from diffusion_lab.app import record
from diffusion_lab.app.build import are_pixels, data_module, instantiate, load_denoiser, plain
from diffusion_lab.app.choices import read_run
from diffusion_lab.app.display import show, shown
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.job import device_of, from_config
from diffusion_lab.app.run import RunFolder
from diffusion_lab.app.sample import default_out, draw, find_done
from diffusion_lab.files import write_atomically
from diffusion_lab.images import visible
from diffusion_lab.metrics.features import FeatureExtractor
from diffusion_lab.metrics.protocol import ALL_LABELS, UNKNOWN, Record, Source
from diffusion_lab.metrics.quality import Real, evaluate_images

CACHE = "statistics"


@dataclass(frozen=True)
class Samples:
    """Samples that exist.

    Attributes:
        images: `(N, C, H, W)` uint8, or points.
        labels: `(N,)`, or None.
        source: Where they come from.
        where: Their folder, or the file.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    source: Source
    where: Path


@dataclass(frozen=True)
class Yardstick:
    """What the samples of one run are measured with.

    Attributes:
        extractor: The features.
        reference: Real images to compare with: the test split.
        reference_labels: Their classes, or None.
        real: Real training images, for the floor.
        real_labels: Their classes, or None.
        device: Where to compute.
    """

    extractor: FeatureExtractor
    reference: torch.Tensor
    reference_labels: torch.Tensor | None
    real: torch.Tensor
    real_labels: torch.Tensor | None
    device: str


@dataclass(frozen=True)
class Scored:
    """What an evaluation came to: the samples' folder or file, and the records, the Fréchet distance first."""

    where: Path
    records: list[Record]


def run(cfg: DictConfig) -> Scored:
    """Score what a composed and checked config asks for.

    Args:
        cfg: The config of `conf/evaluate.yaml`.

    Raises:
        UserError: If the run, the samples or the data are missing or do not fit.
    """
    config = plain(cfg)
    folder = Path(config["run"]).resolve()
    trained = read_run(folder)
    judge = yardstick(trained, config["metrics"], device_of(config["device"]))
    if config["num_samples"] is None and config["samples"] is None:
        config["num_samples"] = len(judge.real)
    samples = _samples(config, folder)
    records = score(samples, judge)
    told = _write(records, config, folder, trained, samples.where)
    show(table([told]))
    for item in records:
        if item.deviations:
            print(f"{item.label}: not by the protocol {item.protocol.name}: {'; '.join(item.deviations)}")
    typed = config["out"] or config["run"]
    print(f"metrics {shown(told['file'], typed)}")
    if config["out"] is None and (folder / "checkpoints").is_dir():
        from diffusion_lab.app.model_card import write_card
        from diffusion_lab.app.report import write_report

        write_card(RunFolder(folder))
        print(f"report  {shown(write_report(RunFolder(folder)), typed)}")
    return Scored(samples.where, records)


def yardstick(trained: Mapping[str, Any], metrics: Mapping[str, Any], device: str) -> Yardstick:
    """Read the real images of a run's data set, and build the extractor.

    Args:
        trained: The run's config.
        metrics: The config of the extractor.
        device: "cpu" or "cuda".

    Raises:
        UserError: If the run was trained on latents.
    """
    if not are_pixels(trained):
        raise UserError(
            "samples of a run on latents are scored as images: decode them (python -m diffusion_lab.data.decode "
            "<samples>) and name a run on the images: evaluate.py run=<that run> samples=<samples>/decoded"
        )
    extractor = instantiate(metrics, "metrics")
    data = data_module(trained)
    reference, reference_labels = data.test_images()
    real, real_labels = data.train_images()
    return Yardstick(extractor, reference, reference_labels, real, real_labels, device)


def score(samples: Samples, judge: Yardstick) -> list[Record]:
    """Measure samples: the Fréchet distance to the test split with its floor, then the accuracy where there is one.

    Raises:
        UserError: If the samples do not fit the data, or are too few.
    """
    labels = samples.labels
    try:
        return evaluate_images(
            samples.images,
            labels if labels is not None and bool((labels >= 0).any()) else None,
            Real(images=judge.reference, labels=judge.reference_labels, name="test"),
            judge.extractor,
            train=Real(images=judge.real, labels=judge.real_labels, name="train"),
            source=samples.source,
            cache=_cache_folder(),
            device=judge.device,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"these samples cannot be scored: {error}") from error


def _cache_folder() -> Path:
    """Where statistics of real images are kept; they are keyed by content, so any place will do."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "diffusion_lab" / CACHE


def _samples(config: Mapping[str, Any], folder: Path) -> Samples:
    """Return the samples that a config names, drawn now where they are not there yet."""
    if config["samples"] is not None:
        given = read_samples(Path(config["samples"]))
        return given if config["num_samples"] is None else _first(given, int(config["num_samples"]))
    loaded = load_denoiser(folder, config["ema"])
    job = from_config({**config, "run": str(folder)}, loaded)
    earlier, out = find_done(job, folder), default_out(folder, job, loaded)
    if earlier is not None and record.read(earlier / "record.json")["num_samples"] == job.num_samples:
        print(f"scoring the samples in {earlier}")
        return read_samples(earlier)
    command = record.command("evaluate", config.get("overrides") or [])
    draw(job, loaded, out, devices=int(config["devices"]), command=command, earlier=earlier)
    return read_samples(out)


def _first(samples: Samples, n: int) -> Samples:
    """Return the first `n` samples."""
    if n > len(samples.images):
        raise UserError(f"num_samples={n}: there are {len(samples.images)} samples in {samples.where}")
    labels = None if samples.labels is None else samples.labels[:n]
    return replace(samples, images=samples.images[:n], labels=labels)


def read_samples(path: Path, *, latents: bool = False) -> Samples:
    """Read samples that exist.

    Args:
        path: A folder of sample.py, or an .npz with `images` and perhaps `labels`.
        latents: Whether latents are taken too, as something to be looked at: to score them would mean nothing.

    Raises:
        UserError: If there are none, or they are not stored as sample.py stores them.
    """
    file = path / "samples.npz" if path.is_dir() else path
    if not file.is_file():
        unfinished = " (an unfinished job is there)" if (path / "parts").is_dir() else ""
        raise UserError(f"samples={path}: no samples.npz there{unfinished}")
    try:
        with np.load(file, allow_pickle=False) as stored:
            images = torch.from_numpy(stored["images"])
            labels = torch.from_numpy(stored["labels"]).to(torch.int64) if "labels" in stored else None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{file}: an .npz with an array `images` is needed: {error}") from error
    told = record.read(file.parent / "record.json")
    if images.ndim == 4 and images.is_floating_point() and latents:
        images = visible(images)
    elif images.ndim == 4:
        if images.dtype != torch.uint8:
            hint = "; latents are decoded first: python -m diffusion_lab.data.decode" if told else ""
            raise UserError(
                f"{file}: images must be uint8, these are {str(images.dtype).removeprefix('torch.')}{hint}"
            )
        # channels last, as everybody stores images
        images = images.permute(0, 3, 1, 2).contiguous()
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{file}: {len(images)} images have {len(labels)} labels")
    return Samples(images, labels, _source(told), path)


def _source(told: Mapping[str, Any]) -> Source:
    if "weights" not in told:
        return Source()
    return Source(
        seeds=f"{told['seed']} (samples 0..{told['num_samples'] - 1})",
        ema=str(told["weights"]["ema"]),
        sampler=str(told["sampler"]),
        grid=str(told["grid"]),
        guidance=" + ".join([str(told["guidance"]), *told.get("modifiers", [])]),
        nfe=told["nfe"],
        labels=_labels(told),
    )


def _labels(told: Mapping[str, Any]) -> str:
    """Return which classes were drawn, from the record of samples."""
    settings = told.get("settings") or {}
    count, labels = int(settings.get("num_classes") or 0), settings.get("labels")
    if count == 0:
        return UNKNOWN
    return ALL_LABELS if labels is None or set(labels) == set(range(count)) else str(labels)


def _write(
    records: Sequence[Record],
    config: Mapping[str, Any],
    folder: Path,
    trained: Mapping[str, Any],
    where: Path,
) -> dict[str, Any]:
    """Append this evaluation to metrics.json, in place of an equal earlier one."""
    out = Path(config["out"]) if config["out"] else folder
    file = out if out.suffix == ".json" else out / "metrics.json"
    told = record.read(where / "record.json") if where.is_dir() else {}
    evaluation = {
        "created": record.now(),
        "run": f"{trained.get('name')}/{trained.get('run_id')}",
        "images_seen": (told.get("weights") or {}).get("images_seen"),
        "samples": str(where),
        "command": record.command("evaluate", config.get("overrides") or []),
        "records": [
            {**item.to_dict(), "shown": item.shown(), "conditions": item.conditions} for item in records
        ],
        "versions": record.versions(),
        "git": record.git_state(),
    }
    earlier = record.read_evaluations(file)
    key = _what(evaluation)
    kept = [item for item in earlier if _what(item) != key]
    write_atomically(file, json.dumps({"evaluations": [*kept, evaluation]}, indent=2, default=str) + "\n")
    return {**evaluation, "file": str(file)}


def _what(evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was measured, on what: an evaluation made again replaces its predecessor."""
    measured = [(item.get("label"), item.get("conditions")) for item in evaluation.get("records", [])]
    return evaluation.get("images_seen"), evaluation.get("samples"), str(measured)


def table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """Lay evaluations out, one a row: distances with their floor beside them, accuracies with their ceiling."""
    labels = list(
        dict.fromkeys(item["label"] for evaluation in evaluations for item in evaluation["records"])
    )
    out = Table(box=None, pad_edge=False, header_style="dim")
    out.add_column("run", overflow="fold")
    for label in labels:
        out.add_column(label, justify="right")
        out.add_column(
            f"real {'floor' if label[:2] in ('FD', 'FI') else 'test'}", justify="right", style="dim"
        )
    for name in ("weights", "sampler", "NFE"):
        out.add_column(name, justify="right" if name == "NFE" else "left", overflow="fold")
    for evaluation in evaluations:
        by_label = {item["label"]: item for item in evaluation["records"]}
        cells = [str(evaluation["run"])]
        for label in labels:
            item = by_label.get(label)
            cells += [_cell(item, "value"), _cell(item, "real")]
        source = evaluation["records"][0]["source"]
        nfe = "?" if source["nfe"] is None else str(source["nfe"])
        out.add_row(*cells, source["ema"], str(source["sampler"]).removesuffix("()"), nfe)
    return out


def _cell(item: Mapping[str, Any] | None, key: str) -> str:
    if item is None or item.get(key) is None:
        return "-"
    return f"{100 * item[key]:.2f} %" if item["metric"] == "accuracy" else f"{item[key]:.4g}"
