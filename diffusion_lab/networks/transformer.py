r"""The transformer block of DiT, over tokens `(B, N, C)`.

    shift, scale, gate (two of each) = linear(embedding)              zero at initialisation: "adaLN-zero"
    h <- h + gate_1 out(attention(q, k, v)),   q, k, v = linear((1 + scale_1) norm(h) + shift_1)
    h <- h + cross-attention(h, tokens)                               only where there is text
    h <- h + gate_2 W_2 gelu(W_1 ((1 + scale_2) norm(h) + shift_2))

Norms have no weights of their own; queries and keys may be normalised, which keeps attention from saturating in large
models and low precision.

References:
    Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN-zero).
    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024, section 5.3
    (normalised queries and keys).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.layers import CrossAttentionBlock, Tokens, attention, zero_init

M = TypeVar("M", nn.Linear, nn.Conv2d)


def xavier(module: M) -> M:
    """Initialise as published, weights uniform of variance 2 / (inputs + outputs), no bias, and return `module`."""
    nn.init.xavier_uniform_(module.weight.data.flatten(1))
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) norm(h) + shift for tokens `(B, N, C)` and `(B, 1 or N, C)`."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


def told(linear: nn.Linear, embedding: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Return `linear(embedding)` in `parts`, each `(B, 1, C)`, or `(B, N, C)` where every token has its own embedding.

    Args:
        linear: What makes shifts, scales and gates of an embedding.
        embedding: `(B, E)` or `(B, N, E)`, already through its activation.
        parts: Number of parts.
    """
    out = linear(embedding)
    return (out if out.ndim == 3 else out[:, None]).chunk(parts, dim=2)


class Heads(nn.Module):
    """Queries, keys and values of one stream of tokens.

    Args:
        width: C.
        heads: Number of attention heads.
        qk_norm: Whether queries and keys are normalised.

    Raises:
        ValueError: If `heads` does not divide `width`.
    """

    def __init__(self, *, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide the width {width} of a transformer block")
        self.heads = heads
        self.qkv = xavier(nn.Linear(width, 3 * width))
        self.norm_q: nn.Module = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k: nn.Module = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map `(B, N, C)` to three of `(B, heads, N, C / heads)`."""
        q, k, v = self.qkv(n).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_q(q), self.norm_k(k), v


class MLP(nn.Sequential):
    """W_2 gelu(W_1 n), with the tanh form of gelu.

    Args:
        width: C.
        ratio: Width of the inner layer, in `width`.
        dropout: Probability of dropping an inner activation.
    """

    def __init__(self, *, width: int, ratio: float, dropout: float) -> None:
        inner = round(ratio * width)
        super().__init__(
            xavier(nn.Linear(width, inner)),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            xavier(nn.Linear(inner, width)),
        )


class DiTBlock(nn.Module):
    """One block; the identity at initialisation.

    Args:
        width: C.
        heads: Number of attention heads.
        embedding: Width E of the embedding.
        mlp_ratio: Width of the perceptron's inner layer, in `width`.
        dropout: Probability of dropping one of its activations.
        qk_norm: Whether queries and keys are normalised.
        token_width: Width of text tokens; 0 for none.

    Raises:
        ValueError: If `heads` does not divide `width`.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        embedding: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        qk_norm: bool = False,
        token_width: int = 0,
    ) -> None:
        super().__init__()
        self.modulation = zero_init(nn.Linear(embedding, 6 * width))
        self.attend = Heads(width=width, heads=heads, qk_norm=qk_norm)
        self.out = xavier(nn.Linear(width, width))
        self.cross = (
            CrossAttentionBlock(channels=width, head_channels=width // heads, token_width=token_width)
            if token_width
            else None
        )
        self.mlp = MLP(width=width, ratio=mlp_ratio, dropout=dropout)

    def forward(self, h: Tensor, embedding: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Map `(B, N, C)` to the same shape; `embedding` is `(B, E)`, or `(B, N, E)` for noise levels of their own."""
        assert isinstance(self.modulation, nn.Linear)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = told(self.modulation, embedding, 6)
        mixed = attention(*self.attend(modulated(h, shift_1, scale_1)))
        h = torch.addcmul(h, gate_1, self.out(mixed.transpose(1, 2).flatten(2)))
        if self.cross is not None and tokens is not None:
            # a row of pixels: cross-attention knows no neighbours
            h = self.cross(h.transpose(1, 2)[:, :, None], tokens)[:, :, 0].transpose(1, 2)
        return torch.addcmul(h, gate_2, self.mlp(modulated(h, shift_2, scale_2)))
