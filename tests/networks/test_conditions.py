"""A condition that no network reads is one clear error, in every network; what wrappers are told passes."""

import pytest
import torch

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.networks import MLP, UNet
from diffusion_lab.process import VariancePreserving


def networks(num_classes):
    yield MLP(dim=2, width=8, depth=1, num_classes=num_classes), (2,)
    sizes = {"in_channels": 1, "size": 4, "channels": 8, "multipliers": (1,), "blocks": 1, "head_channels": 8}
    yield UNet(**sizes, num_classes=num_classes), (1, 4, 4)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_an_unknown_condition_is_named_with_those_there_are(num_classes):
    for network, shape in networks(num_classes):
        denoiser = NetworkDenoiser(network=network, interpolant=VariancePreserving(), prediction=V())
        x, logsnr = torch.zeros(3, *shape), torch.zeros(3)
        cond = {"label": torch.tensor([0, 1, -1]), "lable": torch.tensor([0, 1, 2])}
        message = f"^{type(network).__name__} knows no condition 'lable'; there are: label, label_embedding$"
        for asked in (denoiser, ClassifierFree(denoiser, scale=2.0)):
            with pytest.raises(ValueError, match=message):
                asked(x, logsnr, cond)
        # a batch without a label is as legal as one with, and so is what wrappers are told
        told = {"seed": torch.arange(3), "measurement": torch.zeros(3, 5)}
        assert torch.equal(denoiser(x, logsnr, {}), denoiser(x, logsnr, None))
        assert torch.equal(denoiser(x, logsnr, told), denoiser(x, logsnr, None))


def test_a_wrong_class_is_named():
    for network, shape in networks(3):
        with pytest.raises(ValueError, match=r"label 3 is not one of the model's 3 classes \(0 .. 2\)"):
            network(torch.zeros(2, *shape), torch.zeros(2), {"label": torch.tensor([0, 3])})
