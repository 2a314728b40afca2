"""The networks: shapes, conditioning, initialisation, and sizes that papers print."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusion_lab.forward_mode import jvp
from diffusion_lab.networks import EDM2, MLP, DiT, MMDiT, ResidualUViT, UNet, UViT, VDMUNet
from diffusion_lab.networks import layers as layers_module
from diffusion_lab.networks.embeddings import LabelEmbedding, LogSNREmbedding
from diffusion_lab.networks.mlp import PerceptronBlock


def unet(**options):
    settings = dict(
        in_channels=1, size=8, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16
    )
    return UNet(**{**settings, "num_classes": 3, **options})


def awake(network, seed=0):
    """Fill every parameter, so that zero initialisation hides nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(max(1, p[0].numel())))
    return network.eval()


def inputs(batch=4, shape=(1, 8, 8)):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, *shape, generator=g),
        torch.linspace(-5, 5, batch),
        {"label": torch.arange(batch) % 3},
    )


U = dict(in_channels=1, size=8, channels=16, multipliers=(1, 2), head_channels=16, num_classes=3)
UVITS = dict(**U, patch=1, blocks=(1, 2), embedding=32)
TOKENS = dict(in_channels=1, size=8, patch=2, width=16, depth=2, heads=2, num_classes=3)
NETWORKS = {
    "unet": (unet, (1, 8, 8)),
    "unet_patched": (lambda **o: unet(patch=2, attention=(2,), **o), (1, 8, 8)),
    "edm2": (lambda **o: EDM2(**{**U, "blocks": 1, "attention": (4,), **o}), (1, 8, 8)),
    "uvit": (lambda **o: UViT(**{**UVITS, **o}), (1, 8, 8)),
    "residual_uvit": (lambda **o: ResidualUViT(**{**UVITS, **o}), (1, 8, 8)),
    "vdm": (lambda **o: VDMUNet(in_channels=1, channels=16, blocks=1, num_classes=3, **o), (1, 8, 8)),
    "dit": (lambda **o: DiT(**{**TOKENS, **o}), (1, 8, 8)),
    "mmdit": (lambda **o: MMDiT(**{**TOKENS, "token_width": 6, **o}), (1, 8, 8)),
    "mlp": (lambda **o: MLP(dim=2, width=16, depth=2, num_classes=3, **o), (2,)),
}
each = pytest.mark.parametrize(("make", "shape"), NETWORKS.values(), ids=NETWORKS.keys())


@each
def test_output_is_zero_at_initialisation_and_has_the_shape_of_the_input(make, shape):
    x, logsnr, cond = inputs(shape=shape)
    out = make()(x, logsnr, cond)
    assert out.shape == x.shape and not out.any()


@each
def test_noise_level_and_label_matter_and_null_label_is_no_label(make, shape):
    network = awake(make())
    x, logsnr, cond = inputs(shape=shape)
    out = network(x, logsnr, cond)
    assert not torch.allclose(out, network(x, logsnr + 1, cond))
    assert not torch.allclose(out, network(x, logsnr, {"label": (cond["label"] + 1) % 3}))
    null = network(x, logsnr, {"label": torch.full((4,), -1)})
    assert torch.equal(null, network(x, logsnr, None)) and not torch.allclose(null, out)


@each
def test_every_parameter_learns(make, shape):
    network = awake(make()).train()
    x, logsnr, cond = inputs(shape=shape)
    cond["label"][0] = -1
    network(x, logsnr, cond).square().sum().backward()
    idle = [
        name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)
    ]
    # a bias before a group norm of one channel a group would be idle; there is none here
    assert not idle


@each
def test_wrong_label_is_one_clear_line(make, shape):
    network = make()
    x, logsnr, _ = inputs(shape=shape)
    for bad in (3, -2):
        with pytest.raises(ValueError, match=rf"label {bad} is not one of the model's 3 classes"):
            network(x, logsnr, {"label": torch.tensor([0, 1, bad, 2])})


@each
def test_infinite_levels_are_finite(make, shape):
    network = awake(make())
    x, _, cond = inputs(shape=shape)
    out = network(x, torch.tensor([math.inf, -math.inf, 40.0, -40.0]), cond)
    assert bool(torch.isfinite(out).all())


