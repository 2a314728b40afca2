"""sample.py: what it writes, and that an image depends on its own index and on nothing else."""

import json
import shutil
import signal

import numpy as np
import pytest
import tiny_runs
import yaml
from PIL import Image

from diffusion_lab.app.runs.places import workplace
from diffusion_lab.app.sampling import job, parts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_runs.train(tmp_path_factory.mktemp("runs")).resolve()


def sample(out, trained, *more, n=150, code=0):
    assert tiny_runs.main("sample", f"run={trained}", f"out={out}", f"num_samples={n}", *more) == code
    return tiny_runs.images_of(out) if code == 0 else None


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "whole"
    return out, *sample(out, trained)


def test_what_is_written(whole, trained):
    out, images, labels = whole
    assert images.shape == (150, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 1
    assert labels.dtype == np.int64 and list(labels) == [i % 10 for i in range(150)]
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "record.json", "samples.npz"]
    with Image.open(out / "grid.png") as picture:
        assert picture.width >= 80 and picture.height >= 80
    told = tiny_runs.record_of(out)
    assert told["weights"]["ema"] == "ema" and told["weights"]["images_seen"] == 320 and told["seed"] == 0
    assert told["nfe"] == 3 and "DPMSolverPP2M" in told["sampler"] and told["num_samples"] == 150
    assert len(np.unique(images.reshape(150, -1), axis=0)) == 150


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_the_batch_size_does_not_matter(whole, trained, tmp_path, batch_size, monkeypatch):
    given, streams = [], parts.streams
    monkeypatch.setattr(
        parts, "streams", lambda seed, indices: given.append(indices) or streams(seed, indices)
    )
    images, labels = sample(tmp_path / "s", trained, f"batch_size={batch_size}")
    # the network is never given more or fewer: its last bits would tell
    assert sorted(given, key=min) == [range(0, 64), range(64, 128), range(128, 192)]
    assert (images == whole[1]).all() and (labels == whole[2]).all()


def test_the_number_of_samples_does_not_matter(whole, trained, tmp_path):
    images, _ = sample(tmp_path / "s", trained, n=70)
    assert (images == whole[1][:70]).all()


@pytest.mark.slow
def test_two_processes_give_the_images_of_one(whole, trained, tmp_path):
    images, labels = sample(tmp_path / "s", trained, "devices=2", "batch_size=64")
    assert (images == whole[1]).all() and (labels == whole[2]).all()


def test_a_stochastic_sampler_is_as_exact(trained, tmp_path):
    a, _ = sample(tmp_path / "a", trained, "sampler=ddpm", "batch_size=64", n=100)
    b, _ = sample(tmp_path / "b", trained, "sampler=ddpm", "batch_size=128", n=90)
    assert (a[:90] == b).all()
    assert tiny_runs.record_of(tmp_path / "a")["sampler"] == "DDPM(interpolation=1.0)"


def test_seeds_do_not_overlap(whole, trained, tmp_path):
    other, _ = sample(tmp_path / "s", trained, "seed=1")
    both = np.concatenate([whole[1], other]).reshape(300, -1)
    assert len(np.unique(both, axis=0)) == 300
    first, second = (set(parts.streams(seed, range(100_000))) for seed in (0, 1))
    assert len(first) == len(second) == 100_000 and not first & second


def test_labels_can_be_chosen(trained, tmp_path):
    assert list(sample(tmp_path / "a", trained, "labels=[3,5]", n=5)[1]) == [3, 5, 3, 5, 3]
    assert list(sample(tmp_path / "b", trained, "labels=7", n=3)[1]) == [7, 7, 7]


