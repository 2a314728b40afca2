"""EDM2: magnitudes are what they should be, a weight's length does not matter, sizes are the published ones."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.networks import magnitude_preserving as mp
from diffusion_lab.networks.edm2 import EDM2, CosineAttention, DecoderBlock, EncoderBlock
from diffusion_lab.typing import NO_LABEL
from tests.networks.test_networks import awake


def edm2(**options):
    settings = dict(
        in_channels=1, size=8, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16
    )
    return EDM2(**{**settings, "num_classes": 3, **options})


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_square(x):
    return float(x.square().mean())


# ---- the layers, exactly ---------------------------------------------------------------------------------------------


def test_mp_silu_has_the_mean_square_of_a_standard_normal():
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    x, w = torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))
    assert round(math.sqrt(float((w * F.silu(x).square()).sum())), 3) == mp.SILU_RMS
    # what that rounding leaves
    assert float((w * mp.mp_silu(x).square()).sum()) == pytest.approx(1.0, abs=2 * 5e-4 / 0.596)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_mp_sum_and_mp_cat_have_unit_mean_square_exactly(t):
    # uncorrelated exactly, not on average: a and b are orthogonal
    a, b = torch.linalg.qr(randn(24, 24))[0].split(12, dim=1)
    a, b = (v.T.reshape(12, 6, 2, 2) * math.sqrt(24) for v in (a, b))
    assert mean_square(a) == pytest.approx(1.0) and float((a * b).sum()) == pytest.approx(0.0, abs=1e-9)
    assert mean_square(mp.mp_sum(a, b, t)) == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(
        mp.mp_sum(a, b, t) * math.sqrt((1 - t) ** 2 + t**2), (1 - t) * a + t * b, atol=1e-12
    )
    for first, second in ((a, b), (a, b[:, :2]), (a[:, :1], b)):
        joined = mp.mp_cat(first, second, t)
        split = joined.split([first.shape[1], second.shape[1]], dim=1)
        total = (1 - t) ** 2 + t**2
        # each part's sum of squares is its share of that of all channels
        channels = joined.shape[1]
        for part, given, share in zip(split, (first, second), ((1 - t) ** 2, t**2), strict=True):
            assert part.square().sum(1).mean() / channels == pytest.approx(
                share / total * mean_square(given), abs=1e-9
            )


def test_unit_is_the_vector_over_its_root_mean_square():
    x = randn(3, 4, 5) * 7
    expected = x / (x.square().mean((1, 2), keepdim=True).sqrt() + 1e-4)
    torch.testing.assert_close(mp.unit(x, (1, 2)), expected, rtol=1e-12, atol=1e-12)
    assert mp.unit(x.half(), 1).dtype == torch.float16
    # a sum of squares beyond float16's range is no trouble
    assert bool(torch.isfinite(mp.unit(1000 * torch.ones(2, 300, dtype=torch.float16), 1)).all())


def test_linear_and_convolution_keep_the_mean_square_of_white_inputs():
    """Exactly, in expectation: E|y|^2 = sum of squared weights for inputs of independent unit components."""
    for layer in (mp.MPLinear(7, 5), mp.MPConv(6, 4, 3)):
        layer = awake(layer).double()
        effective = layer.unit_weight().flatten(1) / math.sqrt(layer.weight[0].numel())
        assert torch.allclose(effective.square().sum(1), torch.ones(effective.shape[0]).double(), atol=2e-3)
    linear = awake(mp.MPLinear(7, 5)).double()
    x = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(linear(x).T * math.sqrt(7), linear.unit_weight())
    conv = awake(mp.MPConv(6, 4, 3)).double()
    x = randn(2, 6, 5, 5)
    torch.testing.assert_close(conv(x) * math.sqrt(54), F.conv2d(x, conv.unit_weight(), padding=1))


def test_features_of_the_level_have_unit_mean_square_at_every_level():
    embedding = mp.MPLevelEmbedding(features=32, width=8).double()
    # an identity in place of the linear layer shows the features themselves, times sqrt(32) against its 1 / sqrt(32)
    embedding.layers = torch.nn.Identity()
    features = embedding(torch.linspace(-20, 20, 41).double())
    torch.testing.assert_close(features.square().mean(1), torch.ones(41).double())
    # the law of the frequencies is EDM2's: of c_noise = -logsnr / 8, in turns, standard normal
    many = mp.MPLevelEmbedding(features=20_000, width=2).frequencies.double() * 8 / (2 * math.pi)
    assert float(many.square().mean()) == pytest.approx(1.0, abs=1e-3)
    assert float((many < 0.6744897502).double().mean()) == pytest.approx(0.5, abs=1e-3)


def test_a_label_beside_the_level_is_mp_sum_at_one_half():
    heard = mp.MPConditioning(features=32, width=64, num_classes=10).double().requires_grad_(False)
    logsnr, label = torch.linspace(-5, 5, 10).double(), torch.arange(10)
    level = heard.level_embedding.layers[0](
        math.sqrt(2)
        * torch.cat(
            [f(logsnr[:, None] * heard.level_embedding.frequencies) for f in (torch.cos, torch.sin)], 1
        )
    )
    table = heard.label_embedding.table
    expected = mp.mp_silu(mp.mp_sum(level, table.unit_weight()[label], 0.5))
    torch.testing.assert_close(heard(logsnr, {"label": label}, 10), expected)
    # over the classes and "no label", every component of the table has unit mean square
    torch.testing.assert_close(
        table.unit_weight().square().mean(0), torch.ones(64).double(), rtol=0, atol=1e-3
    )


# ---- magnitudes in the network ---------------------------------------------------------------------------------------


MAIN, BRANCH = 0.7**2 / 0.58, 0.3**2 / 0.58
"""Shares of main path and branch in the mean square of mp_sum(x, y, 0.3)."""


def expected_mean_square(side):
    """Of a block's output for a white input of mean square one: all is kept but what zeros around the border take."""
    inside = (1 - 2 / (3 * side)) ** 2  # the part of the taps of a 3x3 filter that fall on the image
    return MAIN + BRANCH * inside**2


