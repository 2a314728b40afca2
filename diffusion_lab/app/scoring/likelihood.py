"""Bits per dimension of a run's test images: `python evaluate.py run=<run> metrics=bpd|bpd_discrete|bpd_ode`.

    <out or run>/likelihood/<weights>-<images seen>-<hash>/
        settings.json       what every row depends on
        parts/              rows of finished blocks of images, see `likelihood_rows.py`
        images.npz          index, label and bits (or nats) per dimension of every image, and the rows
    metrics.json            the mean with its interval and its protocol

The figure is the same whatever the batch size and the number of threads, an evaluation that was killed goes on where it
was, and one on more images takes over those that are done.

What has a part in it: weights, schedule, labels, and the settings of `metrics`. A schedule that learnt has its ends,
and its curve, in the loss of the run's checkpoint. Sampler, grid, guidance and modifiers have none: a bound of guided
answers would be that of a worse model, and a guided ODE has the density of its samples, not of any data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.app.build import Loaded, are_pixels, data_module, instantiate, load_denoiser, seeded
from diffusion_lab.app.config.choices import top_key, typed
from diffusion_lab.app.display import facts_table, show, shown
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.runs.places import workplace
from diffusion_lab.app.runs.run import RunFolder, digest
from diffusion_lab.app.sampling.job import block_size, device_of
from diffusion_lab.app.scoring import scores
from diffusion_lab.app.scoring.likelihood_rows import (
    Images,
    Job,
    keep_images,
    learned_dequantisation,
    measured_rows,
)
from diffusion_lab.data.base import DataModule
from diffusion_lab.denoisers.bridge import BridgeField
from diffusion_lab.likelihood import BitsPerDimODE, Meter, interval
from diffusion_lab.likelihood.bound import frozen
from diffusion_lab.losses.vlb_terms import Levels
from diffusion_lab.metrics.protocol import RAW
from diffusion_lab.process.schedules import LearnedCurve, Schedule

FOLDER = "likelihood"
# what is about samples, and of which a likelihood has none
NO_PART = (
    "sampler", "grid", "guidance", "modifiers", "generation", "samples", "num_samples", "labels", "compile", "devices",
    "reference", "measures", "protocol", "skip_corrupt",
)  # fmt: skip


def run(config: Mapping[str, Any], folder: Path, trained: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measure the likelihood of a run's test images, tell it, and keep it.

    Args:
        config: The resolved config of `evaluate`.
        folder: The run folder or export.
        trained: Its config.

    Returns:
        The records, one, as in metrics.json.

    Raises:
        UserError: If the run, its schedule, the data or the settings do not fit, or words have no part in this.
    """
    _refuse(config)
    settings = instantiate(config["metrics"], "metrics")
    loaded = load_denoiser(folder, config["ema"])
    if isinstance(loaded.denoiser, BridgeField):
        raise UserError(
            f"run={config['run']}: the field of a bridge is no denoiser, and has no likelihood here"
        )
    images = _images(trained, loaded)
    schedule = frozen(_schedule(config, folder, loaded))
    device = torch.device(device_of(config["device"]))
    denoiser = loaded.denoiser.to(device, _dtype(config))
    total = len(images.x0)
    n = total if config["num_images"] is None else int(config["num_images"])
    if n > total:
        raise UserError(f"num_images={n}: the test set has {total} images")
    told = _settings(config, loaded, images, schedule, device)
    out = _place(config, folder) / FOLDER
    job = Job(
        where=out / f"{loaded.ema}-{loaded.images_seen:010d}-{digest(told)[:8]}",
        settings=told,
        labels=bool(config["metrics"]["labels"]),
        seed=int(config["seed"]),
        device=device,
        dtype=_dtype(config),
        batch_size=int(config["batch_size"]),
    )
    meter = _meter(settings, schedule, images, denoiser, job)
    rows = measured_rows(meter, denoiser, images, n, job)
    item = _record(meter, rows, loaded, images, schedule, config)
    keep_images(job.where, meter, rows, images, n)
    file = _write(item, config, folder, trained, loaded, job.where)
    _tell(item, file, job.where, config)
    return [item]


def _refuse(config: Mapping[str, Any]) -> None:
    """Words that would be without effect are a mistake."""
    for word in typed(config.get("overrides"), NO_PART):
        why = (
            "; the likelihood is of test images: num_images says how many"
            if "samples" in top_key(word)
            else ""
        )
        raise UserError(f"{word}: has no part in metrics=bpd{why}")


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    kinds = {"32-true": torch.float32, "64-true": torch.float64}
    if config["precision"] not in kinds:
        raise UserError(f"precision={config['precision']}: a likelihood needs 32-true or 64-true")
    return kinds[config["precision"]]


