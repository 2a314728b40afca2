r"""Classifier guidance: towards noisy images that a classifier recognises.

    x0_hat = x0_inner + scale (sigma^2 / alpha) grad_x log p(label | x, logsnr)      for logsnr in [low, high]
    x0_hat = x0_inner                                                                elsewhere, without the classifier

which adds scale times the classifier's gradient to the score; in terms of eps it is eps - scale sigma grad, the second
algorithm of the paper, to which its first, for ancestral sampling, tends as steps get short. By Bayes' rule, with the
exact classifier,

    scale 1 on the unconditional denoiser   is the conditional one,
    scale s on the conditional one          is classifier-free guidance of scale 1 + s.

At alpha = 0 no image is seen, and nothing is added: the limit of sigma^2 / alpha times a gradient that vanishes there
cannot be evaluated. Just above, a network's gradient, which does not quite vanish, is multiplied by a large number:
1 / alpha of the variance-preserving process is 150 at logsnr -10 and 2e4 at -20. Nothing here guards against that: set
`interval`, or take a grid that starts at about -10.

The paper's first algorithm moves the mean of an ancestral step by scale Sigma g, Sigma its variance and g the gradient;
this moves it by scale beta / sqrt(1 - beta) g, beta = 1 - (alpha / alpha_next)^2. Both tend to scale beta g.

A classifier costs a forward and a backward pass, which are no evaluations of the denoiser.

References:
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 4, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.denoisers.classifier import Classifier
from diffusion_lab.guidance.branches import unconditional
from diffusion_lab.guidance.interval import EVERYWHERE, Interval
from diffusion_lab.guidance.unguided import unguided
from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import NO_LABEL, Cond, DenoiserFn, GuidanceFactory, conditional_of


class ClassifierGuidance:
    """A denoiser guided by a classifier of noisy data. One evaluation, and one pass of the classifier and back.

    Args:
        denoiser: The denoiser.
        classifier: `(x, logsnr) -> logits (B, K)`, trained on the same process.
        scale: Factor of the classifier's gradient; 0 is off.
        interval: `(low, high)`: guide where low <= logsnr <= high.
        with_label: Whether the denoiser is told the label too; False guides its unconditional answer.
        inner: Another guidance, which is around the denoiser first.

    Raises:
        ValueError: If the interval is not ordered, or `classifier` cannot be called.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        classifier: Classifier,
        scale: float,
        interval: Sequence[float] = EVERYWHERE,
        with_label: bool = True,
        inner: GuidanceFactory = unguided,
    ) -> None:
        if not callable(classifier):
            raise ValueError(f"ClassifierGuidance needs a classifier, got {classifier!r}")
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.classifier, self.scale = inner(denoiser), classifier, scale
        self.with_label, self.interval = with_label, Interval(interval)

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided x0_hat, of the shape of `x`; examples without a label are not guided.

        Raises:
            ValueError: If (on the CPU) a label is none of the classifier's. On a GPU such a label is an index out of
                range, for the device's own assertion.
        """
        x0 = self.denoiser(x, logsnr, cond if self.with_label else unconditional(cond))
        if self.scale == 0.0 or cond is None or "label" not in cond:
            return x0
        label = cond["label"]
        return self.interval(x, logsnr, lambda: x0, lambda: x0 + self._edit(x, logsnr, label))

    def _edit(self, x: Tensor, logsnr: Tensor, label: Tensor) -> Tensor:
        level = expand_logsnr(logsnr, x)
        alpha, sigma = (broadcast_right(value, x) for value in self.interpolant(level))
        # sigma^2 / alpha, and 0 where alpha = 0
        length = torch.where(alpha > 0, sigma**2 / torch.where(alpha > 0, alpha, 1.0), 0.0)
        g = self._gradient(x, level, label)
        return self.scale * torch.where(length > 0, length * g, torch.zeros_like(g))

    def _gradient(self, x: Tensor, level: Tensor, label: Tensor) -> Tensor:
        """Return grad_x log p(label | x, logsnr), zero for examples without a label."""
        # a guidance around this one may want to differentiate it again
        again = torch.is_grad_enabled() and x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            x_in = x if again else _ordinary(x).detach().requires_grad_(True)
            label = _ordinary(label)
            logits = self.classifier(x_in, _ordinary(level))
            K = logits.shape[1]
            strange = (label >= K) | ((label < 0) & (label != NO_LABEL))
            # on a GPU the question would make every step wait; `gather` asserts there
            if label.device.type == "cpu" and bool(strange.any()):
                wrong = int(label[strange][0])
                raise ValueError(f"label {wrong} is not one of the classifier's {K} classes (0 .. {K - 1})")
            known = label != NO_LABEL
            log_p = torch.log_softmax(logits, dim=1).gather(1, torch.where(known, label, 0)[:, None])[:, 0]
            total = torch.where(known, log_p, torch.zeros_like(log_p)).sum()
            (g,) = torch.autograd.grad(total, x_in, create_graph=again)
        return g


def _ordinary(x: Tensor) -> Tensor:
    """`x`, or a copy where it was made in inference mode and so cannot enter a gradient."""
    return x.clone() if x.is_inference() else x
