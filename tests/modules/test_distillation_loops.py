"""The bare loops that methods of distillation are timed against do the same work: the same loss, the same gradient."""

from functools import partial

import pytest
import torch
from distillation_loops import Settings
from distillation_speed import METHODS, agreement, checked, exported, networks, scatter
from torch import nn

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.denoisers.guided import GuidedDenoiser
from diffusion_lab.denoisers.shortcut import ShortcutDenoiser
from diffusion_lab.losses import DenoisingLoss
from diffusion_lab.losses import distillation as losses
from diffusion_lab.losses.weightings import P2, SigmoidWeighting, SNRPlusOne, TruncatedSNR
from diffusion_lab.modules import distillation as modules
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.samplers.dpmpp_2m import DPMSolverPP2M
from diffusion_lab.samplers.grids import uniform_u

BATCH, SHAPE = 16, (1, 2, 2)
SCHEDULE = Cosine(logsnr_min=-10.0, logsnr_max=10.0)
TRUNCATED, PLUS_ONE = TruncatedSNR(schedule=SCHEDULE), SNRPlusOne(schedule=SCHEDULE)
GENERATOR = {
    "score": DenoisingLoss(schedule=SCHEDULE, weighting=SigmoidWeighting(bias=0.0)),
    "weighting": P2(k=0.0, gamma=1.0, schedule=SCHEDULE),
    "logsnrs": [-6.0],
}


class Net(nn.Module):
    """Hears level, label and any scalar."""

    def __init__(self):
        super().__init__()
        self.labels = nn.Embedding(11, 8)
        self.layers = nn.Sequential(nn.Linear(14, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, x, logsnr, cond=None):
        told = cond or {}
        label = self.labels(told.get("label", torch.full((len(x),), 10)))
        scalar = told.get("steps", told.get("guidance_scale", torch.zeros(len(x))))
        heard = torch.stack([logsnr / 10, scalar.to(x.dtype)], 1)
        return self.layers(torch.cat([x.flatten(1), heard, label], 1)).view_as(x)


def parts(kind=NetworkDenoiser, **options):
    own = {"interpolant": VariancePreserving(), "prediction": V()}
    return {
        "denoiser": kind(network=Net(), **own, **options),
        "teacher": NetworkDenoiser(network=Net(), **own),
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
        "seed": 0,
        "global_batch_size": BATCH,
    }


def loss(name, **options):
    return getattr(losses, name)(**{"schedule": SCHEDULE, "weighting": PLUS_ONE, **options})


def em(k, gamma_z):
    own = loss("EMLoss", **GENERATOR, langevin_steps=k, gamma_z=gamma_z)
    return modules.StudentScoreModule(**parts(), loss=own, score_steps=2)


MODULES = {
    "progressive": lambda: modules.ProgressiveModule(
        **parts(), loss=loss("ProgressiveLoss", weighting=TRUNCATED), steps_from=64, max_images=10**6
    ),
    "consistency": lambda: modules.ConsistencyModule(
        **parts(),
        loss=loss("ConsistencyLoss"),
        steps=4,
        teacher_steps=losses.TeacherSteps(max_images=10**9),
    ),
    "moment matching": lambda: modules.MomentMatchingModule(
        **parts(), loss=loss("AlternatingLoss"), steps=8, max_images=10**6
    ),
    "EM, K = 1, gamma_z = 0": lambda: em(1, 0.0),
    "EM, K = 4": lambda: em(4, 1.6e-5),
    "distribution matching": lambda: modules.StudentScoreModule(
        **parts(), loss=loss("DistributionMatchingLoss", **GENERATOR)
    ),
    "guided": lambda: modules.GuidedModule(
        **parts(GuidedDenoiser, scales=[1.0, 5.0]), loss=loss("GuidedLoss", weighting=TRUNCATED)
    ),
    "sCM": lambda: modules.ContinuousConsistencyModule(
        **parts(), loss=loss("ContinuousConsistencyLoss"), ramp_images=0
    ),
    "shortcut": lambda: modules.ShortcutModule(
        **parts(ShortcutDenoiser), loss=loss("ShortcutLoss", share=0.5)
    ),
    "reflow, new pairs": lambda: modules.ReflowModule(
        **parts(), loss=loss("ReflowLoss"), sampler=DPMSolverPP2M(), grid=uniform_u(SCHEDULE, 16)
    ),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("name", MODULES)
def test_a_bare_loop_does_the_work_of_its_method(name):
    torch.manual_seed(0)
    module, method = MODULES[name](), METHODS[name]
    adam = {"student": {"lr": 1e-3}, "auxiliary": {"lr": 1e-3}, "score": {"lr": 1e-3}}
    settings = Settings(adam=adam, batch=BATCH, clip=1.0, max_images=10**6, method=method.told)
    loop = method.loop(networks(module), settings)
    scatter([*networks(module).values(), module.loss], std=0.1)
    x0, label = torch.rand(BATCH, *SHAPE) * 2 - 1, torch.arange(BATCH) % 10
    for step in range(len(loop.turns)):
        apart, gradients_apart = agreement(module, loop, x0, {"label": label}, step)
        assert apart < 1e-4 and gradients_apart < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_that_is_timed_is_the_loops(name, teacher):
    """What `distillation_speed.py --check` asks: a recipe that changes must not leave its loop behind."""
    apart, gradients_apart = checked(name, teacher)
    assert apart < 1e-4 and gradients_apart < 1e-3


def test_a_loop_that_does_other_work_is_noticed():
    torch.manual_seed(0)
    module = MODULES["consistency"]()
    told = {**METHODS["consistency"].told, "x_var": 0.5}
    settings = Settings(adam={"student": {"lr": 1e-3}}, batch=BATCH, clip=1.0, max_images=10**6, method=told)
    loop = METHODS["consistency"].loop(networks(module), settings)
    scatter(networks(module).values(), std=0.1)
    label = torch.arange(BATCH) % 10
    apart, gradients_apart = agreement(module, loop, torch.rand(BATCH, *SHAPE), {"label": label}, 0)
    assert apart > 1e-4 and gradients_apart > 1e-3
