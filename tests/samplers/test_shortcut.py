"""The sampler of shortcut models: DDIM, which tells how many steps it takes."""

import pytest
import torch
from problems import gaussian
from torch import nn

from diffusion_lab.denoisers import NetworkDenoiser, ShortcutDenoiser, V
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.samplers import DDIM
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.samplers.shortcut import Shortcut
from diffusion_lab.typing import STEPS

VP = VariancePreserving()
SCHEDULE = Cosine(logsnr_min=-10.0, logsnr_max=10.0)


class Net(nn.Module):
    def __init__(self, scalars):
        super().__init__()
        self.conditioning = Conditioning(features=4, width=3, num_classes=2, scalars=scalars)

    def forward(self, x, logsnr, cond=None):
        self.conditioning.check(cond, "Net")
        return x + self.conditioning(logsnr, cond, len(x))


def student(finest=8):
    torch.manual_seed(0)
    return ShortcutDenoiser(network=Net([STEPS]), interpolant=VP, prediction=V(), finest=finest)


def plain():
    return NetworkDenoiser(network=Net([]), interpolant=VP, prediction=V())


def start(n=4):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def test_it_is_ddim_for_who_does_not_listen():
    x, grid = start().double(), uniform_u(SCHEDULE, 5)
    denoiser = gaussian(VP, 0.25, dim=3)
    assert torch.equal(Shortcut()(denoiser, x, grid), DDIM()(denoiser, x, grid))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_model_is_told_the_steps_of_the_grid(steps):
    model, heard = student(), []
    model.network.register_forward_hook(lambda module, inputs, output: heard.append(inputs[2][STEPS]))
    grid, cond = uniform_u(SCHEDULE, steps), {"label": torch.tensor([0, 1, 0, 1])}
    got = Shortcut()(model, start(), grid, cond=cond)
    k = torch.tensor(float(steps)).log2()
    # of 0 .. 3, about unit size
    assert len(heard) == steps and all(torch.equal(h, (k - 1.5).expand(4) / 1.25**0.5) for h in heard)
    told = {**cond, STEPS: torch.full((4,), float(steps))}
    assert torch.equal(got, DDIM()(model, start(), grid, cond=told))
    # told nothing it is the model of the shortest steps, and the answers do differ
    assert torch.equal(got, DDIM()(model, start(), grid, cond=cond)) == (steps == 8)


def test_a_guided_model_is_told_in_both_branches():
    model, heard = student(), []
    model.network.register_forward_hook(lambda module, inputs, output: heard.append(inputs[2]))
    for batched in (True, False):
        guided = ClassifierFree(model, scale=2.0, batched=batched)
        Shortcut()(guided, start(), uniform_u(SCHEDULE, 2), cond={"label": torch.tensor([0, 1, 0, 1])})
    assert (
        all(len(cond[STEPS].unique()) == 1 for cond in heard)
        and len({float(c[STEPS][0]) for c in heard}) == 1
    )
    assert {len(cond[STEPS]) for cond in heard} == {8, 4}


def test_what_does_not_fit_is_one_line():
    with pytest.raises(
        ValueError, match=r"grid\.steps=3: this shortcut model knows 1, 2, 4, 8 steps"
    ) as error:
        Shortcut()(student(), start(), uniform_u(SCHEDULE, 3))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="told no number of steps: sampler=ddim"):
        Shortcut()(plain(), start(), uniform_u(SCHEDULE, 2))
    with pytest.raises(ValueError, match="finest must be a power of two"):
        student(finest=12)
    with pytest.raises(ValueError, match=r"model.scalars=\[steps\]"):
        ShortcutDenoiser(network=Net([]), interpolant=VP, prediction=V())
