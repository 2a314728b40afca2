"""sample.py with measurement= and input=: what it reads, what it hands to a guidance, what it writes and refuses."""

import json
import math

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image

from diffusion_lab.app.sampling import inputs, parts, posterior
from diffusion_lab.app.session import conf_folder
from diffusion_lab.data import Digits
from diffusion_lab.images import to_float
from diffusion_lab.measurements import Inpaint, measure
from diffusion_lab.rng import SampleRNG, derive_seed

# a guidance that puts what was measured into the estimate: its samples tell which measurement they were given
STUB = '''
import torch


class Overwrite:
    """x0 with the known pixels put in."""

    def __init__(self, denoiser, operator, noise=0.0, grid=None):
        self.interpolant, self.denoiser, self.operator, self.grid = denoiser.interpolant, denoiser, operator, grid

    def __call__(self, x, logsnr, cond=None):
        x0 = self.denoiser(x, logsnr, {k: v for k, v in cond.items() if k != "measurement"})
        known = self.operator.known(x0)
        return known * cond["measurement"] + (1 - known) * x0
'''
YAML = """
_target_: stub_posterior.Overwrite
_partial_: true
operator: ${measurement.operator}
noise: ${measurement.noise}
grid: ${grid}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_runs.train(tmp_path_factory.mktemp("runs")).resolve()


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    """A config folder with `guidance=overwrite`, whose class is importable here and in other processes."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "stub_posterior.py").write_text(STUB)
    (folder / "conf" / "guidance").mkdir(parents=True)
    (folder / "conf" / "guidance" / "overwrite.yaml").write_text(YAML)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        yield folder / "conf"


def sample(out, trained, conf, *more, code=0):
    words = [f"--config-dir={conf}", f"run={trained}", f"out={out}", *more]
    assert tiny_runs.main("sample", *words) == code
    if code == 0:
        with np.load(out / "samples.npz") as stored:
            return dict(stored)


WORDS = ["guidance=overwrite", "measurement=inpaint"]
MANY = [*WORDS, "input=test:25", "draws=3"]


