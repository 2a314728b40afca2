"""A training job from the composed config to the report.

    decide the run folder -> write config.yaml -> build -> fit (here, or in several processes) -> export -> report
    -> table

The config that is trained is the one in the folder: ranks read it from there, and so does a resume. A run that a
signal ended is saved and left as it is; the same command with `resume=auto` goes on with it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion_lab.app import launch
from diffusion_lab.app.assemble import assemble
from diffusion_lab.app.build import plain
from diffusion_lab.app.display import show, summary
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.runs import record, resume
from diffusion_lab.app.runs.run import RunFolder, claimed, discard, identity, point_latest
from diffusion_lab.files import write_atomically
from diffusion_lab.modules.checkpoint_io import images_of


def run(cfg: DictConfig) -> Path:
    """Train what a composed and checked config says.

    Args:
        cfg: The config of `conf/train.yaml`, not resolved, with `name`, `choices` and `overrides` filled in.

    Returns:
        The run folder.

    Raises:
        UserError: If the run cannot start or go on.
        SystemExit: With code 0 if a signal ended it after a checkpoint: what comes after it, a sweep, ends too.
        KeyboardInterrupt: After a Ctrl-C, once the checkpoint is written.
    """
    if launch.started_by_others():
        return _as_one_of_many(cfg)
    config = plain(cfg)
    start = resume.decide(config)
    with claimed(start.folder):
        config = _settle(cfg, start.folder)
        if start.checkpoint is not None and start.images_seen >= config["max_images"]:
            print(
                f"{start.folder.path} is finished: {start.images_seen:,} images seen; only its report is made again"
            )
            _conclude(start.folder, config)
            return start.folder.path
        _open_record(start, config)
        trainer = config["trainer"]
        world = launch.process_count(trainer["devices"], trainer["accelerator"])
        if int(trainer.get("num_nodes") or 1) > 1:
            raise UserError(
                "trainer.num_nodes: several machines are started by torchrun or srun, see docs/runs.md"
            )
        if world > 1:
            _tell_run(start.folder, start.checkpoint)
            _in_ranks(start, world, config["name"])
        else:
            fit(start.folder, start.checkpoint)
        _conclude(start.folder, config)
    return start.folder.path


def _settle(cfg: DictConfig, folder: RunFolder) -> dict[str, Any]:
    """Fill in where the run lives, write the config that will be trained, and let `latest` lead there."""
    with open_dict(cfg):
        cfg.run_id = folder.path.name
        cfg.paths.run = str(folder.path)
        cfg.resume = None
    config = plain(cfg)
    point_latest(folder.path)
    write_atomically(folder.config, OmegaConf.to_yaml(OmegaConf.create(config)))
    return config


def _open_record(start: resume.Start, config: Mapping[str, Any]) -> None:
    teacher = config["method"].get("teacher")
    record.start(
        start.folder.record,
        command=record.command("train", config.get("overrides") or []),
        facts={
            "app": "train",
            "run": f"{config['name']}/{start.folder.path.name}",
            "identity": identity(config),
            "seed": config["seed"],
            **({"teacher": teacher} if teacher else {}),
            "resumed_from": None if start.checkpoint is None else start.checkpoint.name,
        },
    )
    if start.checkpoint is None:
        if (config.get("choices") or {}).get("debug") in (None, "none"):
            _tell_defaults(config)
        if teacher:
            _tell_teacher(teacher)


def _tell_run(folder: RunFolder, checkpoint: Path | None) -> None:
    on = "" if checkpoint is None else f" goes on at {images_of(checkpoint) or 0:,} images"
    print(f"run {folder.path}{on}", flush=True)


def _in_ranks(start: resume.Start, world: int, name: str) -> None:
    words = ["train", str(start.folder.path), *([str(start.checkpoint)] if start.checkpoint else [])]
    try:
        ended = launch.launch(words, world=world, logs=start.folder.logs)
    except BaseException as error:
        found = record.read(start.folder.record)
        never = start.checkpoint is None and record.last_session(found).get("begun") is False
        # a mistake of the user's: his one line says all, so nothing is lost with the logs
        if never and isinstance(error, UserError):
            discard(start.folder, name)
        elif found.get("status") == "running":
            record.finish(start.folder.record, "failed")
        raise
    if record.read(start.folder.record).get("status") in ("preempted", "running"):
        # the ranks were told by us: what told us, only we know
        told = {"signal": ended.signal.name} if ended.signal is not None else None
        record.finish(start.folder.record, "preempted", told)
        _stop(interrupted=ended.signal == signal.SIGINT)


def _tell_defaults(config: Mapping[str, Any]) -> None:
    """Say what a bare command trains: nobody means it for the length it has."""
    given = {word.lstrip("+").partition("=")[0] for word in config.get("overrides") or []}
    choices = config.get("choices") or {}
    if choices.get("experiment") is None and not given & {"experiment", "max_images"}:
        what = f"{choices.get('model')} on {choices.get('dataset')} for {config['max_images']:,} images"
        print(f"no experiment was chosen: the defaults train {what}; try experiment=digits/quickstart")


def _tell_teacher(teacher: Mapping[str, Any]) -> None:
    """Say who teaches, and whether it is still learning itself."""
    status = record.read(RunFolder(Path(teacher["run"])).record).get("status", "finished")
    note = (
        "" if status == "finished" else f": not through with its own training ({status}), taken as it is now"
    )
    print(f"taught by {teacher['run']}, {teacher['ema']}{note}")


def _stop(*, interrupted: bool) -> None:
    if interrupted:
        raise KeyboardInterrupt
    raise SystemExit(0)


def _as_one_of_many(cfg: DictConfig) -> Path:
    """Take part in a job whose processes torchrun or srun started: the first one decides, all read its folder.

    The others never look at the config that they composed themselves.
    """
    if launch.outer_world()[0] != 0:
        word, where, checkpoint = launch.tell_everyone(None)
        if word == "error":
            raise UserError(where)
        folder = RunFolder(Path(where))
        if word == "go":
            fit(folder, checkpoint)
        return folder.path
    with ExitStack() as held:
        try:
            start = resume.decide(plain(cfg))
            held.enter_context(claimed(start.folder))
            config = _settle(cfg, start.folder)
        except Exception as error:
            # they are waiting for an answer
            launch.tell_everyone(("error", one_line(str(error)) or type(error).__name__, None))
            raise
        finished = start.checkpoint is not None and start.images_seen >= config["max_images"]
        launch.tell_everyone(("done" if finished else "go", str(start.folder.path), start.checkpoint))
        if not finished:
            _open_record(start, config)
            fit(start.folder, start.checkpoint)
        _conclude(start.folder, config)
        return start.folder.path


# ---- one process -----------------------------------------------------------------------------------------


@contextmanager
def _gentle_interrupt(pressed: list[int]) -> Iterator[None]:
    """Make the first Ctrl-C a request to save and stop, as SIGTERM is; the second one is the usual end."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # only while training does somebody listen; before and after it there is nothing to save
        if not isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Preemption):
            raise KeyboardInterrupt
        pressed.append(number)
        print("\nstopping after this step; press Ctrl-C again to stop at once", flush=True)
        signal.raise_signal(signal.SIGTERM)

    from diffusion_lab.callbacks import Preemption

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def fit(folder: RunFolder, checkpoint: Path | None) -> None:
    """Train the config of a run folder in this process, which may be one of several.

    The first process closes the record. See `run` for what is raised.
    """
    from diffusion_lab.app.config.choices import read_unchecked
    from diffusion_lab.callbacks import was_preempted, was_pruned
    from diffusion_lab.loggers import close_loggers
    from diffusion_lab.modules.errors import DoesNotFit

    # this very job composed it from the user's command line, so it may name his own classes
    config = read_unchecked(folder.path)
    first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    parts, pressed, ready = None, list[int](), False
    began = time.perf_counter()
    try:
        parts = assemble(config)
        ready = True
        if first:
            # said only now, for what could not be built leaves no folder; of our own ranks, the parent has said it
            if launch.OWN not in os.environ:
                _tell_run(folder, checkpoint)
            for logger in parts.loggers:
                logger.log_hyperparams(config)
        with _gentle_interrupt(pressed):
            try:
                parts.trainer.fit(
                    parts.module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True
                )
            except ValueError as error:
                if getattr(parts.module, "images_seen", 0):
                    raise
                raise DoesNotFit(one_line(str(error))) from error
        status = "preempted" if was_preempted(parts.callbacks) else "finished"
    except BaseException as error:
        begun = ready and not isinstance(error, DoesNotFit)
        if first and not begun and checkpoint is None and launch.OWN not in os.environ:
            discard(folder, config["name"])
        elif first:
            kind = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
            seen = int(getattr(parts.module, "images_seen", 0)) if parts is not None else 0
            told = {"error": str(error) or type(error).__name__, "images_seen": seen, "begun": begun}
            record.finish(folder.record, kind, told)
        raise
    finally:
        if parts is not None:
            close_loggers(parts.loggers)
    seen = int(getattr(parts.module, "images_seen", 0))
    if first:
        facts = {
            "images_seen": seen,
            "fit_seconds": round(time.perf_counter() - began, 3),
            "device": _device(parts.trainer),
            "parameters": sum(p.numel() for p in parts.module.parameters()),
        }
        if status == "preempted" and (received := _received(parts.callbacks)):
            facts["signal"] = received
        if status == "finished" and (reason := was_pruned(parts.callbacks)):
            status, facts["reason"] = "pruned", reason
            print(f"pruned: {reason}", flush=True)
        if status == "finished" and seen < config["max_images"]:
            status, facts["stopped_by"] = "stopped", _limit(parts.trainer)
        record.finish(folder.record, status, facts)
    if status == "preempted":
        if first:
            print(
                f"stopped by a signal at {seen:,} images, saved; resume=auto goes on from there", flush=True
            )
        if launch.OWN not in os.environ:
            _stop(interrupted=bool(pressed))


def _received(callbacks: Sequence[Any]) -> str | None:
    """Return the name of the signal that ended a run, if this process got it."""
    return next((c.received.name for c in callbacks if getattr(c, "received", None) is not None), None)


def _limit(trainer: Any) -> str:
    """Return which of the trainer's own limits ended a run before `max_images`."""
    if trainer.fast_dev_run:
        return "trainer.fast_dev_run"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return "trainer.max_steps"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return "trainer.max_epochs"
    return "the trainer"


def _device(trainer: Any) -> str:
    import torch

    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else record.hardware()["cpu"]
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else str(name)


# ---- after training --------------------------------------------------------------------------------------


def _conclude(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Export the averages, write the report, print the table."""
    from diffusion_lab.app.export.tensors import export_run
    from diffusion_lab.app.report import write_report

    # a run without the checkpoints callback has nothing to export
    exported = export_run(folder, config) if any(folder.checkpoints.glob("*.ckpt")) else []
    report = write_report(folder)
    show(summary(folder, config, exported, report))