def test_unconditional_network_ignores_conditions():
    network = awake(unet(num_classes=0))
    x, logsnr, cond = inputs()
    assert torch.equal(network(x, logsnr, cond), network(x, logsnr, None))


@pytest.mark.parametrize(
    ("size", "multipliers"), [(8, (1, 2)), (28, (1, 2, 2)), (32, (1, 2, 2, 2)), (64, (1, 1, 2, 2))]
)
def test_sizes(size, multipliers):
    network = unet(size=size, multipliers=multipliers, attention=(), in_channels=3)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert network(x, torch.zeros(1), None).shape == x.shape


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="halved"):
        unet(size=10, multipliers=(1, 2, 2), attention=())
    with pytest.raises(ValueError, match="sides"):
        unet(attention=(16,))
    with pytest.raises(ValueError, match="head_channels"):
        unet(head_channels=24)


def test_published_size_of_adm():
    # Dhariwal & Nichol 2021, table 4: the 64x64 class-conditional model has 296 million parameters
    with torch.device("meta"):
        network = UNet(
            in_channels=3,
            size=64,
            channels=192,
            multipliers=(1, 2, 3, 4),
            blocks=3,
            attention=(32, 16, 8),
            head_channels=64,
            num_classes=1000,
        )
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 296


def test_attention_happens_at_the_sides_asked_for(monkeypatch):
    seen = []

    def spy(q, k, v):
        seen.append((q.shape[1], q.shape[2], q.shape[3]))
        return F.scaled_dot_product_attention(q, k, v)

    class Spied:
        scaled_dot_product_attention = staticmethod(spy)
        silu, avg_pool2d, interpolate = F.silu, F.avg_pool2d, F.interpolate

    monkeypatch.setattr(layers_module, "F", Spied)
    x, logsnr, cond = inputs()
    unet(attention=(8,), blocks=2)(x, logsnr, cond)
    # at side 8: two blocks down, three up, one head of 16; the middle, side 4, has two heads
    assert seen.count((1, 64, 16)) == 5 and seen.count((2, 16, 16)) == 1 and len(seen) == 6
    seen.clear()
    unet(attention=(), middle_attention=False)(x, logsnr, cond)
    assert not seen


def test_dropout_only_while_training():
    network = awake(unet(dropout=0.5))
    x, logsnr, cond = inputs()
    assert torch.equal(network(x, logsnr, cond), network(x, logsnr, cond))
    network.train()
    assert not torch.equal(network(x, logsnr, cond), network(x, logsnr, cond))


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(128, 32), (192, 32), (576, 32), (1344, 32), (24, 2), (48, 4), (96, 8), (18, 2), (2, 1)],
)
def test_norms_have_the_32_groups_of_adm_where_channels_suffice(channels, groups):
    # guided-diffusion's GroupNorm32; ADM's widths are multiples of 192, and 1344 = 576 + 768 is a concatenation
    norm = layers_module.group_norm(channels)
    assert norm.num_groups == groups
    assert norm(torch.ones(1, channels, 2, 2)).shape == (1, channels, 2, 2)


@each
def test_an_example_does_not_see_its_neighbours(make, shape):
    # in double precision: in single the last bits do depend on the batch, which is what app/sampling/parts.py is for
    network = awake(make()).double()
    x, logsnr, cond = inputs(batch=6, shape=shape)
    x, logsnr = x.double(), logsnr.double()
    out = network(x, logsnr, cond)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    shuffled = network(x[order], logsnr[order], {"label": cond["label"][order]})
    torch.testing.assert_close(shuffled, out[order], rtol=1e-10, atol=1e-12)
    part = network(x[1:3], logsnr[1:3], {"label": cond["label"][1:3]})
    torch.testing.assert_close(part, out[1:3], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["residual", "down", "up", "attention"])
def test_blocks_answer_the_same_in_both_memory_layouts(kind):
    # the U-Net converts its own input, so only its blocks can be given either layout
    g = torch.Generator().manual_seed(2)
    x, embedding = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 16, 4, 6), (2, 8)))
    if kind == "attention":
        block = awake(layers_module.AttentionBlock(channels=16, head_channels=8)).double()
        given = ()
    else:
        change = "none" if kind == "residual" else kind
        block = layers_module.ResidualBlock(
            in_channels=16, out_channels=8, embedding=8, dropout=0.0, change=change
        )
        block, given = awake(block).double(), (embedding,)
    innermost = x.contiguous(memory_format=torch.channels_last)
    assert x.stride() != innermost.stride()
    torch.testing.assert_close(block(innermost, *given), block(x, *given), rtol=1e-10, atol=1e-12)


