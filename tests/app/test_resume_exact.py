"""A run that is killed and resumed is, bitwise, the run that was not."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import tiny_runs
import torch

LONG = 5600


def words(runs, *more, images=LONG):
    return [*tiny_runs.TINY, *tiny_runs.NO_PICTURES, f"paths.runs={runs}", f"max_images={images}", *more]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tiny_runs.train(tmp_path_factory.mktemp("runs"), max_images=LONG)


def killed_twice_and_resumed(tmp_path, workers, seed):
    """Kill at two random moments, then let it finish; return the folder."""
    arguments = words(tmp_path, "run_id=k", "resume=auto", f"dataset.num_workers={workers}")
    folder = tmp_path / "digits" / "quickstart" / "k"
    moments = random.Random(seed)
    at = moments.randrange(100, 1600)
    for _ in range(2):
        process = tiny_runs.start("train.py", *arguments)
        tiny_runs.kill_at(process, folder, at)
        assert tiny_runs.logged_images(folder) < LONG, "it must be killed before its end"
        assert tiny_runs.record_of(folder)["status"] == "running"
        at += moments.randrange(500, 1500)
    assert tiny_runs.main("train", *arguments) == 0
    return folder


def assert_equal(folder, uninterrupted):
    tiny_runs.assert_same(tiny_runs.state(folder), tiny_runs.state(uninterrupted))
    for name in ("metrics.csv", "loss_by_noise_level.csv"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert len((folder / "metrics.csv").read_text().splitlines()) > LONG // 48


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_uninterrupted_bitwise(tmp_path, uninterrupted):
    folder = killed_twice_and_resumed(tmp_path, workers=0, seed=random.randrange(2**31))
    assert_equal(folder, uninterrupted)
    sessions = [session["status"] for session in tiny_runs.record_of(folder)["sessions"]]
    assert sessions == ["running", "running", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeat", [0, 1])
def test_kill_matrix(tmp_path, uninterrupted, workers, repeat):
    folder = killed_twice_and_resumed(tmp_path, workers, random.randrange(2**31))
    assert_equal(folder, uninterrupted)


@pytest.mark.slow
def test_two_loader_workers_change_nothing(tmp_path, uninterrupted):
    folder = tiny_runs.train(tmp_path, "dataset.num_workers=2", max_images=LONG)
    assert_equal(folder, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(tmp_path, uninterrupted):
    arguments = words(tmp_path, "run_id=k", "resume=auto")
    folder = tmp_path / "digits" / "quickstart" / "k"
    process = tiny_runs.start("train.py", *arguments)
    tiny_runs.wait_until(lambda: tiny_runs.logged_images(folder) >= 300, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert "stopped by a signal" in out and tiny_runs.record_of(folder)["status"] == "preempted"
    seen = tiny_runs.images_in(folder)
    assert 300 <= seen < LONG and tiny_runs.record_of(folder)["sessions"][0]["images_seen"] == seen
    assert tiny_runs.main("train", *arguments) == 0
    assert_equal(folder, uninterrupted)


def test_a_finished_run_says_so_and_only_makes_its_report_again(tmp_path, capsys):
    folder = tiny_runs.train(tmp_path, "run_id=a")
    before = tiny_runs.record_of(folder)
    (folder / "report.html").unlink()
    tiny_runs.train(tmp_path, "run_id=a", "resume=auto")
    assert "is finished: 320 images seen" in capsys.readouterr().out
    assert (folder / "report.html").is_file() and tiny_runs.record_of(folder) == before


def test_auto_starts_anew_when_the_settings_differ(tmp_path, capsys):
    tiny_runs.train(tmp_path, "run_id=a", max_images=160)
    assert tiny_runs.main("train", *words(tmp_path, "run_id=null", "resume=auto", "seed=5", images=160)) == 0
    assert "a new one starts; a has another seed (was 0, now 5)" in capsys.readouterr().out
    assert tiny_runs.images_in(tmp_path / "digits" / "quickstart" / "a") == 160
    assert len([p for p in (tmp_path / "digits" / "quickstart").iterdir() if not p.is_symlink()]) == 2


@pytest.mark.slow
def test_a_run_can_be_made_longer(tmp_path, uninterrupted):
    folder = tiny_runs.train(tmp_path, "run_id=a", max_images=320)
    assert tiny_runs.main("train", *words(tmp_path, f"resume={folder}")) == 0
    assert_equal(folder, uninterrupted)


def test_another_run_is_not_resumed_into_and_the_key_is_named(tmp_path, capsys):
    folder = tiny_runs.train(tmp_path, "run_id=a", max_images=160)
    before = tiny_runs.state(folder)
    assert tiny_runs.main("train", *words(tmp_path, f"resume={folder}", "optimizer.lr=5e-4")) == 2
    assert "optimizer.lr (was 0.002, now 0.0005)" in capsys.readouterr().err
    tiny_runs.assert_same(tiny_runs.state(folder), before)


@pytest.mark.slow
def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, uninterrupted):
    folder = tiny_runs.train(tmp_path, "run_id=a", max_images=640)
    newest = folder / "checkpoints" / "images-0000000640.ckpt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert tiny_runs.main("train", *words(tmp_path, f"resume={folder}")) == 0
    out = capsys.readouterr().out
    assert "images-0000000640.ckpt is" in out and "skipped" in out and "goes on at 480 images" in out
    assert_equal(folder, uninterrupted)


class Code:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.slow
def test_a_checkpoint_that_carries_code_is_refused_on_the_command_line(tmp_path):
    folder = tiny_runs.train(tmp_path, "run_id=a", max_images=160)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    torch.save({"images_seen": 160, "state_dict": Code()}, folder / "checkpoints" / "images-0000000160.ckpt")
    process = tiny_runs.start("sample.py", f"run={folder}", "num_samples=2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "code ran" not in out + err
    assert err.startswith("error: ") and err.count("\n") == 1 and "refused" in err
    assert tiny_runs.main("train", *words(tmp_path, f"resume={folder}")) == 2


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, capsys, monkeypatch):
    from diffusion_lab.modules import checkpoint_io

    folder = tiny_runs.train(tmp_path, "run_id=a", max_images=320)
    good = tiny_runs.state(folder)

    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "_write", full)
    assert tiny_runs.main("train", *words(tmp_path, f"resume={folder}", images=640)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    tiny_runs.assert_same(tiny_runs.state(folder), good)
    assert tiny_runs.record_of(folder)["status"] == "failed"
    shutil.rmtree(folder)


@pytest.mark.slow
def test_ctrl_c_saves_too_and_ends_with_130(tmp_path):
    folder = tmp_path / "digits" / "quickstart" / "k"
    process = tiny_runs.start("train.py", *words(tmp_path, "run_id=k", images=100_000))
    tiny_runs.wait_until(lambda: tiny_runs.logged_images(folder) >= 100, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted\n" and "press Ctrl-C again" in out
    assert tiny_runs.images_in(folder) >= 100 and tiny_runs.record_of(folder)["status"] == "preempted"


@pytest.mark.slow
def test_latest_leads_to_the_run_that_was_resumed(tmp_path):
    folder = tiny_runs.train(tmp_path, "run_id=a", max_images=160)
    tiny_runs.train(tmp_path, "run_id=b", "seed=5", max_images=160)
    latest = tmp_path / "digits" / "quickstart" / "latest"
    assert latest.resolve().name == "b"
    tiny_runs.train(tmp_path, "resume=auto", max_images=160)
    assert latest.resolve() == folder.resolve() and latest.readlink() == Path("a")


def test_a_limit_of_the_trainer_is_named(tmp_path, capsys):
    folder = tiny_runs.train(tmp_path, "trainer.max_steps=4")
    assert "digits/quickstart: stopped by trainer.max_steps" in capsys.readouterr().out
    told = tiny_runs.record_of(folder)
    assert told["status"] == "stopped" and told["sessions"][0]["stopped_by"] == "trainer.max_steps"
    tiny_runs.train(tmp_path, "resume=auto")
    assert "digits/quickstart: done" in capsys.readouterr().out
