import pytest
import torch
from tiny_training import BATCH, CLASSES, assert_equal, everything, fit, make_module

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.modules import DiffusionModule, LinearDecay, NonFiniteLoss, RunError
from diffusion_lab.networks import EDM2
from diffusion_lab.networks.magnitude_preserving import magnitude_preserving
from diffusion_lab.process import VariancePreserving


def test_the_clock_counts_images_and_stops_the_run(tmp_path):
    module, trainer = fit(tmp_path, 5 * BATCH - 3)
    assert module.images_seen == 5 * BATCH
    assert trainer.global_step == 5
    again, _ = fit(tmp_path, 5 * BATCH, resume=tmp_path / "checkpoints" / "images-0000000040.ckpt")
    assert again.images_seen == 5 * BATCH
    assert set(module.denoisers()) == {"raw", "ema", "power"}
    assert module.denoisers()["raw"] is module.denoiser


def test_learning_rate_is_a_function_of_the_clock(tmp_path):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    module = make_module()
    module.optimizer_factory = lambda params: Spy(params, lr=0.5)
    fit(tmp_path, 10 * BATCH, module=module)
    schedule = LinearDecay(max_images=1000, warmup_images=40)
    assert rates == [0.5 * schedule(n * BATCH) for n in range(10)]


def test_accumulation_gives_the_same_data_noise_and_weights(tmp_path):
    results = []
    for accumulate in (1, 2, 4):
        module = make_module()
        # dropout is keyed by micro-batch, so it is the one thing that differs
        module.denoiser.network.layers[2].p = 0.0
        fit(tmp_path / str(accumulate), 8 * BATCH, accumulate=accumulate, module=module)
        assert module.images_seen == 8 * BATCH
        results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_seed_and_global_random_state(tmp_path):
    # `fit` puts the global generator into a state that depends on the folder
    a = everything(*fit(tmp_path / "a", 4 * BATCH))
    assert_equal(a, everything(*fit(tmp_path / "b", 4 * BATCH)))
    c = everything(*fit(tmp_path / "c", 4 * BATCH, seed=1))
    assert not torch.equal(
        a["raw.denoiser.network.layers.0.weight"], c["raw.denoiser.network.layers.0.weight"]
    )


def test_dropout_is_on_while_training_and_differs_between_steps():
    module = make_module()
    assert module.denoiser.training and module.denoiser.network.layers[2].p > 0


def test_averages_are_their_own_tensors_and_the_checkpoint_has_both(tmp_path):
    module, trainer = fit(tmp_path, 10 * BATCH)
    checkpoint = torch.load(tmp_path / "checkpoints" / "images-0000000080.ckpt", weights_only=True)
    live = module.denoiser.network.layers[0].weight
    for name in ("ema", "power"):
        shadow = module.averages[name].network.layers[0].weight
        assert not torch.equal(live, shadow) and not shadow.requires_grad
    assert torch.equal(checkpoint["state_dict"]["denoiser.network.layers.0.weight"], live)
    assert checkpoint["images_seen"] == 80
    assert "loops" not in checkpoint and "hyper_parameters" not in checkpoint
    assert not any("averages" in key or "ema" in key for key in module.state_dict())
    assert trainer.callbacks[-1].__class__.__name__ == "Checkpoints"


class Weights(StepCallback):
    """Records the first layer's weights after each step."""

    def __init__(self):
        self.seen = []

    def on_step(self, trainer, module):
        self.seen.append(module.denoiser.network.layers[0].weight.detach().double().clone())


def test_averages_follow_the_papers_decay_on_the_clock(tmp_path):
    live, module = Weights(), make_module()
    start = module.denoiser.network.layers[0].weight.detach().double().clone()
    fit(tmp_path, 12 * BATCH, module=module, extra=[live])
    assert len(live.seen) == 12
    ema, power = start, start
    for k, weight in enumerate(live.seen, 1):
        n = k * BATCH
        # Karras et al. 2022, appendix F.2: the half-life in images, at most a twentieth of those seen
        decay = 0.5 ** (BATCH / min(50, 0.05 * n))
        ema = decay * ema + (1 - decay) * weight
        # Karras et al. 2024, section 3: gamma = 6.937 for sigma_rel = 0.1
        decay = (1 - 1 / k) ** (6.937204 + 1)
        power = decay * power + (1 - decay) * weight
    for name, expected in (("ema", ema), ("power", power)):
        got = module.averages[name].network.layers[0].weight.double()
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
        # and that is far from what the neighbouring rules would give
        assert float((got - live.seen[-1]).abs().max()) > 1e-3


@pytest.mark.parametrize("options", [{"global_batch_size": BATCH + 1}, {"global_batch_size": 2 * BATCH}])
def test_a_batch_of_the_wrong_size_is_one_clear_line(tmp_path, options):
    with pytest.raises(RunError, match="global batch size") as error:
        fit(tmp_path, 80, module=make_module(**options))
    assert "\n" not in str(error.value)


def test_uneven_shares_are_refused(tmp_path):
    with pytest.raises(RunError, match="does not divide"):
        fit(tmp_path, 80, accumulate=3)
    with pytest.raises(ValueError, match="positive"):
        make_module(global_batch_size=0)


def test_nonfinite_loss_stops_before_the_update_and_saves_nothing(tmp_path):
    good = everything(*fit(tmp_path / "good", 6 * BATCH, every=BATCH))
    module = make_module()
    with pytest.raises(NonFiniteLoss) as error:
        fit(tmp_path / "bad", 20 * BATCH, every=BATCH, spoil=6 * BATCH, module=module)
    assert error.value.step == 6 and error.value.images_seen == 48
    assert "step 6" in str(error.value) and "48 images" in str(error.value) and "\n" not in str(error.value)
    # the spoilt example is the last row; its noise level is that of the same row of the same step
    torch.testing.assert_close(error.value.logsnr, float(module.terms[-1].logsnr[-1]))
    assert module.images_seen == 48
    for name, value in module.state_dict().items():
        assert torch.equal(value, good[f"raw.{name}"]), name
    for name, value in module.averages["ema"].state_dict().items():
        assert torch.equal(value, good[f"ema.{name}"]), name
    kept = sorted(p.name for p in (tmp_path / "bad" / "checkpoints").iterdir())
    assert kept == [f"images-{n:010d}.ckpt" for n in (32, 40, 48)]


def test_a_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "x.ckpt")
    with pytest.raises(RunError, match="images_seen"):
        fit(tmp_path, 80, resume=tmp_path / "x.ckpt")


def test_magnitude_preserving_weights_are_put_back_after_each_step(tmp_path):
    network = EDM2(
        in_channels=1,
        size=4,
        channels=8,
        multipliers=(1,),
        blocks=1,
        attention=(),
        head_channels=8,
        num_classes=CLASSES,
    )
    module = make_module()
    denoiser = NetworkDenoiser(network=network, interpolant=VariancePreserving(), prediction=V())
    module = DiffusionModule(
        denoiser=denoiser,
        loss=module.loss,
        optimizer=module.optimizer_factory,
        seed=0,
        global_batch_size=BATCH,
    )
    before = [layer.weight.clone() for layer in magnitude_preserving(network)]
    fit(tmp_path, 3 * BATCH, module=module)
    for was, layer in zip(before, magnitude_preserving(network), strict=True):
        torch.testing.assert_close(layer.weight, layer.unit_weight(), rtol=1e-3, atol=0)
        assert not torch.allclose(layer.weight, was)
