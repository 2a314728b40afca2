"""DiT and its block: the paper's sizes and equations, diffusers' block, and what the block adds to them."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.guidance import SkipLayer
from diffusion_lab.guidance.skip_layer import find_layers
from diffusion_lab.networks import DiT, MMDiT
from diffusion_lab.networks.dit import positions
from diffusion_lab.networks.mmdit import MMDiTBlock
from diffusion_lab.networks.transformer import DiTBlock
from diffusion_lab.networks.vit_blocks import TransformerBlock
from diffusion_lab.process import VariancePreserving
from tests.networks.test_networks import awake

G = torch.Generator().manual_seed(5)
TEXT = {DiT: {}, MMDiT: {"token_width": 6}}


def randn(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


# Peebles & Xie 2023, table 4: millions of parameters, and billions of multiplications with their additions
PUBLISHED = {
    "S/2": (384, 12, 6, 2, 33, 6.06),
    "B/2": (768, 12, 12, 2, 130, 23.01),
    "L/2": (1024, 24, 16, 2, 458, 80.71),
    "XL/2": (1152, 28, 16, 2, 675, 118.64),
    "XL/4": (1152, 28, 16, 4, None, 29.05),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    width, depth, heads, patch, millions, billions = PUBLISHED[name]
    with torch.device("meta"):
        network = DiT(
            in_channels=4,
            size=32,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            num_classes=1000,
            out_channels=8,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 4, 32, 32), torch.zeros(1), None)
    assert millions in (None, round(sum(p.numel() for p in network.parameters()) / 1e6))
    # matrix products alone, which is all but a thousandth of what they count
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(("depth", "billions"), [(24, 2), (38, 8)])
def test_sizes_of_sd3(depth, billions):
    # Esser et al. 2024, section 5.3: "2B" and "8B" at depths 24 and 38
    with torch.device("meta"):
        network = MMDiT(
            in_channels=16, size=128, patch=2, width=64 * depth, depth=depth, heads=depth, token_width=4096
        )
    assert round(sum(p.numel() for p in network.parameters()) / 1e9) == billions


def by_hand(block, h, embedding):
    """The equations of the module's docstring, a head at a time."""
    c = h.shape[-1]
    s1, k1, g1, s2, k2, g2 = (v[:, None] for v in block.modulation(embedding).split(c, dim=1))

    def norm(h):
        centred = h - h.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    q, k, v = block.attend.qkv((1 + k1) * norm(h) + s1).split(c, dim=2)
    size, heads = c // block.attend.heads, []
    for i in range(block.attend.heads):
        a, b, d = (t[..., i * size : (i + 1) * size] for t in (q, k, v))
        heads.append(torch.softmax(a @ b.transpose(1, 2) / math.sqrt(size), dim=-1) @ d)
    h = h + g1 * block.out(torch.cat(heads, 2))
    inner = F.gelu(block.mlp[0]((1 + k2) * norm(h) + s2), approximate="tanh")
    return h + g2 * block.mlp[3](inner)


def test_block_is_what_its_docstring_says():
    block = awake(DiTBlock(width=16, heads=2, embedding=8)).double()
    h, embedding = randn(3, 5, 16), randn(3, 8)
    torch.testing.assert_close(block(h, embedding), by_hand(block, h, embedding), rtol=1e-10, atol=1e-12)
    # an embedding a token, all alike
    each = embedding[:, None].expand(3, 5, 8)
    torch.testing.assert_close(block(h, each), block(h, embedding), rtol=1e-10, atol=1e-12)


def test_block_is_that_of_diffusers():
    attention = pytest.importorskip("diffusers.models.attention")
    c, heads = 16, 2
    theirs = awake(
        attention.BasicTransformerBlock(
            c, heads, c // heads, num_embeds_ada_norm=3, norm_type="ada_norm_zero", activation_fn="gelu-approximate",
            attention_bias=True, norm_elementwise_affine=False, norm_eps=1e-6,
        )
    ).double()  # fmt: skip
    theirs.norm1.norm.eps = 1e-6
    ours = DiTBlock(width=c, heads=heads, embedding=c).double()
    with torch.no_grad():
        ours.modulation.load_state_dict(theirs.norm1.linear.state_dict())
        for part in ("weight", "bias"):
            qkv = torch.cat([getattr(getattr(theirs.attn1, f"to_{n}"), part) for n in "qkv"])
            getattr(ours.attend.qkv, part).copy_(qkv)
        ours.out.load_state_dict(theirs.attn1.to_out[0].state_dict())
        ours.mlp[0].load_state_dict(theirs.ff.net[0].proj.state_dict())
        ours.mlp[3].load_state_dict(theirs.ff.net[2].state_dict())
    h, t, label = randn(3, 5, c), torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0, 1, 2])
    embedding = F.silu(theirs.norm1.emb(t, label, hidden_dtype=torch.float64)).double()
    expected = theirs(h, timestep=t, class_labels=label)
    torch.testing.assert_close(ours(h, embedding), expected, rtol=1e-10, atol=1e-12)


