"""What the tests of metrics share: a file like the published Inception's, with random weights."""

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory):
    """A file of the published file's keys and shapes with random weights, made from torch-fidelity's own class.

    The weights keep the size of the activations from layer to layer, and no batch norm is the identity.
    """
    from unittest import mock

    from torch_fidelity import feature_extractor_inceptionv3 as module

    with (
        mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.8, 1.2)
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.1)
                nn.init.normal_(layer.running_mean, std=0.1)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture
def torch_fidelity_of():
    """What torch-fidelity makes of two sets of images under a feature network of ours."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    def metrics(network, samples, real, **wanted):
        class Theirs(FeatureExtractorBase):
            def __init__(self, name, features_list, feature_extractor_weights_path=None, **settings):
                super().__init__(name, features_list)
                self.network = network

            def forward(self, images):
                return (self.network(images),)

            @staticmethod
            def get_provided_features_list():
                return ("ours",)

            @staticmethod
            def get_default_feature_layer_for_metric(metric):
                return "ours"

            @staticmethod
            def can_be_compiled():
                return False

            @staticmethod
            def get_dummy_input_for_compile():
                return torch.zeros(1, *samples.shape[1:], dtype=torch.uint8)

        name = f"diffusion-lab-{type(network).__name__}"
        torch_fidelity.register_feature_extractor(name, Theirs)
        return torch_fidelity.calculate_metrics(
            input1=Images(samples), input2=Images(real), feature_extractor=name, cuda=False, cache=False,
            save_cpu_ram=True, verbose=False, **wanted,
        )  # fmt: skip

    return metrics
