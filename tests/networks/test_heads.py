"""What whole networks do with their parts: last layers by hand, what they are told, and half precision under jvp."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusion_lab.forward_mode import jvp
from diffusion_lab.networks import layers as layers_module
from diffusion_lab.networks.embeddings import LogSNREmbedding
from tests.networks.test_networks import NETWORKS, awake, inputs


def randn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def silu(x):
    return x * torch.sigmoid(x)


# ---- last layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet", "uvit", "uvit-2", "residual_uvit", "residual_uvit-2", "vdm"])
def test_the_last_layer_of_a_convolutional_network_is_conv_silu_norm(name):
    name, _, patch = name.partition("-")
    network, seen = awake(NETWORKS[name][0](**({"patch": 2} if patch else {}))).double(), []
    network.norm_out.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    x, logsnr, cond = inputs()
    out = network(x.double(), logsnr.double(), cond)
    (h,) = seen
    norm = network.norm_out
    # groups of neighbouring channels have mean zero and variance one together
    grouped = h.reshape(4, norm.num_groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    normal = (centred / torch.sqrt(centred.square().mean(2, keepdim=True) + norm.eps)).reshape(h.shape)
    normal = normal * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(out, network.conv_out(silu(normal)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_the_last_layer_of_a_transformer_is_shifted_and_scaled_as_its_blocks_are(name, per_pixel):
    network, seen = awake(NETWORKS[name][0]()).double(), []
    network.blocks[-1].register_forward_hook(lambda module, given, out: seen.append(out))
    x, logsnr, cond = inputs()
    x, logsnr = x.double(), logsnr.double()
    if per_pixel:
        logsnr = logsnr[:, None, None, None] + randn(4, 1, 8, 8)
    out = network(x, logsnr, cond)
    # text, if there is any, stands behind the image's 16 tokens
    h = seen[0][:, :16]
    centred = h - h.mean(2, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(2, keepdim=True) + 1e-6)
    told = network.conditioning(logsnr, cond, 4)
    if per_pixel:
        # a token hears the mean of its four pixels
        told = (told[..., ::2, ::2] + told[..., 1::2, ::2] + told[..., ::2, 1::2] + told[..., 1::2, 1::2]) / 4
        told = told.flatten(2).transpose(1, 2)
    else:
        told = told[:, None]
    shift, scale = network.modulation(told).split(16, dim=2)
    # one channel, so what a token says are the pixels of its patch, row by row
    expected = F.fold(network.linear_out((1 + scale) * normal + shift).transpose(1, 2), (8, 8), 2, stride=2)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


# ---- what networks are told ------------------------------------------------------------------------------------------


def test_the_embedding_of_the_level_is_what_its_docstring_says():
    embedding = awake(LogSNREmbedding(features=16, width=8)).double()
    ratio = embedding.frequencies[1:] / embedding.frequencies[:-1]
    torch.testing.assert_close(ratio, torch.full((7,), 60.0 ** (1 / 7), dtype=torch.float64))
    assert [float(embedding.frequencies[k]) for k in (0, -1)] == pytest.approx([0.1, 6.0])
    # all of them float32 numbers
    levels = torch.tensor([-5.25, 0.0, 3.5, 30.0, 31.0, math.inf, -math.inf], dtype=torch.float64)
    held = torch.tensor([-5.25, 0.0, 3.5, 30.0, 30.0, 30.0, -30.0], dtype=torch.float64)
    angles = held[:, None] * embedding.frequencies
    first, _, last = embedding.layers
    inner = torch.cat([angles.cos(), angles.sin()], 1) @ first.weight.T + first.bias
    expected = silu(inner) @ last.weight.T + last.bias
    torch.testing.assert_close(embedding(levels), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", [8, 4, 2])
def test_a_map_of_embeddings_is_averaged_to_the_side_of_what_it_modulates(side):
    linear, told = awake(torch.nn.Linear(3, 5)).double(), randn(2, 3, 8, 8)
    each = 8 // side
    mean = sum(told[..., i::each, j::each] for i in range(each) for j in range(each)) / each**2
    expected = torch.einsum("oe,behw->bohw", linear.weight, mean) + linear.bias[:, None, None]
    found = layers_module.modulation(linear, told, torch.zeros(2, 5, side, side))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # the same everywhere it is what a level for the whole image gives
    flat = layers_module.modulation(linear, told[..., 0, 0], torch.zeros(2, 5, side, side))
    assert flat.shape == (2, 5, 1, 1)
    torch.testing.assert_close(flat[..., 0, 0], told[..., 0, 0] @ linear.weight.T + linear.bias)


TAKES = {name: ("label", "text", "image", "angle") for name in NETWORKS} | {
    "edm2": ("label", "image", "angle"),
    "mlp": ("label", "angle"),
}
OPTIONS = {"text": {"token_width": 6}, "image": {"image_channels": 2}, "angle": {"scalars": ("angle",)}}


def told_all(name):
    """A network that takes all that its kind can take, with a batch and all of that."""
    make, shape = NETWORKS[name]
    takes = TAKES[name]
    network = awake(make(**{k: v for key in takes for k, v in OPTIONS.get(key, {}).items()})).double()
    x, _, cond = inputs(shape=shape)
    # float32 numbers, because levels are embedded in float32
    logsnr = torch.tensor([-5.0, -1.25, 1.5, 5.0], dtype=torch.float64)
    everything = {
        "label": cond["label"],
        "text": randn(4, 5, 6),
        "image": randn(4, 2, 8, 8, seed=3),
        "angle": torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64),
    }
    cond = {key: everything[key] for key in takes}
    if "text" in takes:
        cond["text_mask"] = (
            torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]]) > 0
        )
    return network, x.double(), logsnr, cond


@pytest.mark.parametrize("name", NETWORKS)
def test_conditions_are_heard_beside_each_other(name):
    network, x, logsnr, cond = told_all(name)
    told = network(x, logsnr, cond)

    def change(other):
        """What a batch is told otherwise, for each example."""
        return (network(x, logsnr, other) - told).abs().flatten(1).amax(1)

    enough = 1e-3 * float(told.abs().max())
    for key, value in cond.items():
        # not given, and given otherwise to the first example alone
        assert bool((change({k: v for k, v in cond.items() if k != key}) > enough).all()), key
        other = value.clone()
        if key == "label":
            other[0] = 1
        elif key == "text_mask":
            other[0, 3] = True
        else:
            other[0] *= -1.0
        moved = change({**cond, key: other})
        assert float(moved[0]) > enough and float(moved[1:].max()) < 1e-10, key
    if "text" in cond:
        # what is masked is not heard, whatever else is
        other = cond["text"].clone()
        other[~cond["text_mask"]] *= -1.0
        assert float(change({**cond, "text": other}).max()) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_mode_along_the_level_is_the_derivative(name):
    network, x, logsnr, cond = told_all(name)
    network.requires_grad_(False)
    along = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64)
    value, slope = jvp(lambda level: network(x, level, cond), (logsnr,), (along,))
    torch.testing.assert_close(value, network(x, logsnr, cond), rtol=1e-9, atol=1e-10)
    # a step that float32 has, and the rule of five points: its error is h^4 times a fifth derivative over thirty
    h = 2.0**-10
    at = {k: network(x, logsnr + k * h * along, cond) for k in (-2, -1, 1, 2)}
    numeric = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    assert float(slope.abs().flatten(1).amax(1).min()) > 1e-3
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-6 * float(slope.abs().max()))


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet", "uvit", "vdm"])
def test_forward_mode_goes_through_autocast(name):
    network = awake(NETWORKS[name][0]()).requires_grad_(False)
    x, logsnr, cond = inputs()
    tangent = randn(*x.shape).float()

    def both():
        return jvp(lambda z: network(z, logsnr, cond), (x,), (tangent,))

    full = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = both()
    assert low[0].dtype == torch.bfloat16, "autocast was on"
    for rough, exact in zip(low, full, strict=True):
        assert float((rough.float() - exact).norm()) < 0.05 * float(exact.norm())
