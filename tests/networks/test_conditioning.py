"""Scalars, tokens, images and noise levels per pixel: heard, checked, and meaning nothing where not given."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.forward_mode import jvp
from diffusion_lab.networks import MLP, UNet
from diffusion_lab.networks import layers as layers_module
from diffusion_lab.networks.conditioning import Conditioning
from diffusion_lab.process import VariancePreserving
from tests.networks.test_networks import awake

SIZES = dict(
    in_channels=1, size=8, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16
)


def unet(**options):
    return awake(UNet(**SIZES, **options)).double()


def batch(n=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.linspace(-5, 5, n, dtype=torch.float64), g


def test_a_scalar_matters_and_nan_is_not_given():
    for network, shape in (
        (unet(scalars=("angle", "size")), (1, 8, 8)),
        (awake(MLP(dim=2, width=16, depth=1, scalars=("angle", "size"))).double(), (2,)),
    ):
        g = torch.Generator().manual_seed(1)
        x, logsnr = torch.randn(3, *shape, generator=g, dtype=torch.float64), torch.zeros(3).double()
        angle = torch.tensor([0.3, -1.0, math.nan], dtype=torch.float64)
        told = network(x, logsnr, {"angle": angle})
        untold = network(x, logsnr, None)
        assert torch.equal(told[2], untold[2]) and not torch.allclose(told[:2], untold[:2])
        assert not torch.allclose(network(x, logsnr, {"size": angle})[:2], told[:2]), "names are told apart"
        with pytest.raises(ValueError, match=r"condition 'angle' must have shape \(3,\), got \(3, 1\)"):
            network(x, logsnr, {"angle": angle[:, None]})
        with pytest.raises(ValueError, match="there are: label, label_embedding, angle, size"):
            network(x, logsnr, {"angel": angle})
    with pytest.raises(ValueError, match="no scalar may be called 'label'"):
        Conditioning(features=4, width=4, scalars=("label",))


def test_tokens_matter_in_no_order_and_masked_ones_are_not_there():
    network = unet(token_width=6)
    x, logsnr, g = batch()
    text = torch.randn(4, 5, 6, generator=g, dtype=torch.float64)
    told = network(x, logsnr, {"text": text})
    untold = network(x, logsnr, None)
    assert not torch.allclose(told, untold)
    # cross-attention knows no order of tokens; a text model puts it into them
    torch.testing.assert_close(network(x, logsnr, {"text": text.flip(1)}), told, rtol=1e-10, atol=1e-12)
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 3 + [[0] * 5], dtype=torch.bool)
    masked = network(x, logsnr, {"text": text, "text_mask": mask})
    torch.testing.assert_close(
        masked[:3], network(x, logsnr, {"text": text[:, :2]})[:3], rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(masked[3], untold[3], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"'text' must have shape \(4, L, 6\), got \(4, 5, 7\)"):
        network(x, logsnr, {"text": torch.zeros(4, 5, 7)})
    with pytest.raises(ValueError, match=r"'text_mask' must have shape \(4, 5\)"):
        network(x, logsnr, {"text": text, "text_mask": mask[:, :2]})
    with pytest.raises(ValueError, match="knows no condition 'text'"):
        unet()(x, logsnr, {"text": text})


def test_cross_attention_is_the_softmax_of_scaled_products_and_a_residual():
    block = awake(layers_module.CrossAttentionBlock(channels=16, head_channels=8, token_width=6)).double()
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 16, 4, 6, generator=g, dtype=torch.float64)
    tokens = torch.randn(2, 3, 6, generator=g, dtype=torch.float64)
    there = torch.tensor([[True, True, True], [True, False, True]])
    q = block.query(block.norm(x)).flatten(2)
    k, v = block.key_value(block.norm_tokens(tokens)).split(16, dim=2)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        products = torch.einsum("bci,bjc->bij", q[:, h], k[..., h]) / math.sqrt(8)
        weights = torch.softmax(products + torch.log(there.double())[:, None], dim=-1)
        heads.append(torch.einsum("bij,bjc->bci", weights, v[..., h]))
    expected = x + block.out(torch.cat(heads, 1).view_as(x))
    torch.testing.assert_close(block(x, (tokens, there)), expected, rtol=1e-10, atol=1e-12)


def test_an_image_is_seen_in_its_place_at_any_side_and_black_is_not_given():
    network = unet(image_channels=3)
    x, logsnr, g = batch()
    image = torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64)
    told = network(x, logsnr, {"image": image})
    assert not torch.allclose(told, network(x, logsnr, None))
    assert torch.equal(network(x, logsnr, {"image": 0 * image}), network(x, logsnr, None))
    small = F.avg_pool2d(image, 2)
    grown = F.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False)
    assert torch.equal(network(x, logsnr, {"image": small}), network(x, logsnr, {"image": grown}))
    with pytest.raises(ValueError, match=r"'image' must have shape \(4, 3, h, w\), got \(4, 1, 8, 8\)"):
        network(x, logsnr, {"image": image[:, :1]})


def test_a_noise_level_per_pixel_is_the_level_where_it_is_the_same_everywhere():
    network = unet(num_classes=3)
    x, logsnr, _ = batch()
    cond = {"label": torch.tensor([0, 1, 2, -1])}
    flat = logsnr[:, None, None, None].expand(4, 1, 8, 8)
    torch.testing.assert_close(network(x, flat, cond), network(x, logsnr, cond), rtol=1e-9, atol=1e-10)
    half = flat.clone()
    half[..., :4] += 3.0
    mixed = network(x, half, cond)
    assert not torch.allclose(mixed, network(x, logsnr, cond)) and not torch.allclose(
        mixed, network(x, logsnr + 3, cond)
    )
    with pytest.raises(ValueError, match=r"\(B,\), or \(B, 1, H, W\) for one per pixel"):
        network(x, logsnr[:, None], cond)
    # and the whole denoiser: each pixel has its own alpha and sigma
    denoiser = NetworkDenoiser(network=network, interpolant=VariancePreserving(), prediction=V())
    torch.testing.assert_close(denoiser(x, flat, cond), denoiser(x, logsnr, cond), rtol=1e-9, atol=1e-10)
    assert denoiser(x, half, cond).shape == x.shape


def test_checkpointing_changes_no_gradient_and_keeps_less():
    x, logsnr, g = batch()
    cond = {
        "label": torch.tensor([0, 1, 2, -1]),
        "text": torch.randn(4, 5, 6, generator=g, dtype=torch.float64),
    }
    gradients, kept = [], []
    for checkpointing in (False, True):
        network = unet(num_classes=3, token_width=6, checkpointing=checkpointing, dropout=0.0).train()
        bytes_kept = []

        def pack(t, bytes_kept=bytes_kept):
            bytes_kept.append(t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = network(x, logsnr, cond).square().sum()
        loss.backward()
        gradients.append([p.grad for p in network.parameters()])
        kept.append(sum(bytes_kept))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert kept[1] < kept[0] / 3


def test_forward_mode_goes_through_tokens():
    network = unet(token_width=6).requires_grad_(False)
    x, logsnr, g = batch()
    cond = {"text": torch.randn(4, 5, 6, generator=g, dtype=torch.float64)}
    tangent = torch.randn(x.shape, generator=g, dtype=torch.float64)
    _, slope = jvp(lambda z: network(z, logsnr, cond), (x,), (tangent,))
    h = 1e-6
    numeric = (network(x + h * tangent, logsnr, cond) - network(x - h * tangent, logsnr, cond)) / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-6)


def test_more_channels_come_out_where_asked_for():
    x, logsnr, _ = batch()
    assert unet(out_channels=2)(x, logsnr, None).shape == (4, 2, 8, 8)
