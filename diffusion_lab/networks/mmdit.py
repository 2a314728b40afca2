r"""MM-DiT: a transformer in which text and image tokens attend to each other as equals, each with weights of its own.

    q, k, v of both streams = linear_s((1 + scale_s) norm(h_s) + shift_s),         s in {image, text}
    mixed = attention over all tokens together
    h_s <- h_s + gate_s out_s(mixed_s),     h_s <- h_s + gate'_s mlp_s((1 + scale'_s) norm(h_s) + shift'_s)

In the last block nothing reads the text any more, so its stream ends with its keys and values. Text tokens that are not
there are not attended to. SD3's sizes are depth d, width 64 d, d heads; its pooled text vector, which joins the noise
level, is not built here: a vector of a sample's own goes into `scalars` one number at a time.

References:
    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024, section 4, figure 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.networks.dit import PatchTransformer
from diffusion_lab.networks.layers import Tokens, attention, run, zero_init
from diffusion_lab.networks.transformer import MLP, Heads, modulated, told, xavier


class Stream(nn.Module):
    """The weights that one kind of tokens has in a block.

    Args:
        width: C.
        heads: Number of attention heads.
        embedding: Width E of the embedding.
        mlp_ratio: Width of the perceptron's inner layer, in `width`.
        qk_norm: Whether queries and keys are normalised.
        last: Whether the stream ends here: then there are only queries, keys and values.
    """

    def __init__(
        self, *, width: int, heads: int, embedding: int, mlp_ratio: float, qk_norm: bool, last: bool
    ) -> None:
        super().__init__()
        self.parts = 2 if last else 6
        self.modulation = zero_init(nn.Linear(embedding, self.parts * width))
        self.attend = Heads(width=width, heads=heads, qk_norm=qk_norm)
        if last:
            self.attend.norm_q = nn.Identity()  # nobody asks for what these tokens attend to
        self.out = None if last else xavier(nn.Linear(width, width))
        self.mlp = None if last else MLP(width=width, ratio=mlp_ratio, dropout=0.0)

    def begin(self, h: Tensor, embedding: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return queries, keys and values of `h` `(B, N, C)`, and what the embedding says of what follows."""
        assert isinstance(self.modulation, nn.Linear)
        shift, scale, *rest = told(self.modulation, embedding, self.parts)
        return self.attend(modulated(h, shift, scale)), tuple(rest)

    def end(self, h: Tensor, mixed: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """Return the stream after attention brought `mixed` `(B, heads, N, C / heads)`."""
        if self.out is None or self.mlp is None:
            return h
        gate_1, shift_2, scale_2, gate_2 = rest
        h = torch.addcmul(h, gate_1, self.out(mixed.transpose(1, 2).flatten(2)))
        return torch.addcmul(h, gate_2, self.mlp(modulated(h, shift_2, scale_2)))


class MMDiTBlock(nn.Module):
    """One block of two streams; the identity at initialisation.

    Args:
        width: C of both streams.
        heads: Number of attention heads.
        embedding: Width E of the embedding.
        mlp_ratio: Width of the perceptrons' inner layer, in `width`.
        qk_norm: Whether queries and keys are normalised.
        last: Whether the text ends here.

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
        qk_norm: bool = True,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.image = Stream(
            width=width, heads=heads, embedding=embedding, mlp_ratio=mlp_ratio, qk_norm=qk_norm, last=False
        )
        self.text = Stream(
            width=width, heads=heads, embedding=embedding, mlp_ratio=mlp_ratio, qk_norm=qk_norm, last=last
        )

    def forward(self, both: Tensor, there: Tensor, embedding: Tensor) -> Tensor:
        """Map both streams to the same shape.

        Args:
            both: Image tokens and behind them text tokens, `(B, N + L, C)`.
            there: Which text tokens are there, `(B, L)` bool.
            embedding: `(B, E)`; with an embedding a token, `(B, N, E)`, the text hears their mean.
        """
        N = both.shape[1] - there.shape[1]
        h, text = both[:, :N], both[:, N:]
        image, image_rest = self.image.begin(h, embedding)
        words, text_rest = self.text.begin(text, embedding if embedding.ndim == 2 else embedding.mean(1))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image, words, strict=True))
        if self.text.out is None:
            q = image[0]
        mask = F.pad(there, (N, 0), value=True)[:, None, None, :]
        mixed = attention(q, k, v, mask)
        h = self.image.end(h, mixed[:, :, :N], image_rest)
        return torch.cat([h, self.text.end(text, mixed[:, :, N:], text_rest)], dim=1)


class MMDiT(PatchTransformer):
    """A network `(x, logsnr, cond) -> raw` of the shape of `x` that reads `cond["text"]`, zero at initialisation.

    Args:
        in_channels: See `PatchTransformer`; so the others that are not named here.
        size: See there.
        patch: See there.
        width: See there.
        depth: Number of blocks.
        heads: Number of attention heads.
        token_width: Width of the text tokens.
        mlp_ratio: Width of the perceptrons' inner layer, in `width`.
        qk_norm: Whether queries and keys are normalised.
        num_classes: See there.
        out_channels: See there.
        scalars: See there.
        image_channels: See there.
        checkpointing: See there.

    Raises:
        ValueError: If sizes do not divide, or there are no text tokens to read.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        token_width: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        num_classes: int = 0,
        out_channels: int | None = None,
        scalars: Sequence[str] = (),
        image_channels: int = 0,
        checkpointing: bool = False,
    ) -> None:
        if token_width < 1:
            raise ValueError(f"MMDiT reads text: token_width must be positive, got {token_width}")
        super().__init__(
            in_channels=in_channels,
            size=size,
            patch=patch,
            width=width,
            num_classes=num_classes,
            out_channels=out_channels,
            scalars=scalars,
            token_width=token_width,
            image_channels=image_channels,
            checkpointing=checkpointing,
        )
        self.text_in = nn.Linear(token_width, width)
        self.blocks = nn.ModuleList(
            MMDiTBlock(
                width=width,
                heads=heads,
                embedding=width,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                last=k == depth - 1,
            )
            for k in range(depth)
        )

    def transform(self, h: Tensor, embedding: Tensor, tokens: Tokens | None) -> Tensor:
        """See `PatchTransformer.transform`."""
        assert tokens is not None
        N, there = h.shape[1], tokens[1]
        both = torch.cat([h, self.text_in(tokens[0])], dim=1)
        for block in self.blocks:
            both = run(block, both, there, embedding, checkpointing=self.checkpointing)
        return both[:, :N]
