"""Samples from a run folder or an export: as many as asked for, each from its own seed, in a folder of their own.

    <out>/grid.png        the first ones; every class is a column
    <out>/samples.npz     images: uint8 (N, H, W, C), or float32 (N, D) or (N, C, H, W) for points or latents;
                          labels: int64 (N,), -1 for none
    <out>/record.json     which weights, which settings, on what machine

A run whose samples start from images of its data set keeps those too, see `sampling/sources.py`.
With `measurement=` and `input=` they are draws from a posterior, see `sampling/posterior.py`. Everything about the
arithmetic is in `sampling/parts.py`. A job that was interrupted goes on where it was; one that is done is found done. A
folder that holds other samples is never written over.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from diffusion_lab.app import launch
from diffusion_lab.app.build import Loaded, load_denoiser, plain
from diffusion_lab.app.display import Ticker, facts_table, show, shown
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.runs import record
from diffusion_lab.app.runs.places import workplace
from diffusion_lab.app.runs.run import digest
from diffusion_lab.app.sampling import parts, posterior, sources
from diffusion_lab.app.sampling.fit import describe_part
from diffusion_lab.app.sampling.inputs import Measured, measured, read_inputs, read_measured
from diffusion_lab.app.sampling.job import STRIDE, Job, from_config, read_job
from diffusion_lab.app.sampling.probe import Probed, check_labels, probe
from diffusion_lab.files import replacing, write_atomically
from diffusion_lab.images import visible

SHOWN_ROWS = 10
SHOWN_COLUMNS = 16
SHOWN = SHOWN_ROWS * SHOWN_COLUMNS
POSTERIOR = "posterior.png"


def run(cfg: DictConfig) -> Path:
    """Draw the samples that a composed and checked config asks for.

    Args:
        cfg: The config of `conf/sample.yaml`.

    Returns:
        The folder with the samples.

    Raises:
        UserError: If the run, the weights or the settings are no good, or `out` holds other samples.
    """
    wanted = posterior.asked(cfg, config_folders(cfg))
    config = plain(cfg)
    folder = Path(config["run"]).resolve()
    loaded = load_denoiser(folder, config["ema"])
    given, sought = _measure(config, loaded) if wanted else (None, None)
    job = from_config({**config, "run": str(folder)}, loaded, sought)
    out = Path(config["out"]) if config["out"] else default_out(folder, job, loaded)
    command = record.command("sample", config.get("overrides") or [])
    typed = config["out"] or config["run"]
    facts = draw(job, loaded, out, devices=int(config["devices"]), command=command, given=given)
    seconds = facts.get("seconds")
    table = [
        (
            "samples",
            f"{job.num_samples:,} from {config['run']}, weights {loaded.ema} at {loaded.images_seen:,} images",
        ),
        ("sampler", f"{facts['sampler']}, {facts['nfe']} evaluations of the network each"),
        ("grid", f"{facts['grid']}"),
        ("guidance", " + ".join([str(facts["guidance"]), *facts.get("modifiers", [])])),
        ("seed", str(job.seed)),
        *(posterior.lines(facts["posterior"]) if job.posterior is not None else []),
        *([sources.line(facts["sources"])] if facts.get("sources") else []),
        (
            "speed",
            f"{facts['made'] / seconds:,.1f} samples/s" if seconds and facts["made"] else "made before",
        ),
        ("picture", shown(_picture(out), typed)),
        ("images", shown(out / "samples.npz", typed)),
    ]
    show(facts_table(table, "sampled"))
    return out


def _picture(out: Path) -> Path:
    """Return the picture that says most."""
    found = [out / name for name in (POSTERIOR, sources.PICTURE) if (out / name).is_file()]
    return found[0] if found else out / "grid.png"


def config_folders(cfg: DictConfig) -> list[Path]:
    """Return the folders that the options of a config come from: ours, and that of --config-dir."""
    from diffusion_lab.app.session import conf_folder

    mark = "--config-dir="
    own = [str(item).removeprefix(mark) for item in cfg.get("overrides") or [] if str(item).startswith(mark)]
    return [conf_folder(), *map(Path, own)]


def _measure(config: dict[str, Any], loaded: Loaded) -> tuple[Measured, dict[str, Any]]:
    """Read and measure the inputs; return them, and what a job says about them. Sets the number of samples."""
    inputs = read_inputs(str(config["input"]), loaded.config, config["shape"])
    config["num_samples"] = len(inputs.images) * int(config["draws"])
    sought = {
        "input": str(config["input"]),
        "inputs": len(inputs.images),
        "sha256": inputs.sha256,
        "draws": int(config["draws"]),
        "measurement": config["measurement"],
    }
    return measured(inputs, config["measurement"], int(config["seed"])), sought


def default_out(folder: Path, job: Job, loaded: Loaded) -> Path:
    """Return the folder for samples when none is named, after the settings: inside the run, see `runs/places.py`."""
    name = (
        f"{loaded.ema}-{loaded.images_seen:010d}-n{job.num_samples}-seed{job.seed}-{digest(job.settings)[:8]}"
    )
    return workplace(folder) / "samples" / name


def describe(generation: Mapping[str, Any], part: str) -> str:
    """Return a part of how samples are made as text: the class and its plain settings, or what it was fitted as."""
    node = generation.get(part) or {}
    return str(node["origin"]) if isinstance(node.get("origin"), str) else describe_part(node)


def find_done(job: Job, folder: Path) -> Path | None:
    """Return the folder of a run that holds most of the samples of a job: those of the same settings."""
    best: tuple[int, Path] | None = None
    for file in sorted((workplace(folder) / "samples").glob("*/record.json")):
        told = record.read(file)
        if told.get("settings_hash") == digest(job.settings) and (file.parent / "samples.npz").is_file():
            found = int(told["num_samples"]), file.parent
            best = found if best is None or found[0] > best[0] else best
    return best[1] if best else None


def _is_same(told: Mapping[str, Any], job: Job) -> bool:
    return told.get("settings_hash") == digest(job.settings) and told.get("num_samples") == job.num_samples


def draw(
    job: Job,
    loaded: Loaded,
    out: Path,
    *,
    devices: int = 1,
    command: str = "",
    earlier: Path | None = None,
    given: Measured | None = None,
) -> dict[str, Any]:
    """Make the samples of a job, or what is missing of them.

    Args:
        job: What to sample.
        loaded: The denoiser that belongs to it.
        out: The folder; made if it is not there.
        devices: Processes that share the work.
        command: What was asked for, for the record.
        earlier: A folder with the first samples of the same settings, which need not be made again.
        given: Inputs and measurements of a job that samples a posterior.

    Returns:
        What record.json says, and `made`: how many were made now.

    Raises:
        UserError: If `out` holds other samples, or the model would be asked what it was not trained for.
    """
    launch.refuse_others("sampling")
    if (out / "samples.npz").exists():
        told = record.read(out / "record.json")
        if not _is_same(told, job):
            raise UserError(
                f"out={out}: other samples are there already; name another folder, or remove this one"
            )
        print(f"{out} holds these samples already")
        return {**told, "made": 0}
    folder = out / "parts"
    asks = probe(job, loaded, None if given is None else given.y[:1])
    check_labels(job, loaded, asks)
    _check_begun(job, folder)
    if given is not None:
        # what an earlier process measured is what its parts were made from
        given = read_measured(folder) or given
        given.write(folder)
    if earlier is not None and not parts.finished(folder):
        with np.load(earlier / "samples.npz", allow_pickle=False) as stored:
            parts.prefill(job, folder, stored["images"])
    began = time.perf_counter()
    todo = parts.missing(job, folder)
    left = sum(len(part) for part in todo)
    if left < job.num_samples:
        print(f"{job.num_samples - left:,} of {job.num_samples:,} samples are there already")
    job.write(folder / "job.json")
    write_atomically(folder / "plan.json", json.dumps([[part.start, part.stop] for part in todo]))
    ticker = Ticker("sampling", job.num_samples, done=job.num_samples - left, unit="samples")
    try:
        if devices > 1 and todo:
            _in_ranks(job, folder, min(devices, len(todo)), ticker)
        else:
            parts.make(job, loaded, todo, folder, on_part=lambda part: ticker.update(ticker.done + len(part)))
    except ValueError as error:
        # what only shows at the first call: a class that the model does not know, an operator that does not fit
        raise UserError(f"these settings cannot be sampled: {one_line(str(error))}") from error
    finally:
        ticker.close()
    # the seconds are those of what was made now, not of what an earlier job left
    seconds = round(time.perf_counter() - began, 3)
    facts = {**_facts(job, loaded, command, asks), "seconds": seconds, "made": left}
    return _finish(job, loaded, folder, out, facts, given)


def _check_begun(job: Job, folder: Path) -> None:
    """An unfinished job in the folder must be this one, whatever its batch size and number of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        begun = read_job(folder / "job.json")
    except FileNotFoundError:
        return
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'job.json'} is damaged; remove {folder}") from error
    if digest(begun.settings) != digest(job.settings):
        raise UserError(
            f"out={folder.parent}: an unfinished job with other settings or weights is there; "
            "name another folder, or remove it"
        )