@pytest.fixture(scope="module")
def whole(trained, conf, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "whole"
    return out, sample(out, trained, conf, *MANY)


def test_what_is_written(whole):
    out, got = whole
    assert sorted(path.name for path in out.iterdir()) == [
        "grid.png", "posterior.png", "record.json", "samples.npz",
    ]  # fmt: skip
    real, _ = Digits(batch_size=1, seed=0).test_images()
    assert got["images"].shape == (75, 8, 8, 1) and got["images"].dtype == np.uint8
    assert (got["inputs"] == real[:25].permute(0, 2, 3, 1).numpy()).all()
    assert got["input_index"].tolist() == [i // 3 for i in range(75)]
    # the class of what is measured is not known
    assert got["labels"].tolist() == [-1] * 75
    told = tiny_runs.record_of(out)
    assert told["num_samples"] == 75 and told["nfe"] == 3 and told["labels"] == "none"
    about = told["posterior"]
    assert about["inputs"] == 25 and about["draws"] == 3 and about["noise"] == 0.05
    assert about["measurement"].startswith("Inpaint(mask=box") and about["input"] == "test:25"
    assert len(about["by_input"]["psnr_of_mean"]) == 25
    with Image.open(out / "posterior.png") as picture:
        # three columns and the draws, a caption and the first sixteen rows
        assert picture.width == 6 * 100 - 4 and picture.height == 16 + 16 * 100 - 4


def test_a_sample_is_given_the_measurement_of_its_own_input(whole):
    """Blocks are of 64, inputs of 3 samples: the border falls inside an input."""
    got = whole[1]
    operator, x0 = Inpaint(), to_float(Digits(batch_size=1, seed=0).test_images()[0][:25])
    rng = SampleRNG([derive_seed("measurement", 0, k) % 2**32 for k in range(25)])
    y = measure(operator, x0, 0.05, rng)
    assert torch.equal(torch.from_numpy(got["measurements"]), y)
    known = (operator.known(x0)[0, 0] > 0).numpy()
    wanted = parts.to_array(y)[:, known]
    drawn = got["images"][:, known]
    for i, sample in enumerate(drawn):
        assert (sample == wanted[i // 3]).all()
    # and the draws of one input are not copies
    assert (got["images"][0] != got["images"][1]).any()


def test_the_numbers_are_those_of_the_arrays(whole):
    out, got = whole
    about = tiny_runs.record_of(out)["posterior"]
    x, x0 = got["images"] / 127.5 - 1, got["inputs"] / 127.5 - 1
    mean = x.reshape(25, 3, 8, 8, 1).mean(1)
    psnr = 10 * np.log10(4 / ((mean - x0) ** 2).reshape(25, -1).mean(1))
    assert np.allclose(about["by_input"]["psnr_of_mean"], psnr, atol=1e-3)
    assert math.isclose(about["psnr_of_mean"], psnr.mean(), abs_tol=1e-3)
    each = 10 * np.log10(4 / ((x - np.repeat(x0, 3, 0)) ** 2).reshape(75, -1).mean(1))
    assert math.isclose(about["psnr_of_draws"], each.mean(), abs_tol=1e-3)
    known = Inpaint().known(torch.zeros(1, 1, 8, 8))[0, 0].numpy() > 0
    error = x[:, known, 0] - np.repeat(got["measurements"][:, 0][:, known], 3, 0)
    assert math.isclose(about["residual"], np.sqrt((error**2).mean(1)).mean() / 0.05, rel_tol=1e-3)


def test_the_residual_of_the_truth_is_one_and_blanks_do_not_count():
    """Over the 48 known pixels of 400 images: rms / noise is 1 - 1/(4 * 48), within a standard error of 0.005."""
    x0 = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = measure(Inpaint(), x0, 0.05, SampleRNG(range(400)))
    node = {"operator": {"_target_": "diffusion_lab.measurements.Inpaint"}, "noise": 0.05}
    about = {"measurement": node, "input": "", "inputs": 400, "sha256": "", "draws": 1}
    made = job_of(about)
    found = posterior.residuals(made, inputs.Measured(x0, y), x0)
    assert abs(float(found.mean()) - (1 - 1 / 192)) < 4 * 0.005
    assert abs(float(found.std()) - 1 / math.sqrt(96)) < 0.02


def job_of(about, **more):
    from diffusion_lab.app.sampling.job import Job

    settings = {
        "run": "", "ema": "", "weights": "", "seed": 0, "labels": None, "num_samples": 1, "batch_size": 1,
        "shape": [1, 8, 8], "num_classes": 10, "device": "cpu", "precision": "32-true", "generation": {}, **more,
    }  # fmt: skip
    return Job(**settings, posterior=about)


def test_labels_go_by_inputs():
    about = {"inputs": 4, "draws": 3}
    assert job_of(about).label_list(range(12)) == [-1] * 12
    assert job_of(about, labels=[7, 2]).label_list(range(12)) == [7] * 3 + [2] * 3 + [7] * 3 + [2] * 3
    # samples that fill up a block begin again with the first input
    assert job_of(about, labels=[7, 2]).label_list([12, 15]) == [7, 2]
    assert job_of(None).label_list(range(3)) == [0, 1, 2]


def test_identity_is_of_what_the_samples_depend_on():
    about = {"measurement": {"noise": 0.1}, "input": "a.png", "inputs": 4, "sha256": "x", "draws": 3}
    same = job_of({**about, "input": "b.png"})
    assert job_of(about).settings == same.settings
    for key, other in (("sha256", "y"), ("draws", 4), ("measurement", {"noise": 0.2})):
        assert job_of({**about, key: other}).settings != same.settings
    # records of samples without inputs stay what they were
    assert "posterior" not in job_of(None).settings


@pytest.mark.parametrize(
    "more", [["batch_size=1"], pytest.param(["devices=2", "batch_size=64"], marks=pytest.mark.slow)]
)
def test_neither_batch_nor_processes_matter(whole, trained, conf, tmp_path, more):
    got = sample(tmp_path / "s", trained, conf, *MANY, *more)
    assert all((got[name] == whole[1][name]).all() for name in got)


def test_fewer_inputs_are_the_first_ones(whole, trained, conf, tmp_path):
    got = sample(tmp_path / "s", trained, conf, *WORDS, "input=test:2", "draws=3")
    assert (got["images"] == whole[1]["images"][:6]).all()
    assert (got["measurements"] == whole[1]["measurements"][:2]).all()


def test_noise_belongs_to_the_seed(whole, trained, conf, tmp_path):
    got = sample(tmp_path / "s", trained, conf, *WORDS, "input=test:2", "seed=1")
    known = Inpaint().known(torch.zeros(1, 1, 8, 8))[0].numpy() > 0
    assert (got["measurements"] != whole[1]["measurements"][:2])[:, known].all()


def test_an_interrupted_job_goes_on_with_the_measurements_it_began_with(
    whole, trained, conf, tmp_path, monkeypatch
):
    """What lies beside the parts is taken, not made again: here it was changed, so that one sees it."""
    save = parts._save

    def stop(path, array):
        save(path, array)
        raise KeyboardInterrupt

    words = [f"--config-dir={conf}", f"run={trained}", f"out={tmp_path}/s", *MANY, "batch_size=64"]
    with monkeypatch.context() as patch:
        patch.setattr(parts, "_save", stop)
        assert tiny_runs.main("sample", *words) == 130
    kept = inputs.read_measured(tmp_path / "s" / "parts")
    inputs.Measured(kept.x0, -kept.y).write(tmp_path / "s" / "parts")
    got = sample(tmp_path / "s", trained, conf, *MANY)
    assert (got["images"][:64] == whole[1]["images"][:64]).all()
    assert (got["measurements"] == -whole[1]["measurements"]).all()
    assert (got["images"][64:] != whole[1]["images"][64:]).any()


@pytest.mark.slow
def test_other_inputs_in_the_same_folder_are_refused(whole, trained, conf, capsys):
    for other in (
        ["input=test:24", "draws=3"],
        ["input=test:25", "draws=2"],
        ["input=test:25", "draws=3", "seed=2"],
    ):
        sample(whole[0], trained, conf, *WORDS, *other, code=2)
        assert "other samples are there already" in capsys.readouterr().err
    sample(whole[0], trained, conf, *MANY)
    told = capsys.readouterr().out
    assert "holds these samples already" in told and "posterior.png" in told and "PSNR" in told


def picture(path, size, mode="L", seed=0):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_pictures_are_read_fitted_and_said(trained, conf, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    exact = picture(folder / "b.png", (8, 8), seed=1)
    large = picture(folder / "a.png", (24, 16), seed=2)
    colour = picture(folder / "c.PNG", (8, 8), mode="RGB", seed=3)
    (folder / "notes.txt").write_text("no picture")
    picture(folder / ".hidden.png", (8, 8))
    got = sample(tmp_path / "s", trained, conf, *WORDS, f"input={folder}", "draws=2")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("input ")]
    assert said == ["input   a.png is 24x16: its centre is cropped and resized to 8x8"]
    assert len(got["inputs"]) == 3 and (got["inputs"][1, ..., 0] == exact).all()
    # the centre 16 x 16, averaged over squares of four; Pillow rounds rows first, then columns: half a level each
    areas = large[:, 4:20].astype(float).reshape(8, 2, 8, 2).mean((1, 3))
    assert np.abs(got["inputs"][0, ..., 0] - areas).max() <= 1.0
    assert (got["inputs"][2, ..., 0] == np.asarray(Image.fromarray(colour).convert("L"))).all()
    one = sample(tmp_path / "one", trained, conf, *WORDS, f"input={folder}/b.png")
    assert one["images"].shape[0] == 4 and (one["inputs"] == got["inputs"][1:2]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["measurement=inpaint"], "measurement=inpaint: input=<image> is needed, e.g. input=test:8"),
        (["input=test:2"], "input=test:2: measurement=<option> is needed; there are: colourise, "),
        (["guidance=overwrite"], "guidance=overwrite: it samples a posterior: measurement=<option> and input= are"),
        (["guidance=cfg", "measurement=inpaint", "input=test:2"], "guidance=cfg makes no use of it; guidances that do"),
        (["measurement=inpaint", "input=test:2"], "guidance=none makes no use of it; guidances that do:"),
        (["draws=2"], "draws=2: only with measurement= and input="),
        ([*MANY, "num_samples=4"], "num_samples=4: it is inputs x draws here; draws= says how many an input"),
        ([*WORDS, "input=nowhere.png"], "input=nowhere.png: no such image or folder; test:4 takes 4 test images"),
        ([*WORDS, "input=test:400"], "input=test:400: there are 360 test images"),
        ([*WORDS, "input=test:0"], "input=test:0: there are 360 test images"),
        ([*WORDS, "input=test:2", "draws=0"], "draws: must be at least 1, got 0"),
        ([*WORDS, "input=test:2", "measurement.noise=-1"], "measurement.noise: must be at least 0, got -1"),
        (
            ["guidance=overwrite", "measurement=colourise", "input=test:2"],
            "measurement: Colourise does not take images of shape [1, 8, 8]",
        ),
        ([*WORDS, "input=test:2", "measurement.operator.box=[0,0,1,1]"], "measurement: Inpaint does not take images"),
        (
            [*WORDS, "input=test:2", "measurement.operator.fraction=2"],
            "measurement.operator: Inpaint needs fraction in (0, 1), got 2",
        ),
        (["measurement=inpain", "input=test:2"], "no option 'inpain' in group 'measurement'; did you mean 'inpaint'?"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line(trained, conf, tmp_path, capsys, words, message):
    sample(tmp_path / "s", trained, conf, *words, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "s").exists()


def test_broken_and_empty_inputs_are_named(trained, conf, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    sample(tmp_path / "s", trained, conf, *WORDS, f"input={folder}", code=2)
    assert "holds no images (" in capsys.readouterr().err
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    sample(tmp_path / "s", trained, conf, *WORDS, f"input={folder}", code=2)
    error = capsys.readouterr().err
    assert f"{folder}/broken.png is not a readable image" in error and error.count("\n") == 1


def test_the_other_programs_say_that_they_do_not(trained, conf, tmp_path, capsys):
    own = f"--config-dir={conf}"
    assert tiny_runs.main("evaluate", f"run={trained}", "measurement=inpaint") == 2
    assert capsys.readouterr().err == "error: measurement=inpaint: only sample.py samples a posterior\n"
    for app, words in (
        ("evaluate", [f"run={trained}"]),
        ("train", [*tiny_runs.TINY, f"paths.runs={tmp_path}"]),
    ):
        assert tiny_runs.main(app, own, *words, "guidance=overwrite") == 2
        error = capsys.readouterr().err
        assert "sampling a posterior needs measurement= and input=, which only sample.py has" in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_a_guidance_is_told_the_grid_that_was_fitted(trained, conf, tmp_path):
    got = sample(
        tmp_path / "s", trained, conf, *WORDS, "input=test:2", "grid=align_your_steps", "grid.steps=4"
    )
    settings = tiny_runs.record_of(tmp_path / "s")["settings"]["generation"]
    assert settings["guidance"]["grid"] == settings["grid"] and len(settings["grid"]["logsnrs"]) == 4
    assert len(got["images"]) == 8


def test_a_sweep_over_guidances_is_one_page(trained, conf, tmp_path, capsys):
    (conf / "guidance" / "again.yaml").write_text(YAML)
    words = [f"--config-dir={conf}", f"run={trained}", "measurement=inpaint", "input=test:2"]
    assert tiny_runs.main("sample", *words, "guidance=overwrite,again", "--multirun") == 0
    told = capsys.readouterr().out
    assert "guidance=overwrite" in told and "guidance=again" in told
    (page,) = (trained / "comparisons").glob("*.html")
    text = page.read_text()
    assert "overwrite" in text and "not scored, draws from a posterior: PSNR" in text and "PSNR" in told


def test_measurements_of_every_kind_can_be_shown():
    """Each operator of conf/measurement, on colour images: what stands in the picture has a size and is finite."""
    import yaml

    x0 = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for file in sorted((conf_folder() / "measurement").glob("*.yaml")):
        node = yaml.safe_load(file.read_text())
        if node["operator"] is None:
            continue
        made = job_of({"measurement": node, "inputs": 2, "draws": 1})
        y = measure(posterior.operator_of(made), x0, 0.0, None)
        shown = posterior.pictured(made, inputs.Measured(x0, y))
        assert shown.ndim == 4 and len(shown) == 2 and bool(shown.isfinite().all()), file.name
        assert float(shown.std()) > 0.01, file.name


@pytest.mark.slow
def test_points_of_the_plane_have_no_picture_but_numbers(tmp_path, conf):
    words = [
        "experiment=toy/quickstart", "model.width=8", "model.depth=1", "batch_size=32", "max_images=640",
        "grid.steps=2", "dataset.num_examples=500", "trainer=cpu", "~callbacks.sample_grid", "~callbacks.throughput",
        "lr_schedule=constant", f"paths.runs={tmp_path}",
    ]  # fmt: skip
    assert tiny_runs.main("train", *words) == 0
    run = tmp_path / "toy" / "quickstart" / "latest"
    (conf / "measurement").mkdir(exist_ok=True)
    (conf / "measurement" / "first.yaml").write_text("operator:\n  _target_: stub_plane.First\nnoise: 0.1\n")
    (conf.parent / "stub_plane.py").write_text(PLANE)
    got = sample(
        tmp_path / "s", run, conf, "guidance=overwrite", "measurement=first", "input=test:3", "draws=2"
    )
    assert (
        got["images"].shape == (6, 2)
        and got["inputs"].shape == (3, 2)
        and got["measurements"].shape == (3, 2)
    )
    assert np.allclose(got["images"][:, 0], np.repeat(got["measurements"][:, 0], 2), atol=1e-5)
    assert not (tmp_path / "s" / "posterior.png").exists()
    assert json.loads((tmp_path / "s" / "record.json").read_text())["posterior"]["residual"] < 1e-3
    (conf / "measurement" / "first.yaml").unlink()
    sample(tmp_path / "t", run, conf, "guidance=overwrite", "measurement=inpaint", "input=photo.png", code=2)


PLANE = '''
import torch


class First:
    """The first coordinate, the other one blanked."""

    linear = True

    def known(self, x0):
        return torch.tensor([[1.0, 0.0]]).to(x0)

    def __call__(self, x0):
        return self.known(x0) * x0
'''