def test_an_interrupted_job_goes_on(whole, trained, tmp_path, capsys, monkeypatch):
    """Stopped after a part, it makes only what is missing; another batch size is no obstacle."""
    save, saved = parts._save, []

    def stop(path, array):
        save(path, array)
        saved.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "_save", stop)
        assert (
            tiny_runs.main(
                "sample", f"run={trained}", f"out={tmp_path}/s", "num_samples=150", "batch_size=64"
            )
            == 130
        )
    made, block = [], parts._block
    monkeypatch.setattr(parts, "_block", lambda *given: made.append(given[-1]) or block(*given))
    images, _ = sample(tmp_path / "s", trained, "batch_size=128")
    assert (images == whole[1]).all() and sorted(made) == [64, 128]
    assert "64 of 150 samples are there already" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_while_sampling_loses_nothing_that_was_written(whole, trained, tmp_path):
    words = [f"run={trained}", f"out={tmp_path}/s", "num_samples=150", "batch_size=1"]
    process = tiny_runs.start("sample.py", *words)
    tiny_runs.wait_until(lambda: list((tmp_path / "s" / "parts").glob("*.npy")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (sample(tmp_path / "s", trained)[0] == whole[1]).all()


def test_other_samples_are_never_written_over(whole, trained, tmp_path, capsys):
    before = (whole[0] / "samples.npz").read_bytes()
    sample(whole[0], trained, "seed=5", code=2)
    error = capsys.readouterr().err
    assert "other samples are there already" in error and error.count("\n") == 1
    sample(whole[0], trained)
    assert "holds these samples already" in capsys.readouterr().out
    assert (whole[0] / "samples.npz").read_bytes() == before


def test_nothing_is_written_into_an_export(trained, tmp_path, monkeypatch):
    """Samples go into the run that it belongs to; of one that was given away, below where the command was given."""

    def listed(folder):
        return sorted(path.relative_to(folder) for path in folder.rglob("*"))

    away = tmp_path / "models" / "my model"
    shutil.copytree(trained / "export", away)
    monkeypatch.chdir(tmp_path)
    before, inside = listed(away), listed(trained / "export")
    words = ["num_samples=2", "grid=gits", "grid.steps=2", "grid.fine_steps=6"]
    assert tiny_runs.main("sample", f"run={away}", *words) == 0
    assert len(list((tmp_path / "samples" / "my model" / "samples").glob("ema-*/samples.npz"))) == 1
    assert len(list((tmp_path / "samples" / "my model" / "fitted").iterdir())) == 1
    assert listed(away) == before
    assert tiny_runs.main("sample", f"run={trained / 'export'}", "num_samples=2", "seed=77") == 0
    assert len(list((trained / "samples").glob("ema-*-seed77-*/samples.npz"))) == 1
    assert listed(trained / "export") == inside and workplace(trained) == trained.resolve()


def test_an_export_is_taken_like_a_run(whole, trained, tmp_path):
    images, _ = sample(tmp_path / "s", trained / "export")
    assert (images == whole[1]).all()
    config = yaml.safe_load((trained / "export" / "config.yaml").read_text())
    assert "paths" not in config and str(trained.parents[2]) not in json.dumps(config)


def test_raw_and_averaged_weights_differ_and_an_unknown_average_is_named(whole, trained, tmp_path, capsys):
    raw, _ = sample(tmp_path / "raw", trained, "ema=raw")
    assert not (raw == whole[1]).all()
    sample(tmp_path / "none", trained, "ema=emma", code=2)
    assert "did you mean 'ema'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labels=[11]", "there are the classes 0 to 9, and no 11"),
        ("labels=[]", "at least one label"),
        ("device=cudda", "did you mean 'cuda'?"),
        ("precision=16-mixed", "32-true or bf16-mixed"),
    ],
)
def test_bad_settings_are_one_line(trained, tmp_path, capsys, override, message):
    sample(tmp_path / "s", trained, override, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "s").exists()


def test_a_missing_run_is_one_line_on_the_command_line(tmp_path):
    (tmp_path / "run_one").mkdir()
    process = tiny_runs.start("sample.py", f"run={tmp_path}/run_on")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err == f"error: run={tmp_path}/run_on: no such folder; did you mean '{tmp_path}/run_one'?\n"


def test_a_config_that_names_other_targets_is_refused_on_the_command_line(trained, tmp_path):
    config = yaml.safe_load((trained / "export" / "config.yaml").read_text())
    config["method"]["denoiser"]["network"] = {"_target_": "os.system", "command": f"touch {tmp_path}/ran"}
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "config.yaml").write_text(yaml.safe_dump(config))
    (stranger / "ema.safetensors").write_bytes((trained / "export" / "ema.safetensors").read_bytes())
    process = tiny_runs.start("sample.py", f"run={stranger}", "num_samples=1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1
    assert "method.denoiser.network._target_ = 'os.system' is not among" in err
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_and_broken_weights_are_one_line(trained, tmp_path, capsys):
    config = yaml.safe_load((trained / "export" / "config.yaml").read_text())
    config["method"]["denoiser"]["network"]["channels"] = 16
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    good = (trained / "export" / "ema.safetensors").read_bytes()
    (other / "ema.safetensors").write_bytes(good)
    sample(tmp_path / "s", other, code=2)
    error = capsys.readouterr().err
    assert "the weights do not fit its config.yaml" in error and error.count("\n") == 1
    (other / "ema.safetensors").write_bytes(good[:1000])
    sample(tmp_path / "s", other, code=2)
    assert "not a readable safetensors file" in capsys.readouterr().err


def test_blocks_depend_on_shape_and_device_alone():
    assert job.block_size([1, 8, 8], "cpu") == 64 and job.block_size([3, 64, 64], "cpu") == 16
    assert job.block_size([3, 1024, 1024], "cpu") == 8 and job.block_size([2], "cuda") == 256


def test_points_of_the_plane(tmp_path):
    words = [
        "experiment=toy/quickstart",
        "model.width=8",
        "model.depth=1",
        "batch_size=32",
        "max_images=3200",
        "grid.steps=2",
        "dataset.num_examples=500",
        "trainer=cpu",
        "~callbacks.sample_grid",
        "~callbacks.throughput",
        "lr_schedule=constant",
        f"paths.runs={tmp_path}",
    ]
    assert tiny_runs.main("train", *words) == 0
    run = tmp_path / "toy" / "quickstart" / "latest"
    images, labels = sample(tmp_path / "s", run, n=40)
    assert images.shape == (40, 2) and images.dtype == np.float32 and np.isfinite(images).all()
    assert set(labels) <= {-1, 0, 1} and (tmp_path / "s" / "grid.png").stat().st_size > 1000
