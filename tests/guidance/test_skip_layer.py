"""Skip-layer guidance: a skipped layer is one whose branch is zero, on shared weights; and what may not be skipped."""

import math
import re
from functools import partial

import pytest
import torch
from problems import ALL_SAMPLERS, INTERPOLANTS, mixture_1d
from torch import nn

from diffusion_lab.denoisers import NetworkDenoiser
from diffusion_lab.denoisers.prediction import V
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.guidance.skip_layer import SkipLayer, find_layers, skipping
from diffusion_lab.networks import MLP, UNet
from diffusion_lab.networks.layers import AttentionBlock
from diffusion_lab.process import Cosine
from diffusion_lab.samplers import CountingDenoiser, Generation
from diffusion_lab.samplers.grids import uniform_u

GRID = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 12)
VP = INTERPOLANTS["vp"]
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LEVEL = torch.tensor([-2.0, 0.3, 4.0])
LABEL = {"label": torch.tensor([0, 1, -1])}
each = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())


def randomised(network):
    """No weight is zero, so that every layer matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan))
    return network.eval()


def denoiser_of(network, interpolant=VP):
    return NetworkDenoiser(network=network, interpolant=interpolant, prediction=V(), sigma_data=0.5)


def unet():
    small = UNet(
        in_channels=1,
        size=8,
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        attention=(4,),
        head_channels=4,
        num_classes=2,
    )
    return denoiser_of(randomised(small))


@torch.no_grad()
def ask(denoiser, x=X, level=LEVEL, cond=LABEL):
    return denoiser(x, level, cond)


def test_attention_skipped_is_attention_whose_output_is_zero():
    whole, zeroed = unet(), unet()
    blocks = [m for m in zeroed.network.modules() if isinstance(m, AttentionBlock)]
    for block in blocks:
        nn.init.zeros_(block.out.weight)
        nn.init.zeros_(block.out.bias)
    skipped = ask(skipping(whole, ["*attention*"]))
    torch.testing.assert_close(skipped, ask(zeroed), rtol=0, atol=1e-6)
    assert len(blocks) == len(find_layers(whole.network, ["*attention*"])) == 4
    assert float((skipped - ask(whole)).abs().max()) > 0.05


def test_a_residual_block_skipped_is_one_whose_branch_is_zero():
    whole, zeroed = unet(), unet()
    for name in ("middle.1.block", "down.0.block"):
        conv = zeroed.network.get_submodule(name).conv_out
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    # by its own name, and as the stage around it that has no attention
    skipped = ask(skipping(whole, ["middle.1.block", "down.0"]))
    torch.testing.assert_close(skipped, ask(zeroed), rtol=0, atol=1e-6)
    assert float((skipped - ask(whole)).abs().max()) > 0.05


def test_weights_are_shared_and_the_network_is_left_alone():
    whole = unet()
    before = ask(whole)
    weak = skipping(whole, ["*attention*"])
    pairs = list(zip(whole.network.named_parameters(), weak.network.named_parameters(), strict=True))
    pairs += list(zip(whole.network.named_buffers(), weak.network.named_buffers(), strict=True))
    assert len(pairs) > 50
    assert all(a == b and p.data_ptr() == q.data_ptr() for (a, p), (b, q) in pairs)
    ask(weak)
    assert torch.equal(ask(whole), before)
    assert not any("forward" in vars(m) or m._forward_hooks for m in whole.network.modules())
    # what an optimizer or an average writes is seen at once
    answer = ask(weak)
    with torch.no_grad():
        whole.network.conv_in.weight.mul_(2.0)
    assert not torch.equal(ask(weak), answer)


def test_guided_is_the_lerp_from_the_skipped():
    whole, layers = unet(), ["middle.*.attention"]
    weak, strong = ask(skipping(whole, layers)), ask(whole)
    guided = ask(SkipLayer(whole, layers, 2.5))
    torch.testing.assert_close(guided, weak + 2.5 * (strong - weak), rtol=0, atol=1e-5)
    assert guided.dtype == torch.float32 and not torch.allclose(guided, strong, atol=1e-2)
    assert torch.equal(ask(SkipLayer(whole, layers, 2.5, (-math.inf, 9.0))), guided)


def test_off_is_the_denoiser_with_one_evaluation_and_counts_are_true():
    counting, layers = CountingDenoiser(unet(), batch=3), ["*attention*"]
    expected = ask(counting.denoiser)
    for scale, interval, calls in (
        (1.0, (-9.0, 9.0), 1),
        (3.0, (5.0, 9.0), 1),
        (3.0, (-9.0, 9.0), 2),
        (0.0, (-9, 9), 1),
    ):
        counting.calls = 0
        x0 = ask(SkipLayer(counting, layers, scale, interval))
        assert counting.calls == calls
        assert torch.equal(x0, expected) == (scale == 1.0 or interval[0] == 5.0)
    assert torch.equal(x0, ask(skipping(counting.denoiser, layers)))  # scale 0


def test_a_recipe_knows_its_cost():
    inside = int(((GRID[:-1] >= -1.0) & (GRID[:-1] <= 4.0)).sum())
    guidance = partial(SkipLayer, layers=["*attention*"], scale=2.0, interval=(-1.0, 4.0))
    recipe = Generation(sampler=ALL_SAMPLERS["ddim"], grid=GRID, guidance=guidance, shape=(1, 8, 8))
    assert recipe.nfe(VP) == 12 + inside and inside > 0
    counting = CountingDenoiser(unet(), batch=2)
    recipe(counting, seeds=range(2))
    assert counting.calls == 12 + inside


def test_the_weak_answer_is_below_other_guidance():
    whole, layers = unet(), ["*attention*"]
    guided, weak = ask(ClassifierFree(whole, 3.0)), ask(skipping(whole, layers))
    x0 = ask(SkipLayer(ClassifierFree(whole, 3.0), layers, 2.0))
    torch.testing.assert_close(x0, weak + 2.0 * (guided - weak), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["vp", "rf"])
def test_pure_noise_is_finite(name, dtype):
    denoiser = denoiser_of(unet().network, INTERPOLANTS[name])
    denoiser.network.to(torch.float32)
    level = torch.full((3,), -math.inf)
    x0 = ask(SkipLayer(denoiser, ["*attention*"], 2.0), X, level)
    assert x0.dtype == torch.float32 and bool(torch.isfinite(x0).all())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["down.7.attention"], "no layer 'down.7.attention'"),
        (["*attention*", "nothing*"], r"no layer 'nothing\*'"),
        ([], "name a list"),
        ("*attention*", "name a list"),
        (
            ["up.0.block"],
            "'up.0.block' changes the shape",  # its input has a skip connection beside it
        ),
        (["down.1"], r"'down.1' changes the shape"),  # halves the resolution
        (["up.*"], r"'up.0' changes the shape"),
    ],
)
def test_what_cannot_be_skipped_is_one_clear_error(layers, message):
    # what is offered are the blocks that keep shapes
    offered = (
        "down.0, down.0.block, down.2.attention, middle.0, middle.0.block, middle.0.attention, middle.1, "
    )
    offered += "middle.1.block, up.0.attention, up.1.attention"
    with pytest.raises(ValueError, match=message + ".*: it has " + re.escape(offered) + "$"):
        SkipLayer(unet(), layers, 2.0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("down.2.attention.qkv", r"\(3, 48, 4, 4\) of \(3, 16, 4, 4\)"),
        ("conditioning.label_embedding", r"'conditioning.label_embedding' makes \(3, 32\) of no tensor"),
        ("conditioning.level_embedding", r"\(3, 32\) of \(3,\)"),
    ],
)
def test_shapes_are_compared_at_the_first_call(layer, message):
    guided = SkipLayer(unet(), [layer], 2.0)
    with pytest.raises(ValueError, match=message):
        ask(guided)


def test_a_denoiser_without_a_network_is_an_error():
    with pytest.raises(ValueError, match="GaussianMixtureDenoiser has none"):
        SkipLayer(CountingDenoiser(mixture_1d(VP)), ["*"], 2.0)


def test_of_nested_matches_the_outermost_is_skipped():
    network = unet().network
    # a list of modules is no layer, what it holds is
    assert set(find_layers(network, ["middle*"])) == {"middle.0", "middle.1"}
    assert set(find_layers(network, ["middle.0.attention.*", "middle.0.attention"])) == {"middle.0.attention"}
    assert set(find_layers(randomised(MLP(dim=2, width=8, depth=3)), ["blocks.1"])) == {"blocks.1"}


class Elementwise(nn.Module):
    """A network whose last bits do not depend on the batch."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Bend(0.5), Bend(-0.7)])

    def forward(self, x, logsnr, cond=None):
        for block in self.blocks:
            x = block(x)
        return x


class Bend(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return x + self.weight * x / (1 + x.abs())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
@each
def test_runs_with_samplers_and_splits_of_the_batch(interpolant, sampler):
    denoiser = denoiser_of(Elementwise(), interpolant)
    ends = []
    for layers in (["blocks.1"], ["blocks.*"]):
        guidance = partial(SkipLayer, layers=layers, scale=2.0, interval=(-4.0, 6.0))
        recipe = Generation(sampler=ALL_SAMPLERS[sampler], grid=GRID, guidance=guidance, shape=(5,))
        whole = recipe(denoiser, seeds=range(8))
        assert torch.equal(
            whole, torch.cat([recipe(denoiser, seeds=range(3)), recipe(denoiser, seeds=range(3, 8))])
        )
        assert whole.dtype == torch.float32 and bool(torch.isfinite(whole).all())
        ends.append(whole)
    assert not torch.equal(*ends)