def _images(trained: Mapping[str, Any], loaded: Loaded) -> Images:
    data = data_module(trained)
    if isinstance(data, DataModule) and type(data).conditions is not DataModule.conditions:
        raise UserError(
            f"the data set {data.name} conditions on images, of which a likelihood is not implemented here"
        )
    pixels = are_pixels(trained) and len(data.shape) == 3
    conditional = int(trained.get("num_classes") or 0) > 0
    return Images(data, Levels() if pixels else None, conditional)


def _typed_schedule(config: Mapping[str, Any]) -> bool:
    """Whether the command line has a schedule of its own."""
    words = [word for word in config.get("overrides") or () if "@" not in str(word).partition("=")[0]]
    return bool(typed(words, ("schedule",)))


def _schedule(config: Mapping[str, Any], folder: Path, loaded: Loaded) -> Schedule:
    """Return the schedule: the one typed, or the run's own, with what it learnt."""
    with seeded("init", 0):
        schedule: Schedule = instantiate(config["schedule"], "schedule")
    if not isinstance(schedule, nn.Module) or _typed_schedule(config):
        return schedule
    state = _learnt(folder, loaded.images_seen)
    if state:
        schedule.load_state_dict(state)
    elif isinstance(schedule, LearnedCurve):
        raise UserError(
            f"{folder}: its schedule was learnt, and only the run's checkpoints hold what it learnt: name the run "
            "folder, or a schedule: schedule=linear_logsnr schedule.logsnr_min=... schedule.logsnr_max=..."
        )
    return schedule


def _learnt(folder: Path, images_seen: int) -> dict[str, Tensor]:
    """Return the state of the schedule in the loss of a run's newest checkpoint; empty without one.

    Raises:
        UserError: If that checkpoint is of another moment than the weights.
    """
    from diffusion_lab.app.runs.resume import newest_checkpoint
    from diffusion_lab.modules.checkpoint_io import load_checkpoint

    if not (folder / "checkpoints").is_dir():
        return {}
    checkpoint = load_checkpoint(newest_checkpoint(folder))
    state = checkpoint["state_dict"]
    mark = ".schedule."
    found = {
        key.partition(mark)[2]: value
        for key, value in state.items()
        if key.startswith("loss.") and mark in key
    }
    if found and int(checkpoint["images_seen"]) != images_seen:
        raise UserError(
            f"what the schedule learnt is known at {int(checkpoint['images_seen']):,} images, these weights are of "
            f"{images_seen:,}: name weights of that moment, or a schedule: schedule=linear_logsnr"
        )
    return found


def _settings(
    config: Mapping[str, Any], loaded: Loaded, images: Images, schedule: Schedule, device: torch.device
) -> dict[str, Any]:
    """Return all that a row depends on."""
    with torch.no_grad():
        u = torch.linspace(0, 1, 9, dtype=torch.float64)
        levels = [float(level) for level in schedule(u)]
    return {
        "metrics": dict(config["metrics"]),
        "weights": loaded.sha256,
        # what it is named says nothing of what it learnt
        "schedule": {**config["schedule"], "levels": levels},
        "seed": int(config["seed"]),
        "precision": config["precision"],
        "device": device.type,
        "images": images.sha256,
        "block": block_size(images.data.shape, device.type),
    }


def _meter(settings: Any, schedule: Schedule, images: Images, denoiser: Any, job: Job) -> Meter:
    """Return the meter; a dequantisation that must be learned is, or is read where it was."""
    try:
        if not isinstance(settings, BitsPerDimODE) or not settings.needs_learning(images.levels):
            meter: Meter = settings.meter(schedule, images.levels)
            return meter
        assert images.levels is not None
        learned = learned_dequantisation(settings, schedule, images, denoiser, job)
        return settings.meter(schedule, images.levels, learned)
    except ValueError as error:
        raise UserError(f"metrics: {one_line(str(error))}") from error


# ---- what it comes to -----------------------------------------------------------------------------------------


