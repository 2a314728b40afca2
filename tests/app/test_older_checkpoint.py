"""`ema=<name>@<images>` takes the weights of an older checkpoint, wherever an average is accepted."""

import pytest
import tiny_runs
import torch

from diffusion_lab.app.runs.weights import read_weights
from diffusion_lab.modules.checkpoint_io import checkpoint_name, load_checkpoint


def test_the_weights_are_those_of_that_checkpoint(trained):
    first, last = (load_checkpoint(trained / "checkpoints" / checkpoint_name(n)) for n in (160, 320))
    assert first["images_seen"] == 160
    found = read_weights(trained, "raw@160")
    assert (found.name, found.images_seen) == ("raw", 160)
    own, other = (
        {key.removeprefix("denoiser."): value for key, value in checkpoint["state_dict"].items()}
        for checkpoint in (first, last)
    )
    key = next(iter(found.tensors))
    assert torch.equal(found.tensors[key], own[key]) and not torch.equal(own[key], other[key])
    assert read_weights(trained, "ema@320").sha256 == read_weights(trained, "ema").sha256
    assert read_weights(trained, "ema@160").sha256 != read_weights(trained, "ema").sha256


@pytest.mark.slow
def test_a_sweep_over_checkpoints_ends_in_one_page(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["num_samples=12", "ema=ema@160,ema@320", "--multirun"]
    assert tiny_runs.main("evaluate", f"run={trained}", *words) == 0
    out = capsys.readouterr().out
    page = (tmp_path / out.splitlines()[-1].split("  ")[-1]).read_text()
    assert "ema@160" in page and "ema@320" in page


def test_mistakes_are_one_line(trained, tmp_path, capsys):
    for ema, why in (
        ("ema@161", "no checkpoint at 161 images, only at 160, 320"),
        ("ema@last", "<name>@<images> is meant"),
        ("emma@160", "did you mean"),
    ):
        assert tiny_runs.main("sample", f"run={trained}", f"ema={ema}", f"out={tmp_path / 'o'}") == 2
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1
    assert tiny_runs.main("sample", f"run={trained / 'export'}", "ema=ema@160", f"out={tmp_path / 'o'}") == 2
    assert "an export, which has one moment" in capsys.readouterr().err
