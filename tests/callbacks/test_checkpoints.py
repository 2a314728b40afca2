import errno
import os

import pytest
from tiny_training import BATCH, assert_equal, everything, fit

from diffusion_lab.callbacks import Checkpoints, EMACallback
from diffusion_lab.modules import CheckpointNotSaved, RunError, checkpoint_io, find_resumable


def names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_resumes_it(tmp_path, monkeypatch):
    real = checkpoint_io._write
    files = []

    def write(file, data):
        if file.name not in files:
            files.append(file.name)
        if len(files) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    monkeypatch.setattr(checkpoint_io, "_write", write)
    with pytest.raises(CheckpointNotSaved, match="No space left") as error:
        fit(tmp_path / "run", 20 * BATCH)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert names(tmp_path / "run") == ["images-0000000040.ckpt", "images-0000000080.ckpt"]
    path, _ = find_resumable(tmp_path / "run" / "checkpoints")
    resumed = everything(*fit(tmp_path / "run", 20 * BATCH, resume=path))
    assert_equal(resumed, everything(*fit(tmp_path / "whole", 20 * BATCH)))


def test_leftovers_of_a_killed_run_are_swept_and_the_future_is_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ".images-0000000040.ckpt.123.tmp").write_text("half")
    (folder / "images-0000099999.ckpt").write_text("cut short, from a run that went further")
    (folder / "mine.ckpt").write_text("not ours")
    fit(tmp_path, 25 * BATCH)
    assert names(tmp_path) == [
        "images-0000000120.ckpt",
        "images-0000000160.ckpt",
        "images-0000000200.ckpt",
        "images-0000099999.ckpt",
        "mine.ckpt",
    ]


@pytest.mark.parametrize("options", [{"every_images": 0}, {"every_images": 8, "keep": 0}])
def test_bad_settings_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="Checkpoints"):
        Checkpoints(dirpath=str(tmp_path), **options)


def test_an_average_missing_from_the_checkpoint_is_one_clear_line(tmp_path):
    callback = EMACallback(profiles={})
    callback.averages = {"slow": None}
    with pytest.raises(RunError, match="no average called 'slow'"):
        callback.load_state_dict({"ema": {}})
    with pytest.raises(ValueError, match="raw"):
        EMACallback(profiles={"raw": None})
