"""Runs small enough for a test, on the real digits, through the real command line.

`main` calls the entry point in this process, which saves the seconds that imports cost; `start` starts a process, where
a test is about processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from diffusion_lab.app import cli

ROOT = Path(__file__).parents[2]
BATCH = 16
TINY = [
    "name=digits/quickstart",
    "dataset=digits",
    "model=unet_tiny",
    "weighting=sigmoid",
    "optimizer.lr=2e-3",
    "schedule=cosine",
    "sampler=dpmpp_2m",
    "grid=uniform_u",
    "guidance=none",
    "model.channels=8",
    "model.multipliers=[1,1]",
    "model.attention=[]",
    "model.head_channels=8",
    "model.dropout=0.1",
    f"batch_size={BATCH}",
    "lr_schedule=constant",
    "lr_schedule.warmup_images=100",
    "averages.ema.half_life_images=300",
    "grid.steps=3",
    "callbacks.training_log.every_images=48",
    "callbacks.gradient_norm.every_images=48",
    "callbacks.loss_by_noise_level.every_images=320",
    "callbacks.checkpoints.every_images=160",
    "~callbacks.throughput",
    "trainer=cpu",
]
NO_PICTURES = ["~callbacks.sample_grid"]


def main(app, *arguments):
    """Run an entry point here; return its exit code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cli.main(app, list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    finally:
        torch.set_num_threads(threads)


def train(runs, *arguments, max_images=320, pictures=False):
    """Train a tiny run here; return its folder."""
    words = [
        *TINY,
        *([] if pictures else NO_PICTURES),
        f"paths.runs={runs}",
        f"max_images={max_images}",
        *arguments,
    ]
    assert main("train", *words) == 0
    given = [word.split("=", 1)[1] for word in arguments if word.startswith("run_id=")]
    return runs / "digits" / "quickstart" / (given[0] if given else "latest")


def start(script, *arguments, **options):
    """Start an entry point as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    env = {key: value for key, value in env.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options,
    )  # fmt: skip


def holding(path):
    """Start a process that holds a file as `diffusion_lab.claims` does; whoever calls this ends it."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7 on here')\n"
        "f.flush(); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def images_in(folder):
    """Images behind the newest checkpoint of a run; 0 before the first."""
    names = sorted(path.stem for path in (folder / "checkpoints").glob("images-*.ckpt"))
    return int(names[-1].split("-")[1]) if names else 0


def logged_images(folder):
    """Images seen at the newest row of metrics.csv."""
    try:
        last = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")[0]
    except (OSError, IndexError):
        return 0
    return int(last) if last.isdigit() else 0


def wait_until(condition, process, seconds=120):
    """Wait for something a process does; fail if it ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def kill_at(process, folder, images):
    """SIGKILL a training process as soon as its log has come that far."""
    wait_until(lambda: logged_images(folder) >= images, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def state(folder):
    """Everything that a resume must restore, flattened: weights, averages, optimizer state, sums of the log."""
    from diffusion_lab.modules.checkpoint_io import list_checkpoints, load_checkpoint

    checkpoint = load_checkpoint(list_checkpoints(folder / "checkpoints")[0])
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                walk(f"{prefix}/{index}", inner)
        else:
            flat[prefix] = value

    for key in ("state_dict", "optimizer_states", "callbacks", "images_seen", "training_log"):
        walk(key, checkpoint.get(key, {}))
    return flat


def assert_same(a, b):
    """Two states agree, bitwise."""
    assert a.keys() == b.keys() and len(a) > 50
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def images_of(folder):
    with np.load(folder / "samples.npz") as stored:
        return stored["images"], stored["labels"]


def record_of(folder):
    return json.loads((folder / "record.json").read_text())