@pytest.mark.parametrize("heads", [None, 32])
@pytest.mark.parametrize("kind", [EncoderBlock, DecoderBlock])
@pytest.mark.parametrize("channels", [(128, 128), (64, 128)])
def test_a_block_keeps_the_mean_square_of_its_input(kind, channels, heads):
    inputs, outputs = channels
    torch.manual_seed(0)
    block = kind(
        in_channels=inputs,
        out_channels=outputs,
        branch_channels=outputs if kind is EncoderBlock else inputs,
        embedding=32,
        dropout=0.0,
        head_channels=heads,
    )
    with torch.no_grad():
        out = block.double()(randn(8, inputs, 8, 8), randn(8, 32))
    expected = expected_mean_square(8)
    assert expected == pytest.approx(0.954, abs=1e-3)
    if heads is None:
        # a branch of 128 random filters is off by a percent or two
        assert mean_square(out) == pytest.approx(expected, abs=0.02)
    else:
        # a weighted mean of values that are not alike is shorter than they are: down to nothing of attention's branch
        assert MAIN * expected - 0.02 < mean_square(out) < expected + 0.02


def test_cosine_attention_is_what_its_docstring_says():
    block = awake(CosineAttention(channels=16, head_channels=8)).double()
    x = randn(2, 16, 4, 6)
    q, k, v = (block.qkv(x).flatten(2)).split(16, dim=1)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        qh, kh, vh = (t[:, h] / (t[:, h].square().mean(1, keepdim=True).sqrt() + 1e-4) for t in (q, k, v))
        weights = torch.softmax(torch.einsum("bci,bcj->bij", qh, kh) / math.sqrt(8), dim=-1)
        heads.append(torch.einsum("bij,bcj->bci", weights, vh))
    expected = mp.mp_sum(x, block.out(torch.cat(heads, 1).view_as(x)), 0.3)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)


