"""U-ViT: its transformer blocks, which blocks have skip connections and dropout, patches, and the published size."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.networks import UNet, UViT
from diffusion_lab.networks.layers import ResidualBlock
from diffusion_lab.networks.vit_blocks import Down, TransformerBlock, Up, patch_in, patch_out
from tests.networks.test_networks import awake

SMALL = dict(
    in_channels=1, size=16, patch=1, channels=8, multipliers=(1, 2, 4), blocks=(2, 1, 2), head_channels=8, embedding=32
)  # fmt: skip


def uvit(**options):
    return UViT(**{**SMALL, **options})


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)


def test_transformer_block_is_what_its_docstring_says():
    block = awake(TransformerBlock(channels=16, head_channels=8, embedding=12, mlp_ratio=3)).double()
    x, embedding = randn(2, 16, 4, 6), randn(2, 12, seed=1)
    scale_a, shift_a, scale_m, shift_m = block.modulation(embedding)[:, None].split(16, dim=2)
    h = x.permute(0, 2, 3, 1).reshape(2, 24, 16)
    q, k, v = block.qkv((1 + scale_a) * layer_norm(h) + shift_a).split(16, dim=2)
    heads = []
    for c in (slice(0, 8), slice(8, 16)):
        qc, kc = (
            t[..., c] / torch.sqrt(t[..., c].square().mean(-1, keepdim=True) + 1e-6) * norm.weight
            for t, norm in ((q, block.norm_q), (k, block.norm_k))
        )
        weights = torch.softmax(torch.einsum("bic,bjc->bij", qc, kc) / math.sqrt(8), dim=-1)
        heads.append(torch.einsum("bij,bjc->bic", weights, v[..., c]))
    h = h + block.out(torch.cat(heads, 2))
    h = h + block.mlp_out(F.gelu(block.mlp_in((1 + scale_m) * layer_norm(h) + shift_m)))
    expected = h.reshape(2, 4, 6, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-10, atol=1e-12)
    # either order of memory
    innermost = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(innermost, embedding), expected, rtol=1e-10, atol=1e-12)


def test_a_transformer_does_not_know_where_it_is_but_the_network_does():
    block = awake(TransformerBlock(channels=16, head_channels=8, embedding=12)).double()
    x, embedding = randn(2, 16, 4, 4), randn(2, 12, seed=1)
    torch.testing.assert_close(block(x.mT, embedding), block(x, embedding).mT, rtol=1e-10, atol=1e-12)
    network = uvit()
    assert network.positions.table.shape == (1, 32, 4, 4) and not network.positions.table.any()


def test_a_transformer_block_is_the_identity_at_initialisation():
    block = TransformerBlock(channels=16, head_channels=8, embedding=12, token_width=5)
    x = randn(2, 16, 4, 4).float()
    tokens = (randn(2, 3, 5).float(), torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(block(x, torch.zeros(2, 12), tokens), x)
    with pytest.raises(ValueError, match="head_channels=6 does not divide the 16"):
        TransformerBlock(channels=16, head_channels=6, embedding=12)


def test_levels_are_averaged_down_and_repeated_up():
    x = randn(2, 6, 4, 4)
    down, up = awake(Down(6, 3)).double(), awake(Up(6, 3)).double()
    means = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(down(x), torch.einsum("oc,bcij->boij", down.conv.weight[..., 0, 0], means))
    mixed = torch.einsum("oc,bcij->boij", up.conv.weight[..., 0, 0], x)
    torch.testing.assert_close(up(x), mixed.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert torch.equal(up(torch.zeros_like(x)), torch.zeros(2, 3, 8, 8).double())


def test_every_convolutional_block_has_one_skip_connection_and_the_transformer_none():
    network = awake(uvit())
    outputs, joined = [], []
    for level in network.down:
        for block in level:
            block.register_forward_hook(lambda m, given, out: outputs.append(out))
    for level in network.up:
        for block in level:
            block.register_forward_pre_hook(lambda m, given: joined.append(given[0]))
    network(randn(2, 1, 16, 16).float(), torch.zeros(2), None)
    assert len(outputs) == len(joined) == 3
    for out, x in zip(outputs, reversed(joined), strict=True):
        assert x.shape[1] == 2 * out.shape[1] and torch.equal(x[:, out.shape[1] :], out)
    assert [type(block) for block in network.middle] == [TransformerBlock] * 2


def dropout_by_side(network, size):
    """Dropout probabilities that act on feature maps of each side."""
    found = {}
    blocks = [m for m in network.modules() if isinstance(m, ResidualBlock | TransformerBlock)]
    for block in blocks:
        block.register_forward_hook(
            lambda m, given, out: found.setdefault(out.shape[-1], set()).add(m.dropout.p)
        )
    network(torch.zeros(1, 1, size, size), torch.zeros(1), None)
    return found


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (None, {16: {0.3}, 8: {0.3}, 4: {0.3}}),
        (8, {16: {0.0}, 8: {0.3}, 4: {0.3}}),
        (4, {16: {0.0}, 8: {0.0}, 4: {0.3}}),
        (2, {16: {0.0}, 8: {0.0}, 4: {0.0}}),
    ],
)
def test_dropout_stays_away_from_large_feature_maps(largest, expected):
    options = dict(dropout=0.3, dropout_max_side=largest)
    assert dropout_by_side(uvit(**options), 16) == expected
    # the sides are those of feature maps, not of images
    assert dropout_by_side(uvit(size=32, patch=2, **options), 32) == expected
    unet = UNet(
        in_channels=1, size=16, channels=8, multipliers=(1, 2, 4), blocks=1, head_channels=8, **options
    )
    assert dropout_by_side(unet, 16) == expected


def test_a_unet_has_as_many_blocks_a_level_as_it_is_told():
    sizes = dict(in_channels=1, size=16, channels=8, multipliers=(1, 2, 4), head_channels=8)
    network = UNet(**sizes, blocks=(1, 3, 2))
    sides = []
    for stage in [*network.down, *network.up]:
        if stage.block.change == "none":
            stage.register_forward_hook(lambda m, given, out: sides.append(out.shape[-1]))
    assert not network(torch.zeros(1, 1, 16, 16), torch.zeros(1), None).any()
    assert sides == [16, 8, 8, 8, 4, 4, *[4] * 3, *[8] * 4, *[16] * 2]
    # one number is that many everywhere
    one, each = (list(UNet(**sizes, blocks=b).state_dict()) for b in (2, (2, 2, 2)))
    assert one == each
    with pytest.raises(ValueError, match="blocks has 2 numbers, but there are 3 levels"):
        UNet(**sizes, blocks=(1, 2))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_cut_and_put_back_in_their_places(patch):
    x = randn(2, 3, 16, 16)
    cut, back = awake(patch_in(3, 5, patch)).double(), awake(patch_out(5, 3, patch)).double()
    h = cut(x)
    assert h.shape == (2, 5, 16 // patch, 16 // patch) and back(h).shape == x.shape
    assert not any(p.any() for p in patch_out(5, 3, patch).parameters())
    if patch > 1:
        # a patch is a linear function of its own pixels, and the other way round
        patches = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3)
        torch.testing.assert_close(h.permute(0, 2, 3, 1), F.linear(patches, cut.weight.flatten(1), cut.bias))
        pixels = (h.permute(0, 2, 3, 1) @ back.weight.flatten(1)).unflatten(3, (3, patch, patch))
        expected = pixels.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16) + back.bias[:, None, None]
        torch.testing.assert_close(back(h), expected)
    network = awake(uvit(size=16 * patch, patch=patch))
    images = randn(2, 1, 16 * patch, 16 * patch).float()
    assert network(images, torch.zeros(2), None).shape == images.shape


def test_impossible_sizes_are_refused():
    for wrong, message in (
        ({"size": 18}, "side 18 cannot be cut into patches of 1 and halved 2 times"),
        ({"patch": 8}, "side 16 cannot be cut into patches of 8"),
        ({"blocks": (1, 1)}, "blocks has 2 numbers, but there are 3 levels"),
    ):
        with pytest.raises(ValueError, match=message):
            uvit(**wrong)


@pytest.mark.parametrize(("size", "patch"), [(128, 1), (256, 2), (512, 4)])
def test_published_size_and_compute(size, patch):
    # "2B" parameters, and 555 billion multiplications a call for U-ViT/4 at 512x512 in simple diffusion's tables
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = UViT(
            in_channels=3,
            size=size,
            patch=patch,
            channels=128,
            multipliers=(1, 2, 4, 16),
            blocks=(2, 2, 2, 36),
            head_channels=512,
            embedding=1024,
            num_classes=1000,
        )
        network(torch.zeros(1, 3, size, size), torch.zeros(1), None)
    assert round(sum(p.numel() for p in network.parameters()) / 1e9) == 2
    assert counter.get_total_flops() / 2 == pytest.approx(555e9, rel=0.015)
    assert isinstance(network.conv_out, nn.Conv2d if patch == 1 else nn.ConvTranspose2d)
