"""Grids and samplers fitted to a run: fitted once, kept, recorded as plain values, and the same in any process."""

import json

import numpy as np
import pytest
import tiny_runs

from diffusion_lab.app.sampling import fit


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(fit, "EXAMPLES", 8)


def sample(out, trained, *more, n=70, code=0):
    assert tiny_runs.main("sample", f"run={trained}", f"out={out}", f"num_samples={n}", *more) == code
    return tiny_runs.images_of(out) if code == 0 else None


GRIDS = {
    "gits": ["grid=gits", "grid.steps=3", "grid.fine_steps=6"],
    "ays": ["grid=align_your_steps", "grid.steps=3", "grid.levels=8"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid", [GRIDS["gits"], pytest.param(GRIDS["ays"], marks=pytest.mark.slow)], ids=GRIDS.keys()
)
def test_a_grid_is_fitted_once_and_recorded_as_numbers(trained, tmp_path, grid, monkeypatch, capsys):
    images, _ = sample(tmp_path / "a", trained, *grid)
    told = tiny_runs.record_of(tmp_path / "a")
    levels = told["settings"]["generation"]["grid"]["logsnrs"]
    assert len(levels) == 3 and list(levels) == sorted(levels) and told["nfe"] == 3
    assert told["grid"].startswith(("GITS(", "AlignYourSteps(")) and "steps=3" in told["grid"]
    (kept,) = (trained / "fitted").glob(f"grid-{told['grid'].split('(')[0]}-*.json")
    assert json.loads(kept.read_text())["logsnr"] == levels
    # a second job finds the fit, and two processes make the same images
    monkeypatch.setattr(fit, "_fit", lambda *_: pytest.fail("fitted twice"))
    again, _ = sample(tmp_path / "b", trained, *grid, "devices=2", "batch_size=64")
    assert np.array_equal(images, again)


def test_a_sampler_is_fitted_once_and_its_file_recorded(trained, tmp_path, monkeypatch):
    chosen = ["sampler=dpm_solver_v3", "sampler.levels=5", "grid=uniform_logsnr", "grid.steps=4"]
    images, _ = sample(tmp_path / "a", trained, *chosen)
    told = tiny_runs.record_of(tmp_path / "a")
    (kept,) = (trained / "fitted").glob("sampler-DPMSolverV3-*.safetensors")
    assert told["settings"]["generation"]["sampler"]["statistics"] == str(kept)
    monkeypatch.setattr(fit, "_fit", lambda *_: pytest.fail("fitted twice"))
    again, _ = sample(tmp_path / "b", trained, *chosen, "batch_size=64")
    assert np.array_equal(images, again) and images.std() > 1


def test_other_guidance_is_another_fit(trained, tmp_path):
    before = set((trained / "fitted").glob("grid-GITS-*"))
    sample(tmp_path / "a", trained, *GRIDS["gits"], "guidance=cfg", "guidance.scale=3")
    sample(tmp_path / "b", trained, *GRIDS["gits"], "modifiers=static_threshold")
    assert len(set((trained / "fitted").glob("grid-GITS-*")) - before) == 2


def test_training_cannot_use_what_is_fitted_to_a_trained_model(tmp_path, capsys):
    code = tiny_runs.main(
        "train", "experiment=digits/quickstart", f"paths.runs={tmp_path}", "sampler=dpm_solver_v3"
    )
    said = capsys.readouterr().err
    assert code != 0 and "fitted to a trained model: name it to sample.py" in said and "Traceback" not in said