def test_attention_is_the_softmax_of_scaled_products_and_a_residual():
    block = awake(layers_module.AttentionBlock(channels=16, head_channels=8)).double()
    x = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q, k, v = block.qkv(block.norm(x)).flatten(2).split(16, dim=1)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q[:, h], k[:, h]) / math.sqrt(8), dim=-1)
        heads.append(torch.einsum("bij,bcj->bci", weights, v[:, h]))
    expected = x + block.out(torch.cat(heads, 1).view_as(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", ["none", "down", "up"])
@pytest.mark.parametrize("outputs", [8, 16])
def test_residual_block_is_adms(change, outputs):
    block = layers_module.ResidualBlock(
        in_channels=16, out_channels=outputs, embedding=8, dropout=0.0, change=change
    )
    block = awake(block).double()
    g = torch.Generator().manual_seed(3)
    x, embedding = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 16, 4, 6), (2, 8)))

    def sized(x):
        if change == "down":  # averages of two by two
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x if change == "none" else x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    h = block.norm_out(block.conv_in(sized(F.silu(block.norm_in(x)))))
    scale, shift = (c[:, :, None, None] for c in block.modulation(embedding).split(outputs, dim=1))
    expected = block.skip(sized(x)) + block.conv_out(F.silu((1 + scale) * h + shift))
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-10, atol=1e-12)
    assert outputs == 8 or torch.equal(block.skip(x), x)


def test_perceptron_block_is_what_its_docstring_says():
    block = awake(PerceptronBlock(width=8)).double()
    g = torch.Generator().manual_seed(3)
    h, embedding = (torch.randn(3, 8, generator=g, dtype=torch.float64) for _ in range(2))
    scale, shift = block.modulation(embedding).split(8, dim=1)
    inner = block.linear_in(h)
    normal = inner - inner.mean(1, keepdim=True)
    normal = normal / torch.sqrt(normal.square().mean(1, keepdim=True) + block.norm.eps)
    expected = h + block.linear_out(F.silu((1 + scale) * normal + shift))
    torch.testing.assert_close(block(h, embedding), expected, rtol=1e-10, atol=1e-12)


# EDM2 has its own sum and its own activation: see test_edm2.py
@pytest.mark.parametrize(
    ("make", "shape"), [pytest.param(*n, id=name) for name, n in NETWORKS.items() if name != "edm2"]
)
def test_every_modulation_sees_the_embedding_through_its_activation(make, shape):
    network, seen = awake(make()), []
    for name, module in network.named_modules():
        if name.endswith("modulation"):
            module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x, logsnr, cond = inputs(shape=shape)
    network(x, logsnr, cond)
    heard = network.conditioning
    embedding = heard.level_embedding(logsnr) + heard.label_embedding.table(cond["label"])
    expected = embedding * torch.sigmoid(embedding)
    assert len(seen) == sum(name.endswith("modulation") for name, _ in network.named_modules())
    for given in seen:
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


def test_level_features_tell_levels_apart():
    embedding = LogSNREmbedding(features=32, width=8)
    levels = torch.linspace(-20, 20, 401)
    angles = levels[:, None] * embedding.frequencies
    features = torch.cat([angles.cos(), angles.sin()], 1)
    distance = torch.cdist(features, features) + 10 * torch.eye(401)
    # no two levels look alike: the nearest neighbour of each is the level beside it
    nearest = distance.argmin(1)
    assert int((nearest - torch.arange(401)).abs().max()) == 1
    with pytest.raises(ValueError, match="even"):
        LogSNREmbedding(features=3, width=8)


def test_null_label_is_the_last_row():
    embedding = LabelEmbedding(num_classes=3, width=4)
    assert torch.equal(embedding({"label": torch.tensor([-1])}, 1)[0], embedding.table.weight[3])
    assert torch.equal(embedding({"text": torch.zeros(2)}, 2), embedding(None, 2))


