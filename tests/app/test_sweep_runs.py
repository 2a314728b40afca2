"""Sweeps that train: one that fails in part, killed and resumed ones, every launcher, and a search."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny_runs

from diffusion_lab.app.sweep.journal import Journal

WORDS = ["-m", *tiny_runs.TINY, *tiny_runs.NO_PICTURES, "~callbacks.loss_by_noise_level"]


def start(tmp_path, *words, images=320, **options):
    """Start a sweep as a process of its own, leader of its group."""
    given = [*WORDS, f"paths.runs={tmp_path}", f"max_images={images}", *words]
    return tiny_runs.start("train.py", *given, start_new_session=True, **options)


def finish(process, seconds=420):
    """Wait for a sweep; return its code and what it printed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def sweep_of(tmp_path):
    (folder,) = (tmp_path / "sweeps").glob("[0-9]*")
    return Journal(folder)


def entries(tmp_path):
    folders = list((tmp_path / "sweeps").glob("[0-9]*"))
    return {path.stem: json.loads(path.read_text()) for f in folders for path in f.glob("jobs/[!.]*.json")}


def count(tmp_path, status):
    return sum(entry["status"] == status for entry in entries(tmp_path).values())


def runs(tmp_path):
    return [path.parent for path in tmp_path.glob("digits/quickstart/[0-9]*/record.json")]


def status(run):
    return tiny_runs.record_of(run)["status"]


def sessions(tmp_path):
    return [len(tiny_runs.record_of(run)["sessions"]) for run in runs(tmp_path)]


def test_a_sweep_of_which_one_job_fails(tmp_path, capsys):
    words = [*WORDS, f"paths.runs={tmp_path}", "max_images=32", "callbacks.training_log.every_images=16"]
    assert tiny_runs.main("train", *words, "optimizer.lr=2e-3,-1", "resume=auto") == 1
    out, err = capsys.readouterr()
    assert "job 2 failed: Invalid learning rate: -1" in out and err.endswith("1 of 2 jobs failed\n")
    (run,) = runs(tmp_path)
    config = (run / "config.yaml").read_text()
    assert "app.sweep" not in config and "launcher=" not in config, "how a sweep is run is no part of a run"
    told = {entry["status"]: entry for entry in entries(tmp_path).values()}
    assert told["finished"]["run"] == str(run.resolve()) and told["finished"]["metrics"]["images_seen"] == 32
    assert told["finished"]["objective"] == told["finished"]["metrics"]["loss"]
    assert f"{run.name}/report.html" in (sweep_of(tmp_path).folder / "sweep.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["launcher=basic"], ["launcher=joblib", "launcher.n_jobs=2"]], ids=lambda w: w[0]
)
def test_twelve_jobs_killed_in_the_middle_and_resumed(tmp_path, launcher):
    """The table is complete and no job ran twice."""
    words = ["seed=range(0,6)", "optimizer.lr=1e-3,2e-3", "resume=auto", *launcher]
    process = start(tmp_path, *words)
    tiny_runs.wait_until(
        lambda: count(tmp_path, "finished") >= 4
        and any(tiny_runs.images_in(run) == 160 and status(run) == "running" for run in runs(tmp_path)),
        process, seconds=300,
    )  # fmt: skip
    process.kill()
    process.communicate(timeout=60)
    time.sleep(2.0)  # its workers notice within half a second, in which a job may still finish
    before = {key: entry for key, entry in entries(tmp_path).items() if entry["status"] == "finished"}
    interrupted = count(tmp_path, "running")
    assert 4 <= len(before) < 12 and interrupted >= 1

    code, out, err = finish(start(tmp_path, *words))
    assert code == 0, out + err
    after = entries(tmp_path)
    assert len(after) == 12 and count(tmp_path, "finished") == 12
    assert {key: after[key] for key in before} == before, "what was done was not touched"
    assert out.count("finished already, ") == len(before)
    assert (
        len(runs(tmp_path)) == 12
        and sorted(sessions(tmp_path)) == [1] * (12 - interrupted) + [2] * interrupted
    )
    page = (sweep_of(tmp_path).folder / "sweep.html").read_text()
    assert (
        page.count("<tr data-job=") == 12 and "12 of 12 jobs" in page and page.count('<path class="job') == 12
    )

    code, out, _ = finish(start(tmp_path, *words))
    assert code == 0 and out.count("finished already, ") == 12 and entries(tmp_path) == after


