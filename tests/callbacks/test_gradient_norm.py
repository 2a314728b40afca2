import pytest
import torch
from tiny_training import BATCH, fit, make_module

from diffusion_lab.callbacks import GradientNorm
from diffusion_lab.callbacks.base import StepCallback


class Gradients(StepCallback):
    """Keeps what the optimizer got."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.seen.append(torch.cat([g.flatten() for g in grads]).norm().item())


def logged(folder):
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("gradient_norm")
    return [float(row[column]) for row in rows[1:]]


def test_norm_is_logged_before_clipping_and_gradients_are_clipped(tmp_path):
    spy = Gradients()
    fit(tmp_path, 12 * BATCH, extra=[spy])
    assert len(spy.seen) == 11
    assert max(spy.seen) <= 1.0 + 1e-5
    # the third, sixth, ... step is logged; make_callbacks clips at 1, which these gradients stay below
    for n, value in enumerate(logged(tmp_path)[:3]):
        assert value == pytest.approx(spy.seen[3 * n + 2], rel=1e-5)


def test_clipping_bites(tmp_path):
    class Tight(GradientNorm):
        pass

    spy = Gradients()
    fit(tmp_path, 6 * BATCH, extra=[Tight(clip=1e-3), spy])
    assert all(value == pytest.approx(1e-3, rel=1e-4) for value in spy.seen)
    assert logged(tmp_path)[0] == pytest.approx(1e-3, rel=1e-4)  # measured again by the second one


@pytest.mark.parametrize("options", [{"every_images": 0}, {"clip": 0.0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match="GradientNorm"):
        GradientNorm(**options)


def test_an_infinite_gradient_with_a_finite_loss_is_caught(tmp_path):
    from diffusion_lab.modules import NonFiniteLoss

    module = make_module()
    weight = module.denoiser.network.layers[0].weight
    weight.register_hook(lambda g: g * float("inf"))
    before = weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match="the gradient is not finite at step 0"):
        fit(tmp_path, 3 * BATCH, module=module)
    assert torch.equal(weight, before)
    assert list((tmp_path / "checkpoints").iterdir()) == []