def _in_ranks(job: Job, folder: Path, devices: int, ticker: Ticker) -> None:
    before = ticker.done

    def watch() -> None:
        have = sum(min(part.stop, job.num_samples) - part.start for part in parts.finished(folder))
        ticker.update(min(job.num_samples, max(before, have)))

    ended = launch.launch(
        ["sample", str(folder / "job.json")], world=devices, logs=folder / "logs", watch=watch
    )
    watch()
    if ended.signal is not None:
        print("interrupted; the same command goes on from here", flush=True)
        if ended.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + ended.signal)


def _labels(job: Job) -> Any:
    if job.labels is None and job.num_classes:
        return "classes in turn" if job.posterior is None else "none"
    return job.labels


def _guidance(job: Job) -> str:
    node = job.generation["guidance"]
    if job.posterior is not None:
        # these stand beside it
        node = {key: value for key, value in node.items() if key not in ("operator", "grid")}
    return describe({"guidance": node}, "guidance")


def _facts(job: Job, loaded: Loaded, command: str, asks: Probed) -> dict[str, Any]:
    return {
        "created": record.now(),
        "app": "sample",
        "command": command,
        "run": job.run,
        "weights": {
            "ema": loaded.ema,
            "images_seen": loaded.images_seen,
            "sha256": loaded.sha256,
            "source": str(loaded.source),
        },
        "num_samples": job.num_samples,
        "seed": job.seed,
        "streams": f"({STRIDE} * seed + index) mod 2^32",
        "labels": _labels(job),
        "sampler": describe(job.generation, "sampler"),
        "grid": describe(job.generation, "grid"),
        "guidance": _guidance(job),
        "modifiers": [
            describe(job.generation["modifiers"], name) for name in job.generation.get("modifiers") or {}
        ],
        "nfe": asks.nfe,
        "settings": job.settings,
        "settings_hash": digest(job.settings),
        "versions": record.versions(),
        "git": record.git_state(),
        "hardware": record.hardware(),
    }


