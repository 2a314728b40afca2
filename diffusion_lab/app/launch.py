"""Several processes for one job, started from a file and never from the command line.

Lightning's own way to start the other processes of a job is to run the whole command again. Under Hydra that
composes the config again: in a sweep whose sweeper draws values, the processes of one job then train different
settings, without a warning. So the first process writes the resolved config into the run folder, and starts its
ranks as

    python -m diffusion_lab.app.rank train <run folder> ...

with the usual variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ...). Whoever starts them also looks after them:
signals are passed on, if one fails the others are ended, and if the starter itself is killed they end themselves.

Under `torchrun` or `srun` the processes are there already. Then the first one makes the run folder and tells the
others.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from diffusion_lab.app.errors import UserError

OWN = "DIFFUSION_LAB_PARENT"
GRACE_S = 10.0
POLL_S = 0.05
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Ended:
    """How a group of processes ended: exit codes by rank, and the signal that was passed on, if any."""

    codes: list[int]
    signal: signal.Signals | None


def process_count(devices: Any, accelerator: str = "auto") -> int:
    """Return how many processes one machine needs for a trainer's `devices`.

    Args:
        devices: A number, a list of device indices, -1 or "auto" for all.
        accelerator: "cpu", "gpu", "cuda" or "auto".

    Raises:
        UserError: If `devices` is none of these.
    """
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return max(1, len(devices))
    text = str(devices).strip()
    if text in ("auto", "-1"):
        if accelerator == "cpu":
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if not text.isdigit() or int(text) < 1:
        raise UserError(
            f"trainer.devices={devices}: a number of processes, a list of devices, or auto is needed"
        )
    return int(text)


def started_by_torchrun() -> bool:
    """Whether torchrun, or whoever sets its variables, started this process."""
    return all(key in os.environ for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def started_by_others() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    if OWN in os.environ:
        return False
    if started_by_torchrun():
        return True
    # a batch script without srun has SLURM variables too, but it is alone
    return all(key in os.environ for key in ("SLURM_PROCID", "SLURM_STEP_ID")) and _number("SLURM_NTASKS") > 1


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0


def outer_world() -> tuple[int, int, int]:
    """Return rank, number of processes and processes on each machine, as torchrun or srun set them."""
    if started_by_torchrun():
        world = int(os.environ["WORLD_SIZE"])
        return int(os.environ["RANK"]), world, _number("LOCAL_WORLD_SIZE") or world
    world = _number("SLURM_NTASKS")
    nodes = _number("SLURM_NNODES") or 1
    return _number("SLURM_PROCID"), world, max(1, world // nodes)


def refuse_others(app: str) -> None:
    """Say that an app starts its processes itself, where torchrun or srun has started several.

    Raises:
        UserError: If they have.
    """
    if started_by_others():
        raise UserError(
            f"{app} starts its processes itself: give it devices=<number>, and start it once, without torchrun or srun"
        )


def tell_everyone(value: Any) -> Any:
    """Give every process what the first one passes; used where torchrun or srun started them.

    The process group stays: Lightning takes it over. Its host side is gloo, so nothing waits for a GPU.
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        if not started_by_torchrun():
            _speak_torchrun()
        rank, world, _ = outer_world()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, rank=rank, world_size=world)
    box = [value]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def _speak_torchrun() -> None:
    """Say in torchrun's variables what SLURM says in its own, so that from here on there is one kind of job.

    Lightning's own reading of SLURM refuses `srun -n 4`, is blind in a job that is called "bash", and queues jobs again
    itself. The port is made from the job's number, so that all processes know it.
    """
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    rank, world, local = outer_world()
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=os.environ.get("SLURM_LOCALID", str(rank % local)),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(local),
        GROUP_RANK=os.environ.get("SLURM_NODEID", str(rank // local)),
    )
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(names))
    os.environ.setdefault("MASTER_PORT", str(15_000 + _number("SLURM_JOB_ID") % 10_000))


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the variables that make a process rank `rank` of `world` on this machine."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))
    }
    # each of two processes that take every core is slower than one
    paths = [path for path in (sys.path[0], inherited.get("PYTHONPATH")) if path]
    threads = max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // world)
    return {
        "OMP_NUM_THREADS": str(threads),
        **inherited,
        # what the command's own folder offers for import, they must find too
        "PYTHONPATH": os.pathsep.join(paths),
        OWN: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "NODE_RANK": "0",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def _passing_on(processes: Sequence[subprocess.Popen[bytes]], seen: list[signal.Signals]) -> Iterator[None]:
    """Pass signals on to the processes. The second Ctrl-C ends them at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        again = signal.SIGINT in seen and number == signal.SIGINT
        seen.append(signal.Signals(number))
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def launch(
    arguments: Sequence[str],
    *,
    world: int,
    logs: Path,
    watch: Callable[[], None] | None = None,
) -> Ended:
    """Start `python -m diffusion_lab.app.rank <arguments>` as `world` processes and wait for all of them.

    The first one prints here; the others into `<logs>/rank-<r>.log`. They run in sessions of their own, so that a
    Ctrl-C reaches them once, through us.

    Args:
        arguments: What the ranks are told; the same for all.
        world: Number of processes.
        logs: Folder for what they print and for their errors.
        watch: Called while waiting, about twenty times a second.

    Raises:
        UserError: If a rank failed by a mistake of the user's; its line.
        RuntimeError: If a rank failed otherwise.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank-*.error"):
        old.unlink()
    port, seen = free_port(), list[signal.Signals]()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world):
            own = {**rank_environment(rank, world, port), "DIFFUSION_LAB_LOGS": str(logs)}
            words = [sys.executable, "-m", "diffusion_lab.app.rank", *arguments]
            if rank == 0:
                processes.append(subprocess.Popen(words, env=own, start_new_session=True))
                continue
            with (logs / f"rank-{rank}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        words, env=own, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        with _passing_on(processes, seen):
            _wait(processes, watch)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process in processes]
    _raise_failure(codes, seen, logs)
    return Ended(codes, seen[0] if seen else None)


def _wait(processes: Sequence[subprocess.Popen[bytes]], watch: Callable[[], None] | None) -> None:
    """Wait for all; once one has failed, give the others a while to notice, then end them."""
    failed_at: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes):
            return
        if any(code for code in codes):
            failed_at = time.monotonic() if failed_at is None else failed_at
            if time.monotonic() - failed_at > GRACE_S:
                for process in processes:
                    if process.poll() is None:
                        process.kill()
        if watch is not None:
            watch()
        time.sleep(POLL_S)


def _raise_failure(codes: Sequence[int], seen: Sequence[signal.Signals], logs: Path) -> None:
    lines = [file.read_text().strip() for file in sorted(logs.glob("rank-*.error"))]
    if lines:
        raise UserError(lines[0])
    if seen:
        # killed before it could save: there was nothing to save yet
        codes = [0 if code in (-signal.SIGTERM, -signal.SIGKILL) else code for code in codes]
    for rank, code in enumerate(codes):
        # the one that fell first; those that we ended come from its fall
        if code not in (0, -signal.SIGKILL) or (code and all(other in (0, code) for other in codes)):
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            )
            where = "" if rank == 0 else f"; see {logs / f'rank-{rank}.log'}"
            raise RuntimeError(f"process {rank} of {len(codes)} {how}{where}")


def end_with_parent(poll_s: float = 0.5) -> None:
    """End this process soon after the one that started it is gone, so that no orphan writes into a run folder."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end_with_parent").start()
