"""MM-DiT's block: its equations by hand, a DiT block where there is no text, and text that is a set."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusion_lab.networks import MMDiT
from diffusion_lab.networks.mmdit import MMDiTBlock
from diffusion_lab.networks.transformer import DiTBlock
from tests.networks.test_networks import awake

G = torch.Generator().manual_seed(5)
C, HEADS, N, L = 16, 2, 5, 3


def randn(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def make(**options):
    return awake(MMDiTBlock(width=C, heads=HEADS, embedding=8, **options)).double()


def norm(h):
    centred = h - h.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def test_block_is_what_its_docstring_says():
    block = make(qk_norm=False)
    h, text, embedding = randn(2, N, C), randn(2, L, C), randn(2, 8)
    there = torch.tensor([[True, True, True], [True, False, True]])
    told, qkv = {}, {}
    for name, tokens in (("image", h), ("text", text)):
        stream = getattr(block, name)
        told[name] = [v[:, None] for v in stream.modulation(embedding).split(C, dim=1)]
        qkv[name] = stream.attend.qkv((1 + told[name][1]) * norm(tokens) + told[name][0]).split(C, dim=2)
    q, k, v = (torch.cat([qkv["image"][i], qkv["text"][i]], 1) for i in range(3))
    allowed = torch.cat([torch.ones(2, N, dtype=torch.bool), there], 1)[:, None]
    size, mixed = C // HEADS, []
    for i in range(HEADS):
        a, b, d = (t[..., i * size : (i + 1) * size] for t in (q, k, v))
        products = (a @ b.transpose(1, 2) / math.sqrt(size)).masked_fill(~allowed, -math.inf)
        mixed.append(torch.softmax(products, dim=-1) @ d)
    mixed = dict(zip(("image", "text"), torch.cat(mixed, 2).split([N, L], dim=1), strict=True))
    expected = []
    for name, tokens in (("image", h), ("text", text)):
        stream, (_, _, g1, s2, k2, g2) = getattr(block, name), told[name]
        tokens = tokens + g1 * stream.out(mixed[name])
        inner = F.gelu(stream.mlp[0]((1 + k2) * norm(tokens) + s2), approximate="tanh")
        expected.append(tokens + g2 * stream.mlp[3](inner))
    torch.testing.assert_close(
        block(torch.cat([h, text], 1), there, embedding), torch.cat(expected, 1), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("last", [False, True])
def test_block_is_that_of_diffusers(last):
    attention = pytest.importorskip("diffusers.models.attention")
    theirs = awake(
        attention.JointTransformerBlock(
            dim=C, num_attention_heads=HEADS, attention_head_dim=C // HEADS, context_pre_only=last
        )
    ).double()
    block = MMDiTBlock(width=C, heads=HEADS, embedding=C, qk_norm=False, last=last).double()
    a = theirs.attn
    with torch.no_grad():
        for part in ("weight", "bias"):
            for stream, made in ((block.image, (a.to_q, a.to_k, a.to_v)),
                                 (block.text, (a.add_q_proj, a.add_k_proj, a.add_v_proj))):  # fmt: skip
                getattr(stream.attend.qkv, part).copy_(torch.cat([getattr(m, part) for m in made]))
            told = getattr(theirs.norm1_context.linear, part)
            # where their text ends, scale comes before shift
            told = torch.cat(told.chunk(2)[::-1]) if last else told
            getattr(block.text.modulation, part).copy_(told)
    block.image.modulation.load_state_dict(theirs.norm1.linear.state_dict())
    pairs = [(block.image, a.to_out[0], theirs.ff)]
    for stream, out, ff in pairs if last else [*pairs, (block.text, a.to_add_out, theirs.ff_context)]:
        stream.out.load_state_dict(out.state_dict())
        stream.mlp[0].load_state_dict(ff.net[0].proj.state_dict())
        stream.mlp[3].load_state_dict(ff.net[2].state_dict())
    h, text, embedding = randn(2, N, C), randn(2, L, C), randn(2, C)
    there = torch.ones(2, L, dtype=torch.bool)
    words, image = theirs(hidden_states=h, encoder_hidden_states=text, temb=embedding)
    ours = block(torch.cat([h, text], 1), there, F.silu(embedding))
    expected = torch.cat([image, text if last else words], 1)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_without_text_it_is_a_block_of_dit():
    block = make()
    alone = DiTBlock(width=C, heads=HEADS, embedding=8, qk_norm=True).double()
    alone.load_state_dict(block.image.state_dict())
    h, embedding = randn(2, N, C), randn(2, 8)
    nothing = torch.zeros(2, L, dtype=torch.bool)
    out = block(torch.cat([h, randn(2, L, C)], 1), nothing, embedding)[:, :N]
    torch.testing.assert_close(out, alone(h, embedding), rtol=1e-10, atol=1e-12)


def test_block_knows_no_order_of_patches_and_text_hears_their_mean_level():
    block, order = make(), torch.tensor([3, 0, 4, 1, 2])
    h, text, embedding = randn(2, N, C), randn(2, L, C), randn(2, N, 8)
    there = torch.ones(2, L, dtype=torch.bool)
    out = block(torch.cat([h, text], 1), there, embedding)
    image, words = block(torch.cat([h[:, order], text], 1), there, embedding[:, order]).split([N, L], dim=1)
    torch.testing.assert_close(image, out[:, :N][:, order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(words, out[:, N:], rtol=1e-10, atol=1e-12)


def test_the_last_block_hands_text_on_as_it_is():
    block = make(last=True)
    assert block.text.out is None and not any(
        name.startswith("text.mlp") for name, _ in block.named_parameters()
    )
    h, text, there = randn(2, N, C), randn(2, L, C), torch.ones(2, L, dtype=torch.bool)
    out = block(torch.cat([h, text], 1), there, randn(2, 8))
    assert torch.equal(out[:, N:], text) and not torch.allclose(out[:, :N], h)


def test_text_matters_in_no_order_and_masked_tokens_are_not_there():
    network = awake(
        MMDiT(in_channels=1, size=4, patch=2, width=C, depth=2, heads=HEADS, token_width=6)
    ).double()
    x, logsnr, text = randn(2, 1, 4, 4), torch.zeros(2).double(), randn(2, L, 6)
    told = network(x, logsnr, {"text": text})
    assert not torch.allclose(told, network(x, logsnr, None))
    torch.testing.assert_close(network(x, logsnr, {"text": text.flip(1)}), told, rtol=1e-9, atol=1e-10)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    masked = network(x, logsnr, {"text": text, "text_mask": mask})
    torch.testing.assert_close(masked[0], network(x, logsnr, {"text": text[:, :1]})[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(masked[1], network(x, logsnr, None)[1], rtol=1e-9, atol=1e-10)
