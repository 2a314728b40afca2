"""A compiled network trains to the weights of the eager one, in files with the same names, and draws its images."""

import numpy as np
import pytest
import tiny_runs
import torch
from hydra import compose, initialize_config_dir

from diffusion_lab.app.build import plain
from diffusion_lab.app.runs import run
from diffusion_lab.app.session import conf_folder

COMPILED = "method.compile_network=true"


@pytest.mark.parametrize("word", [COMPILED, "method.channels_last=true", "optimizer.fused=null"])
def test_how_fast_it_is_computed_is_not_part_of_the_run(word):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        configs = [plain(compose("train", overrides=words)) for words in ([], [word], ["optimizer.lr=7"])]
    for config in configs:
        config.update(name="x", choices={}, overrides=[])
    here, there, other = map(run.identity, configs)
    assert configs[0] != configs[1] and here == there != other


def test_the_module_compiles_in_place(monkeypatch, tmp_path):
    from tiny_training import BATCH, fit, make_module

    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    module, _ = fit(tmp_path, BATCH, module=make_module(compile_network=True))
    assert compiled == ["Net"]
    assert all(name.startswith(("denoiser.network.", "loss.")) for name in module.state_dict())


def train(runs, images, *words):
    # perceptrons: the U-Net takes a minute to compile
    given = ["experiment=toy/quickstart", "model.width=32", "model.depth=2", "batch_size=32", "trainer=cpu"]
    given += ["~callbacks.sample_grid", "callbacks.checkpoints.every_images=320", f"paths.runs={runs}"]
    assert tiny_runs.main("train", *given, f"max_images={images}", *words) == 0
    return runs / "toy" / "quickstart" / "latest"


@pytest.mark.slow
def test_it_trains_goes_on_and_samples_like_the_eager_one(tmp_path):
    eager = train(tmp_path / "eager", 640)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    folder = train(tmp_path / "compiled", 320, COMPILED).resolve()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # the second half eager again: the same run, whatever computes it
    again = train(tmp_path / "compiled", 640, "resume=auto")
    assert again.resolve() == folder
    a, b = tiny_runs.state(eager), tiny_runs.state(again)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[key], rtol=1e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")
    samples = []
    for word in ("compile=false", "compile=true"):
        out = tmp_path / word.partition("=")[2]
        assert (
            tiny_runs.main("sample", f"run={eager}", "num_samples=40", f"out={out}", "device=cpu", word) == 0
        )
        samples.append(tiny_runs.images_of(out)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    assert np.abs(samples[0] - samples[1]).max() < 1e-3