@each
def test_forward_mode_is_the_derivative(make, shape):
    network = awake(make()).double().requires_grad_(False)
    x, logsnr, cond = inputs(shape=shape)
    x, logsnr = x.double(), logsnr.double()
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    value, slope = jvp(lambda z: network(z, logsnr, cond), (x,), (tangent,))
    torch.testing.assert_close(value, network(x, logsnr, cond), rtol=1e-9, atol=1e-10)
    h = 1e-6
    up, down = (network(x + s * h * tangent, logsnr, cond) for s in (1, -1))
    torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-4, atol=1e-4 * float(slope.abs().max()))


IMAGES = pytest.mark.parametrize(
    "make",
    [n[0] for n in NETWORKS.values() if len(n[1]) == 3],
    ids=[k for k, n in NETWORKS.items() if len(n[1]) == 3],
)


@IMAGES
def test_a_noise_level_per_pixel_is_heard_where_it_is(make):
    network = awake(make()).double()
    x, logsnr, cond = inputs()
    x, logsnr = x.double(), logsnr.double()
    flat = logsnr[:, None, None, None].expand(4, 1, 8, 8)
    told = network(x, logsnr, cond)
    torch.testing.assert_close(network(x, flat, cond), told, rtol=1e-9, atol=1e-10)
    left, right = flat.clone(), flat.clone()
    left[..., :4] += 3.0
    right[..., 4:] += 3.0
    mixed = network(x, left, cond)
    assert not torch.allclose(mixed, network(x, right, cond)), "the same levels in other places"
    assert not torch.allclose(mixed, told) and not torch.allclose(mixed, network(x, logsnr + 3, cond))


@IMAGES
def test_checkpointing_changes_no_gradient(make):
    x, logsnr, cond = inputs()
    gradients = []
    for checkpointing in (False, True):
        network = awake(make(checkpointing=checkpointing)).double().train()
        network(x.double(), logsnr.double(), cond).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None and torch.equal(plain, again)


@IMAGES
def test_a_black_image_and_a_missing_scalar_are_not_given(make):
    network = awake(make(image_channels=2, scalars=("angle",))).double()
    x, logsnr, cond = inputs()
    x, logsnr = x.double(), logsnr.double()
    plain = network(x, logsnr, cond)
    image = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    angle = torch.tensor([0.3, -1.0, 2.0, math.nan], dtype=torch.float64)
    assert not torch.allclose(network(x, logsnr, {**cond, "image": image}), plain)
    assert torch.equal(network(x, logsnr, {**cond, "image": 0 * image}), plain)
    told = network(x, logsnr, {**cond, "angle": angle})
    assert torch.equal(told[3], plain[3]) and not torch.allclose(told[:3], plain[:3])


@pytest.mark.parametrize("name", [k for k, n in NETWORKS.items() if len(n[1]) == 3 and k != "edm2"])
def test_text_is_attended_to_and_masked_words_are_not_there(name):
    network = awake(NETWORKS[name][0](token_width=6)).double()
    x, logsnr, _ = inputs()
    x, logsnr = x.double(), logsnr.double()
    text = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 3 + [[0] * 5], dtype=torch.bool)
    masked = network(x, logsnr, {"text": text, "text_mask": mask})
    assert not torch.allclose(network(x, logsnr, {"text": text}), masked)
    torch.testing.assert_close(
        masked[:3], network(x, logsnr, {"text": text[:, :2]})[:3], rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(masked[3], network(x, logsnr, None)[3], rtol=1e-9, atol=1e-10)


@each
def test_names_do_not_change_under_compile(make, shape):
    network = make()
    before = list(network.state_dict())
    network.compile()
    assert list(network.state_dict()) == before


# tracing takes seconds, so the default run has one of them
@pytest.mark.parametrize(
    "name", [name if name == "dit" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_a_compiled_network_is_one_graph_and_can_still_be_differentiated_forward(name):
    make, shape = NETWORKS[name]
    network = awake(make()).double().requires_grad_(False)
    x, logsnr, _ = inputs(shape=shape)
    x, logsnr, along = x.double(), logsnr.double(), torch.ones(4, *shape, dtype=torch.float64)
    expected = jvp(lambda z: network(z, logsnr, None), (x,), (along,))
    try:
        one = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(one(x, logsnr, None), network(x, logsnr, None), rtol=1e-9, atol=1e-10)
        network.compile(backend="eager")
        for got, plain in zip(jvp(lambda z: network(z, logsnr, None), (x,), (along,)), expected, strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-10)
    finally:
        torch._dynamo.reset()