def _finish(
    job: Job, loaded: Loaded, folder: Path, out: Path, facts: Mapping[str, Any], given: Measured | None
) -> dict[str, Any]:
    """Put the parts together; samples.npz comes last, so that it is there only if all is. Returns the record."""
    images = parts.collect(job, folder)
    labels = job.label_list(range(job.num_samples)) or [-1] * job.num_samples
    arrays = {"images": images, "labels": np.asarray(labels, dtype=np.int64)}
    columns, told = job.num_classes, dict(facts)
    if given is not None and job.posterior is not None:
        arrays |= posterior.arrays(job, given)
        columns = job.posterior["draws"]
        told["posterior"] = posterior.numbers(job, given, images)
        posterior.save_picture(job, given, images, out / POSTERIOR)
    if begun := sources.arrays(job, loaded):
        arrays |= begun
        told["sources"] = sources.numbers(images, begun)
        sources.save_picture(images, begun, out / sources.PICTURE)
    save_grid(images, arrays["labels"], columns, out / "grid.png")
    record.write(out / "record.json", told)
    with replacing(out / "samples.npz") as aside, aside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    shutil.rmtree(folder)
    return told


def save_grid(images: np.ndarray, labels: np.ndarray, num_classes: int, path: Path) -> None:
    """Draw the first samples: a grid of images, or the points of data in the plane.

    Args:
        images: As in samples.npz.
        labels: As in samples.npz.
        num_classes: Columns, where the classes come in turn.
        path: The PNG.
    """
    if images.ndim != 4:
        from diffusion_lab.app.report.figures import points_png

        path.write_bytes(points_png([("samples", images, labels)]))
        return
    from diffusion_lab.app.report.figures import tile

    if images.dtype != np.uint8:
        images = visible(torch.from_numpy(images[:SHOWN])).permute(0, 2, 3, 1).numpy()
    columns = num_classes if 1 < num_classes <= SHOWN_COLUMNS else SHOWN_ROWS
    tile(images[: columns * SHOWN_ROWS], columns).save(path)
