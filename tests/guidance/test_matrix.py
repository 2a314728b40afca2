"""Every file of conf/guidance under every file of conf/sampler, on a small network: whatever stacks must also run."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from problems import ALL_SAMPLERS, INTERPOLANTS

from diffusion_lab.app.build import instantiate
from diffusion_lab.denoisers import GUIDANCE_SCALE, GuidedDenoiser, NetworkDenoiser
from diffusion_lab.denoisers.classifier import NetworkClassifier
from diffusion_lab.denoisers.prediction import V
from diffusion_lab.measurements import Inpaint
from diffusion_lab.networks import UNet
from diffusion_lab.networks.classifier import NoisyClassifier
from diffusion_lab.samplers import Generation, Stepper
from diffusion_lab.samplers.grids import uniform_logsnr
from diffusion_lab.typing import MEASUREMENT

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "guidance").glob("*.yaml"))
GRID = uniform_logsnr(-6.0, 6.0, 3)
SHAPE = (1, 8, 8)
SMALL = {
    "in_channels": 1, "size": 8, "num_classes": 10, "channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4],
    "head_channels": 8,
}  # fmt: skip
# an ODE solver, one that draws noise, one that differentiates; the others are slow all together
SHORT = ("ddim", "ddpm", "covariance")


def randomised(module, seed):
    """Weights that are not zero anywhere, so that every branch and every layer matters."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return module.eval().requires_grad_(False)


def unet(seed):
    network = UNet(**SMALL)
    return randomised(NetworkDenoiser(network=network, interpolant=INTERPOLANTS["vp"], prediction=V()), seed)


def told(seed):
    """A student that is told its guidance scale."""
    network, parts = (
        UNet(**SMALL, scalars=[GUIDANCE_SCALE]),
        {"interpolant": INTERPOLANTS["vp"], "prediction": V()},
    )
    return randomised(GuidedDenoiser(network=network, scales=(1.0, 5.0), **parts), seed)


@pytest.fixture(scope="module")
def models():
    classifier = NoisyClassifier(**SMALL)
    return {
        "denoiser": unet(0),
        "told": told(0),
        "weak": unet(1),
        "classifier": randomised(NetworkClassifier(network=classifier, interpolant=INTERPOLANTS["vp"]), 2),
    }


def guidance(name, models):
    """Build an option of conf/guidance as sample.py does, stored models put in."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = ["run=x", f"guidance={name}", "measurement=inpaint", "grid=uniform_logsnr", "grid.steps=3"]
        config = compose("sample", [*words, "grid.logsnr_min=-6", "grid.logsnr_max=6"])
    node = OmegaConf.to_container(config.guidance, resolve=True)
    stored = {key: node.pop(key) for key in ("weak", "classifier") if key in node}
    made = instantiate(node, "guidance")
    if not stored:
        return made
    made.keywords.update({key: models[key] for key in stored})
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(name, marks=[] if name in SHORT else [pytest.mark.slow])
        for name in ALL_SAMPLERS
        if name not in ("ddim_half", "ddim_one", "ddpm_lower", "ddpm_middle", "ddpm_upper")
    ],
)
def test_every_guidance_runs_under_every_sampler(name, sampler, models):
    made = guidance(name, models)
    recipe = Generation(sampler=ALL_SAMPLERS[sampler], grid=GRID, guidance=made, shape=SHAPE)
    x0 = torch.linspace(-1, 1, 128).reshape(2, *SHAPE)
    cond = {"label": torch.tensor([3, 8]), MEASUREMENT: Inpaint()(x0)}
    denoiser = models["told" if name == "distilled" else "denoiser"]
    if why := refusal(name, ALL_SAMPLERS[sampler], sampler):
        with pytest.raises(ValueError, match=why):
            recipe(denoiser, seeds=[0, 1], cond=cond)
        return
    samples = recipe(denoiser, seeds=[0, 1], cond=cond)
    assert samples.shape == (2, *SHAPE) and bool(samples.isfinite().all())


def refusal(name, sampler, sampler_name):
    """What says the one line by which a pair is refused that cannot be; None for all others."""
    if name == "projected" and sampler_name in ("paradigms", "adaptive_rk"):
        return "level"  # momentum needs all samples of a call at one level
    if name in ("particles", "feynman_kac", "predictor_corrector") and not isinstance(sampler, Stepper):
        return "made of steps"
    if name in ("particles", "feynman_kac") and not getattr(sampler, "stochastic", False):
        return "draws noise|stochastic|noise"  # particles differ by nothing else
    return None