@pytest.mark.slow
def test_ctrl_c_lets_the_jobs_beside_save(tmp_path):
    words = ["seed=0,1,2,3", "resume=auto", "launcher=joblib"]
    process = start(tmp_path, *words, images=100_000)
    tiny_runs.wait_until(
        lambda: len(runs(tmp_path)) == 2 and all(map(tiny_runs.images_in, runs(tmp_path))), process
    )
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process, 120)
    assert code == 130, out + err
    assert out.count("interrupted") + out.count("preempted") >= 2 and out.count("not started") == 2
    for run in runs(tmp_path):
        told = tiny_runs.record_of(run)
        assert (
            told["status"] == "preempted" and tiny_runs.images_in(run) == told["sessions"][-1]["images_seen"]
        )


@pytest.mark.slow
def test_a_process_that_dies_takes_no_job_along(tmp_path):
    process = start(tmp_path, "seed=0,1,2", "launcher=joblib")
    running = []

    def seen():
        running[:] = [e for e in entries(tmp_path).values() if e["status"] == "running"]
        return bool(running)

    tiny_runs.wait_until(seen, process)
    os.kill(int(running[0]["where"].split()[1]), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert count(tmp_path, "finished") == 3 and entries(tmp_path)[running[0]["config"]]["attempts"] == 2


@pytest.mark.slow
def test_a_search_by_two_processes_goes_on(tmp_path):
    space = ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "schedule=cosine,sigmoid"]
    words = [*space, "sweep=optuna", "sweep.startup=2", "launcher=joblib", "resume=auto"]
    code, out, err = finish(start(tmp_path, *words, "sweep.trials=2", images=96))
    assert code == 0, out + err
    code, out, err = finish(start(tmp_path, *words, "sweep.trials=5", images=96))
    assert code == 0, out + err
    study = json.loads((sweep_of(tmp_path).folder / "study.json").read_text())["trials"]
    assert len(study) == 5 and all(trial["state"] == "COMPLETE" for trial in study)
    found = entries(tmp_path)
    assert len({trial["params"]["optimizer.lr"] for trial in study}) == 5 == len(found)
    assert sorted(trial["values"][0] for trial in study) == sorted(
        entry["objective"] for entry in found.values()
    )
    assert "job 5 of 5" in out


@pytest.mark.slow
def test_jobs_sent_as_to_slurm(tmp_path):
    """One of them is warned that its time is over, as SLURM does: it saves, is queued again, and goes on."""
    process = start(tmp_path, "seed=0,1", "optimizer.lr=1e-3,-1", "launcher=submitit_local", images=1600)
    tiny_runs.wait_until(lambda: any(tiny_runs.images_in(run) for run in runs(tmp_path)), process)
    run = next(run for run in runs(tmp_path) if tiny_runs.images_in(run))
    os.kill(tiny_runs.record_of(run)["sessions"][-1]["process"], signal.SIGUSR2)
    code, out, err = finish(process)
    assert code == 1, out + err
    assert count(tmp_path, "finished") == 2 and count(tmp_path, "failed") == 2 and len(runs(tmp_path)) == 2
    assert len(tiny_runs.record_of(run)["sessions"]) == 2
    assert out.count("Invalid learning rate: -1") >= 2 and err.endswith("2 of 4 jobs failed\n")


@pytest.mark.slow
def test_hopeless_runs_are_ended(tmp_path):
    prune = [
        "callbacks=[default,prune]",
        "callbacks.prune.every_images=96",
        "callbacks.prune.warmup_images=96",
    ]
    words = [*prune, "callbacks.prune.min_runs=2", "optimizer.lr=3e-3,2e-3,1e-7,4e-3"]
    code, out, err = finish(start(tmp_path, *words, images=480))
    assert code == 0, out + err
    told = {entry["overrides"][-3]: entry for entry in entries(tmp_path).values()}
    (ended,) = [entry for entry in told.values() if entry["status"] == "pruned"]
    assert "optimizer.lr=1e-07" in ended["overrides"] and ended["metrics"]["images_seen"] < 480
    assert "not among the best 50 % of 2 runs" in ended["reason"]
    assert tiny_runs.record_of(Path(ended["run"]))["status"] == "pruned"
    code, out, err = finish(start(tmp_path, *words, "resume=auto", images=480))
    assert code == 0 and "pruned already" in out
