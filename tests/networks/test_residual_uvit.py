"""Residual U-ViT: a level that does nothing is the identity, its derivative, and how little it keeps for the way up."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.networks import ResidualUViT, UViT
from diffusion_lab.networks.layers import ResidualBlock
from diffusion_lab.networks.residual_uvit import Blocks, Level
from diffusion_lab.networks.vit_blocks import Down, TransformerBlock
from tests.networks.test_networks import awake

SMALL = dict(
    in_channels=1, size=16, patch=1, channels=8, multipliers=(1, 2, 4), blocks=(2, 1, 2), head_channels=8, embedding=32
)  # fmt: skip


def residual_uvit(**options):
    return ResidualUViT(**{**SMALL, **options})


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Inner(nn.Module):
    """A function of a feature map in place of the rest of the network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, embedding, tokens):
        return self.function(x)


def level(function):
    nothing = [Blocks([], checkpointing=False) for _ in range(2)]
    made = Level(before=nothing[0], inner=Inner(function), after=nothing[1], channels=3, inner_channels=5)
    return awake(made).double()


def test_a_level_around_nothing_is_the_identity_bit_for_bit():
    h = randn(2, 3, 4, 4)
    assert torch.equal(level(lambda g: g)(h, randn(2, 8)), h)
    assert not torch.allclose(level(lambda g: 1.01 * g)(h, randn(2, 8)), h)
    # and so is the whole network between its patches, before it has learned anything
    network = residual_uvit(transformer_levels=2)
    x = randn(2, 8, 16, 16).float()
    assert torch.equal(network.body(x, torch.randn(2, 32), None), x)


def test_a_level_is_its_input_and_what_the_inside_changed():
    h = randn(2, 3, 4, 4)
    made = level(torch.sin)
    g = made.down(h)
    torch.testing.assert_close(made(h, randn(2, 8)), h + made.up(torch.sin(g) - g), rtol=0, atol=0)


def test_its_jacobian_is_one_and_up_times_that_of_the_inside_less_one():
    """d/dg up(u - g) = up o (J_inner - 1), and the chain rule through down: I + U (J - I) D."""
    mix = randn(5, 5, seed=3)

    def inner(g):
        return torch.tanh(torch.einsum("oc,bcij->boij", mix, g)) * 2.0

    made = level(inner)
    h = randn(1, 3, 4, 4)
    g = made.down(h).detach()

    def jacobian(f, x):
        found = torch.autograd.functional.jacobian(f, x)
        return found.reshape(-1, x.numel())

    U, D, J = jacobian(made.up, g), jacobian(made.down, h), jacobian(inner, g)
    of_difference = jacobian(lambda g: made.up(inner(g) - g), g)
    torch.testing.assert_close(of_difference, U @ (J - torch.eye(20).double()), rtol=1e-10, atol=1e-12)
    whole = jacobian(lambda h: made.around(h, randn(1, 8)), h)
    expected = torch.eye(48).double() + U @ (J - torch.eye(20).double()) @ D
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12)


def kept_for_the_way_up(network):
    """(number, bytes) of feature maps that are alive when the transformer in the middle begins, without gradients."""
    made, found = [], []
    for module in network.modules():
        if isinstance(module, ResidualBlock | Down):
            module.register_forward_hook(lambda m, given, out: made.append(weakref.ref(out)))

    def count(module, given):
        alive = {id(t): t for t in (ref() for ref in made) if t is not None and t is not given[0]}
        found.append((len(alive), sum(t.numel() * t.element_size() for t in alive.values())))

    next(m for m in network.modules() if isinstance(m, TransformerBlock)).register_forward_pre_hook(count)
    with torch.no_grad():
        network(torch.zeros(2, 1, 16, 16), torch.zeros(2), None)
    return found[0]


def test_what_is_kept_grows_with_levels_and_not_with_blocks():
    def of(make, blocks):
        return kept_for_the_way_up(awake(make(**{**SMALL, "blocks": (blocks, blocks, 1)})))

    for blocks in (1, 2, 5):
        number, size = of(ResidualUViT, blocks)
        # two levels, each with h and g = down(h): 2 examples x 4 bytes x (8 x 16^2 + 16 x 8^2, 16 x 8^2 + 32 x 4^2)
        assert (number, size) == (4, 8 * (2048 + 1024 + 1024 + 512))
        number, size = of(UViT, blocks)
        assert number - 1 <= 2 * blocks <= number
        assert 8 * blocks * (2048 + 1024) <= size <= 8 * (blocks * (2048 + 1024) + 512)


def test_there_are_transformers_where_asked_for():
    def kinds(**options):
        network = residual_uvit(**options)
        seen = []
        for m in network.modules():
            if isinstance(m, ResidualBlock | TransformerBlock):
                m.register_forward_hook(
                    lambda m, given, out: seen.append((type(m).__name__[0], out.shape[-1]))
                )
        network(torch.zeros(1, 1, 16, 16), torch.zeros(1), None)
        return seen

    R, T = "R", "T"
    assert kinds() == [(R, 16)] * 2 + [(R, 8)] + [(T, 4)] * 2 + [(R, 8)] + [(R, 16)] * 2
    assert kinds(transformer_levels=2) == [(R, 16)] * 2 + [(T, 8)] + [(T, 4)] * 2 + [(T, 8)] + [(R, 16)] * 2
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=rf"transformer_levels must be 1 .. 3, got {wrong}"):
            residual_uvit(transformer_levels=wrong)
    with pytest.raises(ValueError, match="blocks has 2 numbers"):
        residual_uvit(blocks=(1, 1))


@pytest.mark.parametrize("patch", [2, 4])
def test_patches(patch):
    network = awake(residual_uvit(size=16 * patch, patch=patch))
    x = randn(2, 1, 16 * patch, 16 * patch).float()
    assert network(x, torch.zeros(2), None).shape == x.shape


def test_dropout_stays_away_from_large_feature_maps():
    network = residual_uvit(dropout=0.3, dropout_max_side=8)
    by_side = {}
    for m in network.modules():
        if isinstance(m, ResidualBlock | TransformerBlock):
            m.register_forward_hook(
                lambda m, given, out: by_side.setdefault(out.shape[-1], set()).add(m.dropout.p)
            )
    network(torch.zeros(1, 1, 16, 16), torch.zeros(1), None)
    assert by_side == {16: {0.0}, 8: {0.3}, 4: {0.3}}


@pytest.mark.parametrize(
    ("size", "patch", "published"), [(256, 2, 137), (256, 1, 653), (512, 4, 137), (512, 2, 653)]
)
def test_a_ports_widths_give_the_published_compute(size, patch, published):
    # billions of multiplications a call that tables of later papers quote; the widths are a public port's
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = ResidualUViT(
            in_channels=3,
            size=size,
            patch=patch,
            channels=128,
            multipliers=(1, 2, 4, 8),
            blocks=(3, 3, 3, 16),
            transformer_levels=2,
            head_channels=128,
            embedding=1024,
            num_classes=1000,
        )
        network(torch.zeros(1, 3, size, size), torch.zeros(1), None)
    assert counter.get_total_flops() / 2 == pytest.approx(published * 1e9, rel=0.015)
