"""The scripts of docs/cluster, with a stand-in for SLURM; and whoever starts the ranks, they train one setting."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
from test_launch_ranks import assert_close

from diffusion_lab.app import launch
from diffusion_lab.app.errors import UserError

CLUSTER = tiny_runs.ROOT / "docs" / "cluster"
TIMEOUT = 180
STILL = [word for word in tiny_runs.TINY if word != "trainer=cpu"] + [
    *tiny_runs.NO_PICTURES,
    "model.dropout=0.0",
]
TWO = ["trainer=ddp", "trainer.accelerator=cpu"]

# starts the tasks of a step, passes signals on, and ends with the worst exit code, as srun does
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = [
    subprocess.Popen(words, env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_ID": "0"}})
    for i in range(int(os.environ["SLURM_NTASKS"]))
]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda got, frame: [task.send_signal(got) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!{python}
import sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def slurm(tmp_path):
    """Variables of a job of two tasks, commands that stand for SLURM's, and the file of what scontrol was told."""
    commands, log = tmp_path / "bin", tmp_path / "scontrol.txt"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text.format(python=sys.executable, log=str(log)))
        (commands / name).chmod(0o755)
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "RANK", "LOCAL_RANK"))
    }
    env |= {
        "PATH": f"{commands}:{env['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(10_000 + os.getpid() % 10_000),
        # what an interactive job is called; Lightning then takes SLURM for absent
        "SLURM_JOB_NAME": "bash",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
    }
    return env, log


def start(script, *words, env):
    return subprocess.Popen(
        ["bash", str(CLUSTER / script), *words], cwd=tiny_runs.ROOT, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process):
    """Wait; kill all that the script has started if it does not end."""
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"did not end: {process.communicate()[0]}")


def runs_in(home):
    return [path for path in home.iterdir() if not path.is_symlink()]