def _record(
    meter: Meter,
    rows: Tensor,
    loaded: Loaded,
    images: Images,
    schedule: Schedule,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    whole, n, total = interval(meter.total(rows)), len(rows), len(images.x0)
    unit = "bits/dim" if images.levels is not None else "nats/dim"
    given = bool(config["metrics"]["labels"]) and images.labels is not None
    deviations = [f"n {n} instead of {total}"] if n < total else []
    if loaded.ema == RAW and (loaded.config.get("averages") or {}):
        deviations.append("raw weights instead of averaged")
    protocol = {
        "test_images": n,
        "test_images_of": total,
        "test_sha256": images.sha256,
        "weights": loaded.ema,
        "weights_sha256": loaded.sha256,
        "images_seen": loaded.images_seen,
        "schedule": str(config["schedule"]["_target_"]).rpartition(".")[2]
        + (", as learnt" if isinstance(schedule, LearnedCurve) and not _typed_schedule(config) else ""),
        **meter.facts,
        "levels": _describe_levels(images),
        "labels": "given" if given else "not given",
        "precision": config["precision"],
        "seed": int(config["seed"]),
    }
    words = (
        f"{unit} of {n} of {total} test images{', drawn at random' if n < total else ''} ({images.sha256[:8]}), "
        f"weights {loaded.ema} {loaded.sha256[:8]} at "
        f"{loaded.images_seen:,} images, {meter.facts['measure']}, {meter.facts['ends']} ({protocol['schedule']}), "
        f"{meter.facts['estimate']}, "
        + (f"dequantisation {protocol['dequantisation']}, " if "dequantisation" in protocol else "")
        + f"{protocol['levels']}, labels {protocol['labels']}, {config['precision']}, seed {config['seed']}"
    )
    low, high = whole.mean - whole.half_width, whole.mean + whole.half_width
    extras = meter.report(rows)
    calls = extras.get("calls")
    at = "" if n == total else f"@{n}"
    return {
        "label": f"{unit}{at} ({meter.name})",
        "metric": unit,
        "value": whole.mean,
        "standard_error": whole.standard_error,
        "interval_95": [low, high],
        "real": None,
        "n": n,
        "terms": {
            name: {"value": part.mean, "standard_error": part.standard_error}
            for name, part in meter.terms(rows).items()
        },
        **extras,
        "protocol": protocol,
        "source": {
            "ema": loaded.ema,
            "sampler": "none: a likelihood",
            "nfe": config["metrics"]["draws"] if calls is None else round(calls),
        },
        "deviations": deviations,
        "shown": f"{whole.mean:.4f} ± {whole.half_width:.4f}",
        "conditions": words + (f" | DEVIATES: {'; '.join(deviations)}" if deviations else ""),
    }


def _describe_levels(images: Images) -> str:
    if images.levels is None:
        return "density of points" if images.x0.ndim == 2 else "density of latents"
    occur = len(torch.unique(images.x0))
    return f"256 levels of [-1, 1] ({occur} occur)"


def _write(
    item: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: Path,
    trained: Mapping[str, Any],
    loaded: Loaded,
    where: Path,
) -> Path:
    """Append the record to metrics.json."""
    made = scores.evaluation(
        run=f"{trained.get('name')}/{trained.get('run_id')}",
        images_seen=loaded.images_seen,
        samples=None,
        config=config,
        records=[item],
    )
    return scores.append(_place(config, folder), {**made, "images": str(where)})


def _place(config: Mapping[str, Any], folder: Path) -> Path:
    return Path(config["out"]) if config["out"] else workplace(folder)


def _tell(item: Mapping[str, Any], file: Path, where: Path, config: Mapping[str, Any]) -> None:
    """Print the figure, its terms and its protocol; write card and report of a run."""
    show(facts_table(list(lines(item)), "likelihood"))
    print(item["conditions"])
    typed = config["out"] or config["run"]
    print(f"images  {shown(where / 'images.npz', typed)}")
    print(f"metrics {shown(file, typed)}")
    folder = RunFolder(workplace(Path(config["run"])))
    if config["out"] is None and folder.checkpoints.is_dir():
        from diffusion_lab.app.export.model_card import write_card
        from diffusion_lab.app.report import write_report

        write_card(folder)
        print(f"report  {shown(write_report(folder), typed)}")


def lines(item: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a record as rows of a table."""
    low, high = item["interval_95"]
    interval_text = "of one image" if math.isnan(low) else f"95 % interval {low:.4f} to {high:.4f}"
    rows = [
        (item["label"], f"{item['value']:.4f}, standard error {item['standard_error']:.4f}, {interval_text}")
    ]
    rows += [
        (f"  {name}", f"{part['value']:.4f} ± {part['standard_error']:.4f}")
        for name, part in item["terms"].items()
    ]
    if "deviation_of_one_draw" in item:
        told = ", ".join(f"{name} {value:.3g}" for name, value in item["deviation_of_one_draw"].items())
        rows.append(("deviation of one draw", f"{told} (levels drawn so)"))
    if "calls" in item:
        rows.append(
            ("calls", f"{item['calls']:.0f} an image; latent mean square {item['latent_mean_square']:.3f}")
        )
    return rows
