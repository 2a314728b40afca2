"""Two processes on one machine (gloo) are one run: same weights, same noise, and they stop together.

Each run costs several seconds, nearly all of it imports, so there are few.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_training import BATCH, everything, fit, make_module, make_scores

SCRIPT = str(Path(__file__).with_name("tiny_training.py"))
TIMEOUT = 120


def start(folder, world, **options):
    """Start the processes as a launcher would, by environment variables."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world):
        env = dict(
            os.environ,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )
        arguments = json.dumps({"folder": str(folder), "devices": world, **options})
        processes.append(
            subprocess.Popen(
                [sys.executable, SCRIPT, arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes):
    """Wait for all; kill what does not end. Return exit codes and outputs."""
    deadline = time.monotonic() + TIMEOUT
    outputs = []
    try:
        for p in processes:
            outputs.append(p.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
    except subprocess.TimeoutExpired:
        pytest.fail("the processes did not end: a deadlock")
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.communicate()
    return [p.returncode for p in processes], outputs


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def still(module):
    # dropout is keyed by rank, so without it one and two processes do the same arithmetic
    module.denoiser.network.layers[2].p = 0.0
    return module


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    module = make_module()
    return everything(*fit(tmp_path_factory.mktemp("alone") / "run", 20 * BATCH, module=still(module)))


def test_two_processes_equal_one_and_one_continues_for_two(tmp_path, alone):
    codes, outputs = finish(
        start(tmp_path, 2, max_images=12 * BATCH, still=True, scores=True, out=str(tmp_path / "out.pt"))
    )
    assert codes == [0, 0], outputs
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    assert two["images_seen"] == 12 * BATCH
    scores = make_scores(tmp_path / "one")
    one = everything(*fit(tmp_path / "one", 12 * BATCH, module=still(make_module()), extra=scores))
    assert_close(two["state"], one)
    # one run folder, one log, with the rows of one process
    ours = (tmp_path / "metrics.csv").read_text().splitlines()
    single = (tmp_path / "one" / "metrics.csv").read_text().splitlines()
    assert ours[0] == single[0] and len(ours) == len(single)
    assert "fd@31/flat/ema" in ours[0]
    for picture in (tmp_path / "one" / "samples").iterdir():
        assert (tmp_path / "samples" / picture.name).stat().st_size > 0
    for a, b in zip(ours[1:], single[1:], strict=True):
        torch.testing.assert_close(
            torch.tensor([float(v or -1) for v in a.split(",")]),
            torch.tensor([float(v or -1) for v in b.split(",")]),
            rtol=1e-4,
            atol=1e-6,
        )
    # the run of two goes on as a run of one
    checkpoint = tmp_path / "checkpoints" / "images-0000000080.ckpt"
    resumed = everything(*fit(tmp_path, 20 * BATCH, resume=checkpoint, module=still(make_module())))
    assert_close(resumed, alone)


@pytest.mark.parametrize(
    "to",
    [
        pytest.param((0, 1), id="all", marks=pytest.mark.slow),
        pytest.param((1,), id="second only", marks=pytest.mark.slow),
        pytest.param((0,), id="first only", marks=pytest.mark.slow),
    ],
)
def test_sigterm_saves_and_ends_well_with_two_processes(tmp_path, to):
    processes = start(tmp_path, 2, max_images=10**9, every=10**8)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    for rank in to:
        processes[rank].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes)
    assert codes == [0, 0], outputs
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert torch.load(checkpoint, weights_only=True)["images_seen"] > 0


@pytest.mark.slow
def test_loss_gone_wrong_on_one_of_two_processes_ends_both(tmp_path):
    codes, outputs = finish(start(tmp_path, 2, max_images=10**6, every=BATCH, spoil=5 * BATCH))
    assert all(codes), codes
    assert all("not finite at step 5" in out for out in outputs), outputs
    newest = max((tmp_path / "checkpoints").iterdir())
    assert newest.name == "images-0000000040.ckpt"