def test_no_query_or_key_of_cosine_attention_can_be_long():
    """Seven times themselves behind the convolution, whose own weights have no length anyway."""
    block = awake(CosineAttention(channels=16, head_channels=8)).double()
    x = randn(2, 16, 4, 6)
    before = block(x)
    with torch.no_grad():
        block.qkv.weight[:32] *= 7.0
    # up to the 1e-4 beside a root mean square
    torch.testing.assert_close(block(x), before, rtol=0, atol=1e-3)
    longer = torch.cat([torch.full((32, 1, 1), 7.0), torch.ones(16, 1, 1)])
    block.qkv.register_forward_hook(lambda module, given, out: out * longer)
    torch.testing.assert_close(block(x), before, rtol=0, atol=1e-3)


def by_hand(block, x, embedding, change):
    """The lines of the module's docstring, before anything is cut at 256."""
    if change == "down":  # averages of two by two
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    if change == "up":
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def silu(x):
        return x * torch.sigmoid(x) / 0.596

    main = block.skip(x)
    if type(block) is EncoderBlock:
        x = main = main / (main.square().mean(1, keepdim=True).sqrt() + 1e-4)
    linear = block.modulation
    scale = linear.gain * F.linear(embedding, linear.unit_weight()) / math.sqrt(embedding.shape[1])
    y = block.conv_in(silu(x))
    y = block.conv_out(silu(y * (1 + scale[:, :, None, None])))
    out = (0.7 * main + 0.3 * y) / math.sqrt(0.7**2 + 0.3**2)
    return out if block.attention is None else block.attention(out)


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("change", ["none", "down", "up"])
@pytest.mark.parametrize("outputs", [8, 16])
@pytest.mark.parametrize("kind", [EncoderBlock, DecoderBlock])
def test_a_block_is_what_its_docstring_says(kind, outputs, change, heads):
    block = kind(
        in_channels=16,
        out_channels=outputs,
        branch_channels=outputs if kind is EncoderBlock else 16,
        embedding=8,
        dropout=0.0,
        head_channels=heads,
        change=change,
    )
    block = awake(block).double()
    x, embedding = randn(2, 16, 4, 6), randn(2, 8, seed=1)
    assert (block.attention is None) == (heads is None) and float(block.modulation.gain.abs()) > 0.1
    expected = by_hand(block, x, embedding, change)
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-10, atol=1e-12)
    # as long as a loud embedding makes it, but no longer than 256
    loud = by_hand(block, x, 1e4 * embedding, change)
    assert float(loud.max()) > 300 and float(loud.min()) < -300 and float((loud.abs() < 256).sum()) > 0
    torch.testing.assert_close(block(x, 1e4 * embedding), loud.clamp(-256.0, 256.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", [(8,), (4,), ()])
def test_the_middle_has_two_blocks_of_the_decoder_and_attention_in_the_first(attention):
    network = edm2(attention=attention, head_channels=8, channels=16, multipliers=(1, 2))
    first, second = network.middle
    for block in (first, second):
        assert type(block) is DecoderBlock and block.change == "none"
        # nothing is joined here
        assert isinstance(block.skip, torch.nn.Identity)
        assert block.conv_in.in_channels == block.conv_out.out_channels == 32
    assert isinstance(first.attention, CosineAttention) and first.attention.heads == 4
    assert second.attention is None


def test_the_output_is_a_gain_times_a_convolution_of_the_last_block():
    network, seen = awake(edm2()).double(), []
    network.up[-1].register_forward_hook(lambda module, given, out: seen.append(out))
    out = network(randn(2, 1, 8, 8), torch.zeros(2).double(), None)
    expected = (
        network.gain_out * F.conv2d(seen[0], network.conv_out.unit_weight(), padding=1) / math.sqrt(144)
    )
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_no_block_of_a_whole_network_loses_or_gains_magnitude():
    torch.manual_seed(0)
    network = edm2(channels=64, multipliers=(1, 2), blocks=3, head_channels=32, num_classes=0)
    seen = []
    for block in [*network.down, *network.middle, *network.up]:
        block.register_forward_hook(lambda module, given, out: seen.append((module, given[0], out)))
    with torch.no_grad():
        # data of unit variance, as NetworkDenoiser shows it
        network(randn(16, 1, 8, 8).float(), torch.linspace(-5, 5, 16), None)
    assert len(seen) == 7 + 2 + 9
    for module, x, out in seen:
        before = 1.0 if isinstance(module, EncoderBlock) else mean_square(x)
        # whatever its branches say, which after some layers is not white any more, the main path goes on
        lowest = MAIN if module.attention is None else MAIN**2
        assert lowest < mean_square(out) / before < 1.05


# ---- weights ---------------------------------------------------------------------------------------------------------


def layers(network):
    return [m for m in network.modules() if isinstance(m, mp.MPLinear | mp.MPConv | mp.MPEmbedding)]


def dims(layer):
    """What one output sums over; in a table, the rows."""
    return 0 if isinstance(layer, mp.MPEmbedding) else tuple(range(1, layer.weight.ndim))


def test_the_length_of_a_weight_does_not_matter():
    network = awake(edm2(channels=32)).double()
    mp.normalize_weights(mp.magnitude_preserving(network))
    x, logsnr, cond = (
        randn(4, 1, 8, 8),
        torch.linspace(-5, 5, 4).double(),
        {"label": torch.tensor([0, 1, 2, -1])},
    )
    before = network(x, logsnr, cond)
    with torch.no_grad():
        for layer in layers(network):
            # a length for each output
            shape = layer.weight.sum(dims(layer), keepdim=True).shape
            g = torch.Generator().manual_seed(1)
            layer.weight.mul_(1 + 99 * torch.rand(shape, generator=g, dtype=torch.float64))
    # up to the 1e-4 that is added to a root mean square, in some fifteen layers one after the other
    torch.testing.assert_close(network(x, logsnr, cond), before, rtol=0, atol=3e-3 * float(before.std()))
    mp.normalize_weights(mp.magnitude_preserving(network))
    torch.testing.assert_close(network(x, logsnr, cond), before, rtol=0, atol=3e-3 * float(before.std()))


def test_weights_are_of_unit_length_at_first_and_after_every_normalisation():
    network = edm2()

    def worst():
        """How far a mean square is from one."""
        found = [(layer.weight.square().mean(dims(layer)) - 1).abs().max() for layer in layers(network)]
        assert len(found) > 10
        return float(max(found))

    # rms / (rms + 1e-4), and a table of four rows may have small columns
    assert worst() < 2e-3
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    torch.nn.init.ones_(network.gain_out)
    x, logsnr, cond = (
        randn(4, 1, 8, 8).float(),
        torch.linspace(-5, 5, 4),
        {"label": torch.tensor([0, 1, 2, NO_LABEL])},
    )
    network(x, logsnr, cond).square().sum().backward()
    optimizer.step()
    assert worst() > 0.01
    before = network(x, logsnr, cond)
    pointers = [p.data_ptr() for p in network.parameters()]
    mp.normalize_weights(mp.magnitude_preserving(network))
    assert worst() < 2e-3
    assert [p.data_ptr() for p in network.parameters()] == pointers, "in place: optimizers hold these tensors"
    torch.testing.assert_close(
        network(x, logsnr, cond), before, rtol=0, atol=2e-3 * float(before.abs().max())
    )


def test_a_gradient_does_not_change_the_length_of_its_weight():
    """The function is flat along a weight, so the gradient is orthogonal to it."""
    network = awake(edm2()).double()
    mp.normalize_weights(mp.magnitude_preserving(network))
    x, cond = randn(4, 1, 8, 8), {"label": torch.tensor([0, 1, 2, NO_LABEL])}
    network(x, torch.linspace(-5, 5, 4).double(), cond).square().sum().backward()
    for layer in layers(network):
        w, g = layer.weight, layer.weight.grad
        along, lengths = (
            (w * g).sum(dims(layer)),
            (w.square().sum(dims(layer)) * g.square().sum(dims(layer))).sqrt(),
        )
        # all that is left of the 1e-4 beside a root mean square
        assert float((along / lengths).abs().max()) < 2e-3


def test_nothing_is_written_in_a_forward_pass():
    network = edm2().train()
    before = {name: p.clone() for name, p in network.named_parameters()}
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2.0)
    for _ in range(2):
        network(randn(2, 1, 8, 8).float(), torch.zeros(2), None)
    for name, p in network.named_parameters():
        assert torch.equal(p, 2 * before[name])


def test_there_are_no_biases_and_no_other_parameters_than_weights_and_gains():
    names = {name.rpartition(".")[2] for name, _ in edm2(scalars=("angle",)).named_parameters()}
    assert names == {"weight", "gain", "gain_out"}


def test_a_channel_of_ones_stands_beside_the_image():
    network, seen = awake(edm2(image_channels=2)), []
    network.conv_in.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    x = randn(2, 1, 8, 8).float()
    network(x, torch.zeros(2), None)
    assert torch.equal(seen[0], torch.cat([x, torch.zeros(2, 2, 8, 8), torch.ones(2, 1, 8, 8)], 1))


# ---- conditions and sizes --------------------------------------------------------------------------------------------


def test_scalars_and_images_are_heard_and_not_given_is_nothing():
    network = awake(edm2(scalars=("angle",), image_channels=2)).double()
    x, logsnr = randn(3, 1, 8, 8), torch.zeros(3).double()
    angle = torch.tensor([0.3, -1.0, math.nan], dtype=torch.float64)
    plain = network(x, logsnr, None)
    told = network(x, logsnr, {"angle": angle})
    assert torch.equal(told[2], plain[2]) and not torch.allclose(told[:2], plain[:2])
    assert not torch.allclose(network(x, logsnr, {"image": randn(3, 2, 8, 8, seed=2)}), plain)
    with pytest.raises(ValueError, match="EDM2 knows no condition 'text'"):
        network(x, logsnr, {"text": x})


def test_a_noise_level_per_pixel_is_the_level_where_it_is_the_same_everywhere():
    network = awake(edm2()).double()
    x, logsnr = randn(4, 1, 8, 8), torch.linspace(-5, 5, 4).double()
    flat = logsnr[:, None, None, None].expand(4, 1, 8, 8)
    torch.testing.assert_close(network(x, flat, None), network(x, logsnr, None), rtol=1e-9, atol=1e-10)


def test_impossible_sizes_are_refused():
    for wrong, message in (
        ({"size": 10, "multipliers": (1, 2, 2)}, "halved 2 times"),
        ({"attention": (16,)}, r"attention at sides \[16\], but the levels have sides \[8, 4\]"),
        ({"head_channels": 24}, "head_channels=24"),
    ):
        with pytest.raises(ValueError, match=message):
            edm2(**wrong)


PUBLISHED = {
    # channels: millions of parameters, the unit of its last digit, "Gflops". Karras et al. 2024, table 2
    128: (125, 1, 46),
    192: (280, 1, 102),
    256: (498, 1, 181),
    320: (777, 1, 282),
    384: (1100, 100, 406),
    448: (1500, 100, 552),
}


@pytest.mark.parametrize(("channels", "published"), PUBLISHED.items(), ids=["xs", "s", "m", "l", "xl", "xxl"])
def test_published_sizes(channels, published):
    parameters, digit, billions = published
    with torch.device("meta"), torch.no_grad():
        network = EDM2(in_channels=4, size=64, channels=channels, num_classes=1000)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 4, 64, 64), torch.zeros(1), None)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert abs(millions - parameters) < 0.55 * digit
    # theirs count a multiplication with its addition as one, and elementwise work besides; torch's counter counts two,
    # of matrix products and convolutions alone
    counted = counter.get_total_flops() / 2e9
    assert 0.985 * (billions - 0.5) < counted < billions