# a program in the place of training, so that the script alone is tested
STUB = """#!{python}
import os, signal, sys, time
rank = os.environ["SLURM_PROCID"]
def stop(number, frame):
    time.sleep(0.3)  # saving
    open(f"{folder}/{{rank}}.txt", "a").write(f"{{signal.Signals(number).name}} ")
    sys.exit({code})
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
open(f"{folder}/{{rank}}.txt", "w").write(" ".join(sys.argv[1:]) + " ")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 0, False), (signal.SIGUSR1, 3, False)],
    ids=["time is up", "cancelled", "failed while saving"],
)
def test_the_batch_script_passes_signals_on_and_queues_itself_again(tmp_path, slurm, number, code, requeued):
    env, log = slurm
    stub = tmp_path / "stub"
    stub.write_text(STUB.format(python=sys.executable, folder=tmp_path, code=code))
    stub.chmod(0o755)
    process = start("slurm.sbatch", "max_images=7", env={**env, "PYTHON": str(stub)})
    files = [tmp_path / f"{rank}.txt" for rank in range(2)]
    tiny_runs.wait_until(lambda: all(f.is_file() and f.read_text() for f in files), process, seconds=20)
    process.send_signal(number)
    out = finish(process)
    assert process.returncode == code, out
    assert [f.read_text() for f in files] == [f"train.py resume=auto max_images=7 {number.name} "] * 2
    assert (log.read_text() if log.exists() else "") == (
        f"requeue {env['SLURM_JOB_ID']}\n" if requeued else ""
    )


def test_sampling_under_torchrun_or_srun_is_one_line(monkeypatch):
    monkeypatch.delenv(launch.OWN, raising=False)
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"^sampling starts its processes itself: give it devices=<number>"):
        launch.refuse_others("sampling")
    monkeypatch.setenv(launch.OWN, "1")
    launch.refuse_others("sampling")


@pytest.mark.slow
def test_a_slurm_job_that_is_stopped_and_queued_again_goes_on_in_its_folder(tmp_path, slurm):
    env, log = slurm
    words = [*STILL, "trainer=cpu", f"paths.runs={tmp_path}"]
    process = start("slurm.sbatch", *words, "max_images=6400", env=env)
    home = tmp_path / "digits" / "quickstart"
    tiny_runs.wait_until(lambda: (home / "latest").exists(), process)
    folder = (home / "latest").resolve()
    tiny_runs.wait_until(lambda: tiny_runs.logged_images(folder) >= 480, process)
    process.send_signal(signal.SIGUSR1)
    out = finish(process)
    assert process.returncode == 0, out
    assert "stopped by a signal" in out and tiny_runs.record_of(folder)["status"] == "preempted"
    assert log.read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
    seen = tiny_runs.images_in(folder)
    assert 480 <= seen < 6400 and runs_in(home) == [folder]
    # SLURM starts the same script with the same words; the end is nearer now, to save time
    again = start("slurm.sbatch", *words, f"max_images={seen + 320}", env=env)
    out = finish(again)
    assert again.returncode == 0 and f"goes on at {seen:,} images" in out, out
    record = tiny_runs.record_of(folder)
    assert record["status"] == "finished" and [s["status"] for s in record["sessions"]] == [
        "preempted",
        "finished",
    ]
    assert "2 x" in record["sessions"][1]["device"]
    assert runs_in(home) == [folder] and log.read_text().count("requeue") == 1
    assert_close(folder, tiny_runs.train(tmp_path / "one", "model.dropout=0.0", max_images=seen + 320), 2e-4)


@pytest.mark.slow
def test_torchrun_trains_sharded_and_one_process_resumes_samples_scores_and_exports(tmp_path, slurm):
    env, _ = slurm
    env = {key: value for key, value in env.items() if not key.startswith("SLURM_")} | {"PER_NODE": "2"}
    words = [*STILL, f"paths.runs={tmp_path}"]
    process = start(
        "torchrun.sh", *words, "trainer=fsdp2", "trainer.accelerator=cpu", "max_images=640", env=env
    )
    out = finish(process)
    assert process.returncode == 0, out
    folder = (tmp_path / "digits" / "quickstart" / "latest").resolve()
    one = tiny_runs.train(tmp_path / "one", "model.dropout=0.0", max_images=640)
    assert_close(folder, one, 2e-4)
    # the same command without torchrun, on one process
    assert tiny_runs.main("train", *words, "trainer=cpu", "resume=auto", "max_images=960") == 0
    assert runs_in(folder.parent) == [folder]
    assert_close(folder, tiny_runs.train(tmp_path / "on", "model.dropout=0.0", max_images=960), 4e-4)
    assert (folder / "export" / "ema.safetensors").is_file()
    # scored by two processes, from samples that they share out
    words = [f"run={folder}", "num_samples=160", "device=cpu", "devices=2", "batch_size=64"]
    assert tiny_runs.main("evaluate", *words, "grid.steps=2") == 0
    drawn = next((folder / "samples").glob("ema-*-n160-*"))
    assert (
        tiny_runs.main(
            "sample",
            f"run={folder / 'export'}",
            "num_samples=160",
            "device=cpu",
            "grid.steps=2",
            f"out={tmp_path / 'alone'}",
        )
        == 0
    )
    a, b = (tiny_runs.images_of(where)[0] for where in (drawn, tmp_path / "alone"))
    assert (a == b).all()


SPY = '''
import json, os

from lightning.pytorch.callbacks import Callback


class Spy(Callback):
    """Writes what this process trains."""

    def __init__(self, *, folder: str) -> None:
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        told = {
            "rank": trainer.global_rank, "world": trainer.world_size, "lr": pl_module.base_learning_rate,
            "seed": pl_module.seed, "data": trainer.datamodule.seed, "run": trainer.default_root_dir,
            "batch": pl_module.global_batch_size, "channels": pl_module.denoiser.network.conv_in.out_channels,
        }
        with open(f"{self.folder}/{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(told) + "\\n")
'''


@pytest.fixture
def spied(tmp_path):
    """Words that let each process tell what it trains, and a function that reads what was told, by rank."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "spying.py").write_text(SPY)
    words = [
        "+callbacks.spy._target_=spying.Spy",
        f"+callbacks.spy.folder={tmp_path}",
        f"paths.runs={tmp_path}",
    ]

    def told():
        lines = [(tmp_path / f"{rank}.jsonl").read_text().splitlines() for rank in range(2)]
        return [[{**json.loads(line), "rank": None} for line in of_rank] for of_rank in lines]

    return [*STILL, "max_images=32", *words], told, {"PYTHONPATH": str(tmp_path / "lib")}


@pytest.mark.slow
def test_every_job_of_a_sweep_trains_one_setting_in_both_processes(spied):
    words, told, env = spied
    process = tiny_runs.start("train.py", *words, *TWO, "optimizer.lr=1e-3,2e-3", "--multirun", env=env)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, (out, err)
    first, second = told()
    assert first == second and [job["lr"] for job in first] == [1e-3, 2e-3]
    assert {job["world"] for job in first} == {2} and len({job["run"] for job in first}) == 2


@pytest.mark.slow
def test_processes_that_were_told_different_things_train_what_the_first_one_was_told(spied):
    # what a sweeper that draws values does to processes that compose on their own
    words, told, env = spied
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = [
        ["optimizer.lr=1e-3", "seed=3", "model.channels=8"],
        [
            "optimizer.lr=7e-1",
            "seed=4",
            "model.channels=16",
            "dataset.seed=9",
            "batch_size=64",
            "max_images=640",
        ],
    ]
    processes = [
        tiny_runs.start(
            "train.py", *words, *TWO, *own, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank, own in enumerate(settings)
    ]
    end = time.monotonic() + TIMEOUT
    try:
        outputs = [process.communicate(timeout=max(1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = told()
    assert first == second
    assert {key: first[0][key] for key in ("lr", "seed", "data", "batch", "channels")} == {
        "lr": 1e-3, "seed": 3, "data": first[0]["data"], "batch": 16, "channels": 8,
    }  # fmt: skip
    assert first[0]["data"] != 9 and len(runs_in(Path(first[0]["run"]).parent)) == 1