def test_blocks_do_nothing_at_initialisation():
    block = DiTBlock(width=16, heads=2, embedding=8, qk_norm=True, token_width=6).double()
    h = randn(3, 5, 16)
    tokens = (randn(3, 2, 6), torch.ones(3, 2, dtype=torch.bool))
    assert torch.equal(block(h, randn(3, 8), tokens), h)


def test_normalised_queries_and_keys_do_not_care_how_long_they_are():
    block = awake(DiTBlock(width=16, heads=2, embedding=8, qk_norm=True)).double()
    h, embedding = randn(3, 5, 16), randn(3, 8)
    before = block(h, embedding)
    with torch.no_grad():
        block.attend.qkv.weight[:32] *= 7.0
        block.attend.qkv.bias[:32] *= 7.0
    torch.testing.assert_close(block(h, embedding), before, rtol=1e-5, atol=1e-5)


def test_positions_are_the_published_ones():
    # facebookresearch/DiT: the first half tells the column, the second the row; sines before cosines
    width, side = 12, 3
    table = positions(width, side)
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (k / (width // 4)) for k in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * side + column], torch.tensor(expected))
    assert torch.unique(positions(64, 16), dim=0).shape[0] == 256


def test_pixels_come_back_where_they_were():
    """With the patches' own pixels as tokens and a last layer that hands them on, the image returns."""
    network = DiT(in_channels=2, size=6, patch=2, width=8, depth=0, heads=1).double()
    with torch.no_grad():
        network.patch_in.weight.copy_(torch.eye(8).reshape(8, 2, 2, 2))
        network.patch_in.bias.zero_()
        network.place.zero_()
        # a token is (channel, row, column), what comes out (row, column, channel)
        order = torch.arange(8).reshape(2, 2, 2).permute(1, 2, 0).flatten()
        network.linear_out.weight.copy_(torch.eye(8)[order])
    x = randn(3, 2, 6, 6)
    tokens = F.unfold(x, 2, stride=2).transpose(1, 2)
    normal = F.layer_norm(tokens, (8,), eps=1e-6).transpose(1, 2)
    expected = F.fold(normal, (6, 6), 2, stride=2)
    torch.testing.assert_close(network(x, torch.zeros(3).double()), expected, rtol=1e-10, atol=1e-12)


def test_a_patch_has_the_level_of_its_own_pixels():
    # without blocks nothing mixes, so only the patch whose pixels have another level may answer otherwise
    network = awake(DiT(in_channels=1, size=6, patch=2, width=8, depth=0, heads=1)).double()
    x, level = randn(1, 1, 6, 6), torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    other = level.clone()
    other[..., 0:2, 4:6] = 3.0
    change = (network(x, other) - network(x, level))[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).abs().amax((2, 3))
    assert bool(change[0, 2]) and torch.count_nonzero(change) == 1


@pytest.mark.parametrize("kind", [DiT, MMDiT])
def test_every_place_is_told_apart(kind):
    network = awake(kind(in_channels=1, size=8, patch=2, width=16, depth=1, heads=2, **TEXT[kind])).double()
    out = network(torch.ones(1, 1, 8, 8, dtype=torch.float64), torch.zeros(1).double())
    patches = F.unfold(out, 2, stride=2)[0].T
    assert float(torch.pdist(patches).min()) > 1e-3


@pytest.mark.parametrize("kind", [DiT, MMDiT])
def test_options_arrive(kind):
    sizes = dict(in_channels=1, size=8, patch=2, width=16, depth=3, heads=2, **TEXT[kind])
    network = kind(**sizes, out_channels=2, mlp_ratio=2.5, qk_norm=True)
    assert network(torch.zeros(1, 1, 8, 8), torch.zeros(1)).shape == (1, 2, 8, 8)
    assert 2 * len(network.conditioning.level_embedding.frequencies) == 256
    for block in network.blocks:
        stream = block.image if kind is MMDiT else block
        assert isinstance(stream.attend.norm_q, torch.nn.RMSNorm) and stream.mlp[0].out_features == 40
    for block in kind(**sizes, qk_norm=False).blocks:
        stream = block.image if kind is MMDiT else block
        assert isinstance(stream.attend.norm_q, torch.nn.Identity) and stream.mlp[0].out_features == 64


def test_dropout_only_while_training():
    network = awake(DiT(in_channels=1, size=8, patch=2, width=16, depth=1, heads=2, dropout=0.5))
    x, level = torch.ones(1, 1, 8, 8), torch.zeros(1)
    assert torch.equal(network(x, level), network(x, level))
    network.train()
    assert not torch.equal(network(x, level), network(x, level))


@pytest.mark.parametrize("kind", [DiT, MMDiT])
def test_checkpointing_keeps_less(kind):
    kept = []
    for checkpointing in (False, True):
        sizes = dict(in_channels=1, size=8, patch=2, width=16, depth=6, heads=2, **TEXT[kind])
        network, numbers = awake(kind(**sizes, checkpointing=checkpointing)).train(), []

        def pack(t, numbers=numbers):
            numbers.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(torch.ones(4, 1, 8, 8), torch.zeros(4))
        kept.append(sum(numbers))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("kind", [DiT, MMDiT])
def test_a_block_can_be_skipped(kind):
    network = awake(kind(in_channels=1, size=8, patch=2, width=16, depth=3, heads=2, **TEXT[kind])).double()
    denoiser = NetworkDenoiser(network=network, interpolant=VariancePreserving(), prediction=V())
    x, level = randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.float64)
    guided = SkipLayer(denoiser, ["blocks.1"], scale=2.0)(x, level)
    whole = denoiser(x, level)
    kept = network.blocks
    network.blocks = torch.nn.ModuleList([kept[0], kept[2]])
    weak = denoiser(x, level)
    torch.testing.assert_close(guided, weak + 2.0 * (whole - weak), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"no layer 'block\.1' to skip: it has blocks\.0, blocks\.1$"):
        SkipLayer(denoiser, ["block.1"], scale=2.0)


@pytest.mark.parametrize(
    "block",
    [
        DiTBlock(width=16, heads=2, embedding=8),
        MMDiTBlock(width=16, heads=2, embedding=8),
        TransformerBlock(channels=16, head_channels=8, embedding=8),
    ],
    ids=lambda block: type(block).__name__,
)
def test_transformer_blocks_are_known_to_keep_their_shape(block):
    with pytest.raises(ValueError, match=r"it has a\.0$"):
        find_layers(torch.nn.ModuleDict({"a": torch.nn.ModuleList([block])}), ["b"])


@pytest.mark.parametrize("kind", [DiT, MMDiT])
def test_tokens_stay_in_the_order_of_memory_that_norms_want(kind):
    network, seen = kind(in_channels=1, size=8, patch=2, width=16, depth=2, heads=2, **TEXT[kind]), []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda module, given: seen.append(given[0].is_contiguous()))
    network(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    assert seen == [True, True]


def test_layers_start_as_published():
    network = DiT(in_channels=3, size=8, patch=2, width=256, depth=1, heads=2)
    for name, module in network.named_modules():
        if name.split(".")[0] in ("blocks", "patch_in") and isinstance(
            module, torch.nn.Linear | torch.nn.Conv2d
        ):
            outputs, inputs = module.weight.flatten(1).shape
            limit = 0.0 if "modulation" in name else math.sqrt(6 / (inputs + outputs))
            assert float(module.weight.detach().abs().max()) == pytest.approx(limit, rel=1e-2)
            assert float(module.weight.detach().std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)
            assert not module.bias.any()


def test_impossible_sizes_are_refused():
    sizes = dict(in_channels=1, size=8, patch=2, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="cannot be cut into patches of 3"):
        DiT(**{**sizes, "patch": 3})
    with pytest.raises(ValueError, match=r"DiT is built for images of side 8, got \(1, 1, 9, 9\)"):
        DiT(**sizes)(torch.zeros(1, 1, 9, 9), torch.zeros(1))
    with pytest.raises(ValueError, match="heads=3 does not divide the width 16"):
        DiT(**{**sizes, "heads": 3})
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        DiT(**{**sizes, "width": 18})
    with pytest.raises(ValueError, match="token_width must be positive"):
        MMDiT(**sizes, token_width=0)
