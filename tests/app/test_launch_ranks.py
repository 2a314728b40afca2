"""Several processes: counted, started from the resolved config, looked after; and two reach what one reaches."""

import os
import signal
import sys
import time

import pytest
import tiny_runs
import torch

from diffusion_lab.app import launch
from diffusion_lab.app.errors import UserError

LONG = 6400


@pytest.mark.parametrize(
    ("devices", "accelerator", "count"),
    [
        (1, "cpu", 1),
        (3, "cpu", 3),
        ("2", "auto", 2),
        ([0, 2], "gpu", 2),
        ("0,1", "gpu", 2),
        ("auto", "cpu", 1),
        (-1, "cpu", 1),
    ],
)
def test_devices_are_counted_as_lightning_counts_them(devices, accelerator, count):
    assert launch.process_count(devices, accelerator) == count


def test_nonsense_devices_are_one_line():
    with pytest.raises(UserError, match=r"^trainer.devices=many: "):
        launch.process_count("many")


def test_who_started_this_process(monkeypatch):
    for key in list(os.environ):
        if key.startswith(("SLURM_", "LOCAL_", "RANK", "WORLD_SIZE", launch.OWN)):
            monkeypatch.delenv(key)
    assert not launch.started_by_others()
    # a batch script has these, and is alone
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert not launch.started_by_others()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert launch.started_by_others() and launch.outer_world() == (0, 4, 2)
    monkeypatch.setenv(launch.OWN, "1")
    assert not launch.started_by_others()


def fake_rank(monkeypatch, tmp_path, text):
    """Let the ranks run `text` instead of a job."""
    script = tmp_path / "rank.py"
    script.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + text)
    before = launch.subprocess.Popen
    monkeypatch.setattr(
        launch.subprocess, "Popen", lambda words, **options: before([sys.executable, str(script)], **options)
    )


def test_ranks_know_their_place(monkeypatch, tmp_path):
    keys = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"]
    fake_rank(
        monkeypatch,
        tmp_path,
        f"open(f'{tmp_path}/{{rank}}.txt', 'w').write(' '.join(os.environ[k] for k in {keys}))",
    )
    assert launch.launch([], world=2, logs=tmp_path / "logs").codes == [0, 0]
    told = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(2)]
    assert [t[:5] for t in told] == [["0", "0", "2", "0", "127.0.0.1"], ["1", "1", "2", "0", "127.0.0.1"]]
    assert told[0][5] == told[1][5]


def test_when_one_fails_the_others_are_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    fake_rank(monkeypatch, tmp_path, "sys.exit(3) if rank == 1 else time.sleep(600)")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"process 1 of 2 failed with exit code 3; see .*rank-1\.log"):
        launch.launch([], world=2, logs=tmp_path / "logs")
    assert time.monotonic() - start < 20


def test_a_mistake_of_the_users_in_any_rank_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    fake_rank(
        monkeypatch, tmp_path,
        "logs = os.environ['DIFFUSION_LAB_LOGS']\n"
        "if rank == 1:\n    open(f'{logs}/rank-1.error', 'w').write('a broken image\\n'); sys.exit(2)\n"
        "time.sleep(600)",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^a broken image$"):
        launch.launch([], world=2, logs=tmp_path / "logs")


def test_signals_are_passed_on(monkeypatch, tmp_path):
    fake_rank(
        monkeypatch, tmp_path,
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"open(f'{tmp_path}/ready-{{rank}}', 'w')\ntime.sleep(600)",
    )  # fmt: skip

    def watch():
        if all((tmp_path / f"ready-{rank}").exists() for rank in range(2)):
            signal.raise_signal(signal.SIGINT)

    ended = launch.launch([], world=2, logs=tmp_path / "logs", watch=watch)
    assert ended.codes == [0, 0] and ended.signal == signal.SIGINT


def test_an_orphan_ends_itself(tmp_path):
    # parent -> middle -> orphan: the middle one is killed, the orphan must notice
    orphan = (
        "from diffusion_lab.app.launch import end_with_parent; import time\n"
        "end_with_parent(0.05); print('up', flush=True); time.sleep(600)"
    )
    middle = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {orphan!r}])\n"
        "print(p.pid, flush=True); p.wait()"
    )
    process = launch.subprocess.Popen(
        [sys.executable, "-c", middle], stdout=launch.subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())
    assert process.stdout.readline().strip() == "up"
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                return
        time.sleep(0.05)
    raise AssertionError("the orphan lives")


@pytest.mark.slow
def test_two_processes_stop_cleanly_reach_one_processs_weights_and_are_resumed_by_one(tmp_path):
    words = [*tiny_runs.TINY, *tiny_runs.NO_PICTURES, "model.dropout=0.0", f"paths.runs={tmp_path}"]
    words.remove("trainer=cpu")
    two = [*words, "trainer=ddp", "trainer.accelerator=cpu", "resume=auto", f"max_images={LONG}"]
    process = tiny_runs.start("train.py", *two)
    home = tmp_path / "digits" / "quickstart"
    tiny_runs.wait_until(lambda: (home / "latest").exists(), process)
    folder = (home / "latest").resolve()
    tiny_runs.wait_until(lambda: tiny_runs.logged_images(folder) >= 480, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    assert "stopped by a signal" in out and tiny_runs.record_of(folder)["status"] == "preempted"
    assert [path for path in home.iterdir() if not path.is_symlink()] == [folder], "one run folder"
    seen = tiny_runs.images_in(folder)
    assert 480 <= seen < LONG

    one = tiny_runs.train(tmp_path / "one", "model.dropout=0.0", max_images=seen)
    assert_close(folder, one, 2e-5)

    # the same command on one process: the same data and noise, no new folder
    done = [*words, "trainer=cpu", "resume=auto", f"max_images={seen + 800}"]
    assert tiny_runs.main("train", *done) == 0
    whole = tiny_runs.train(tmp_path / "whole", "model.dropout=0.0", max_images=seen + 800)
    assert [path for path in home.iterdir() if not path.is_symlink()] == [folder]
    assert_close(folder, whole, 2e-4)


def assert_close(a, b, tolerance):
    """Weights and averages agree to float32's tolerance; they have moved much further than that."""
    first, second = tiny_runs.state(a), tiny_runs.state(b)
    assert first.keys() == second.keys() and first["images_seen"] == second["images_seen"]
    start = {
        key: value
        for key, value in tiny_runs.state(
            tiny_runs.train(b.parents[2] / "start", "model.dropout=0.0", max_images=16)
        ).items()
    }
    moved = 0.0
    for key, value in first.items():
        if isinstance(value, torch.Tensor) and key.startswith(("state_dict", "callbacks")):
            torch.testing.assert_close(value, second[key], atol=tolerance, rtol=1e-3)
            moved = max(moved, float((value - start[key]).abs().max()))
    assert moved > 50 * tolerance
