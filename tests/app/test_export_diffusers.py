"""Our U-Net as diffusers loads it: the same outputs at the same levels, the same samples from the same noise."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

from tiny_runs import train

from diffusion_lab.app.build import Loaded
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.export import __main__ as export
from diffusion_lab.app.export.diffusers import levels, write_diffusers
from diffusion_lab.denoisers import EDM, X0, Eps, LearnedVarianceDenoiser, NetworkDenoiser, V, Velocity
from diffusion_lab.guidance import Unguided
from diffusion_lab.networks import UNet
from diffusion_lab.process import Cosine, LinearBeta, LogitNormal, RectifiedFlow, VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.generate import Generation
from diffusion_lab.samplers.grids import from_logsnrs, uniform_u

diffusers = pytest.importorskip("diffusers")

NODE = dict(
    in_channels=3,
    size=4,
    channels=128,
    multipliers=[1, 2],
    blocks=1,
    attention=[2],
    head_channels=64,
    num_classes=3,
)
COSINE = {"_target_": "diffusion_lab.process.Cosine", "logsnr_min": -15.0, "logsnr_max": 15.0}
FACTS = {"images_seen": "7"}
VELOCITY, PRESERVING = V(), VariancePreserving()


def loaded(prediction=VELOCITY, denoiser=NetworkDenoiser, interpolant=PRESERVING, sigma_data=1.0, **changed):
    node = {**NODE, **changed}
    network = UNet(**node)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        # about the size of trained ones, and none of them zero
        p.data.normal_(std=0.5 / max(1.0, p[0].numel() ** 0.5), generator=generator)
    whole = denoiser(network=network, interpolant=interpolant, prediction=prediction, sigma_data=sigma_data)
    config = {"method": {"denoiser": {"network": node}}, "schedule": COSINE, "guidance": {}, "modifiers": {}}
    return Loaded(whole.eval().requires_grad_(False), config, "ema", 7, "0" * 64, Path("x"))


def both(tmp_path, ours, **options):
    folder = tmp_path / "exported"
    remarks = write_diffusers(ours, folder, facts=FACTS, **options)
    return diffusers.UNet2DModel.from_pretrained(folder / "unet"), scheduler(folder), remarks


def scheduler(folder):
    return diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")


def assert_same_network(ours, unet, abar, labels, told, channels=3, sign=1.0):
    x = torch.randn(4, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for k in (0, 250, 600, 999):
            logsnr = torch.logit(abar[k].double()).float().expand(4)
            expected = sign * ours.denoiser.network(x, logsnr, told)[:, :channels]
            given = unet(x, torch.tensor(k), **({} if labels is None else {"class_labels": labels})).sample
            assert expected.abs().mean() > 0.05, "this network says nothing"
            assert (given - expected).norm() <= 1e-5 * expected.norm(), k


@pytest.mark.parametrize(
    "changed",
    [
        {},
        pytest.param({"attention": [4, 2], "head_channels": 32}, marks=pytest.mark.slow),
        {"middle_attention": False, "attention": [], "multipliers": [1, 2, 1], "blocks": [2, 2, 2]},
    ],
)
def test_the_network_is_the_same_with_and_without_labels(tmp_path, changed):
    ours = loaded(**changed)
    unet, ddim, remarks = both(tmp_path, ours)
    labels = torch.tensor([0, 2, 1, 3])
    assert_same_network(ours, unet, ddim.alphas_cumprod, labels, {"label": torch.tensor([0, 2, 1, -1])})
    assert len(remarks) == 1 and "3 for none" in remarks[0]

    bare = loaded(num_classes=0, **changed)
    unet, ddim, remarks = both(tmp_path / "bare", bare)
    assert_same_network(bare, unet, ddim.alphas_cumprod, None, None)
    assert remarks == []


@pytest.mark.parametrize("label", ["2", "none"])
def test_one_label_can_be_made_part_of_the_network(tmp_path, label):
    ours = loaded()
    unet, ddim, remarks = both(tmp_path, ours, label=label)
    told = {"label": torch.full((4,), -1 if label == "none" else 2)}
    assert_same_network(ours, unet, ddim.alphas_cumprod, None, told)
    assert remarks == []


def test_a_learned_variance_is_left_out(tmp_path):
    ours = loaded(denoiser=LearnedVarianceDenoiser, prediction=Eps(), out_channels=6)
    unet, ddim, remarks = both(tmp_path, ours)
    labels = torch.tensor([0, 2, 1, 0])
    assert_same_network(ours, unet, ddim.alphas_cumprod, labels, {"label": labels})
    assert "learned variance" in remarks[0] and ddim.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "prediction, interpolant",
    [
        (V(), VariancePreserving()),
        (Eps(), VariancePreserving()),
        (X0(), VariancePreserving()),
        (EDM(sigma_data=1.0), VariancePreserving()),
        (V(), RectifiedFlow()),
    ],
    ids=str,
)
def test_the_pipeline_draws_our_samples_from_our_noise(tmp_path, prediction, interpolant):
    ours = loaded(num_classes=0, multipliers=[1, 1], prediction=prediction, interpolant=interpolant)
    write_diffusers(ours, tmp_path / "d", facts=FACTS)
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "d")
    pipeline.set_progress_bar_config(disable=True)
    noise = SampleRNG([0, 1]).randn((3, 4, 4))
    with torch.no_grad():
        pipeline.scheduler.set_timesteps(10)
        theirs = noise
        for t in pipeline.scheduler.timesteps:
            theirs = pipeline.scheduler.step(pipeline.unet(theirs, t).sample, t, theirs).prev_sample

        def drawn(grid):
            make = Generation(sampler=DDIM(), grid=grid, guidance=Unguided, shape=(3, 4, 4))
            return make(ours.denoiser, seeds=[0, 1])

        at = torch.logit(pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps].double())
        scale = drawn(uniform_u(Cosine(), 10)).abs().max()
        # float32 on both sides, and their levels are float32's
        assert (theirs - drawn(from_logsnrs(at.tolist()))).abs().max() <= 1e-5 * scale
        assert (theirs - drawn(uniform_u(Cosine(), 10))).abs().max() <= 1e-5 * scale
        picture = pipeline(
            batch_size=2,
            num_inference_steps=10,
            generator=[torch.Generator().manual_seed(k) for k in (0, 1)],
            output_type="np",
        ).images
    expected = (theirs / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (torch.from_numpy(picture) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("schedule", [Cosine(), LinearBeta(), LogitNormal(mean=0.0, std=1.0)], ids=str)
def test_the_scheduler_has_our_levels(tmp_path, schedule):
    abar, betas = levels(schedule)
    theirs = diffusers.DDIMScheduler(num_train_timesteps=1000, trained_betas=betas).alphas_cumprod
    assert torch.equal(theirs, abar)
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    wanted = torch.sigmoid(schedule(u).clamp(-20, 20))
    # one rounding of float32 each, however many came before
    assert (abar - wanted).abs().max() <= 1e-7
    assert (abar / wanted - 1).abs()[:-1].max() <= 2e-7


@pytest.mark.parametrize(
    "change, words",
    [
        ({"channels": 32, "head_channels": 32}, "model.channels=32: its group norms have 8 to "),
        ({"blocks": [1, 2]}, r"model.blocks=\[1, 2\]: "),
        ({"multipliers": [2, 2]}, r"model.multipliers=\[2, 2\]: "),
        ({"scalars": ["age"]}, "model.scalars="),
        ({"token_width": 4}, "model.token_width=4: "),
        ({"image_channels": 1}, "model.image_channels=1: "),
        ({"patch": 2}, "model.patch=2: "),
        ({"prediction": Velocity()}, "prediction=Velocity: "),
        ({"prediction": EDM(sigma_data=0.5)}, "prediction=EDM: "),
        ({"sigma_data": 0.5}, "method.denoiser.sigma_data=0.5: "),
    ],
)
def test_what_diffusers_has_not_is_one_line_that_names_the_setting(tmp_path, change, words):
    with pytest.raises(UserError, match=f"^{words}"):
        write_diffusers(loaded(**change), tmp_path / "d", facts=FACTS)
    assert not (tmp_path / "d").exists()


def test_other_networks_wrong_labels_and_full_folders_are_refused(tmp_path):
    ours = loaded()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="something is there already"):
        write_diffusers(ours, tmp_path / "full", facts=FACTS)
    for label in ("3", "-1", "cat"):
        with pytest.raises(UserError, match=f"--label {label}: a class is meant, 0 to 2, or none"):
            write_diffusers(ours, tmp_path / "d", label=label, facts=FACTS)
    with pytest.raises(UserError, match="--label 0: this model was trained without labels"):
        write_diffusers(loaded(num_classes=0), tmp_path / "d", label="0", facts=FACTS)
    ours.denoiser.network = torch.nn.Identity()
    with pytest.raises(UserError, match=r"^model: .* is Identity"):
        write_diffusers(replace(ours), tmp_path / "d", facts=FACTS)


@pytest.mark.slow
def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    run = train(tmp_path, "model.channels=128", "model.head_channels=64", max_images=16)
    out = tmp_path / "given"

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        return export.main()

    assert call(run, "--diffusers", out, "--label", "none") == 0
    assert capsys.readouterr().out.endswith(f"diffusers  {out}\n")
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    }
    pipeline = diffusers.DDIMPipeline.from_pretrained(out)
    assert pipeline.unet.config.sample_size == 8 and len(pipeline.scheduler.config.trained_betas) == 1000
    from safetensors import safe_open

    with safe_open(out / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["images_seen"] == "16" and facts["average"] == "ema" and len(facts["config"]) == 12
    # an export says the same of itself
    again = tmp_path / "again"
    assert call(run / "export", "--diffusers", again) == 0
    with safe_open(again / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == facts
    assert json.loads((again / "unet" / "config.json").read_text())["num_class_embeds"] == 11
    assert call(run, "--diffusers", again) == 2
    assert "something is there already" in capsys.readouterr().err
    assert call(run, "ema", "--label", "3") == 2
