"""Lower precision inside the network: it trains, goes on bitwise, and nothing outside the network loses a digit."""

import itertools
import math

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny_training import BATCH, CLASSES, assert_equal, everything, fit, make_module

from diffusion_lab.app.assemble import assemble
from diffusion_lab.app.build import plain
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.session import conf_folder
from diffusion_lab.callbacks import GradientNorm
from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.denoisers.network import NetworkDenoiser
from diffusion_lab.ema import sigma_rel_to_gamma
from diffusion_lab.modules import NonFiniteLoss
from diffusion_lab.modules.checkpoint_io import load_checkpoint
from diffusion_lab.rng import StepRNG

LOWERED = ["bf16-mixed", "16-mixed"]
STEPS = 30


def config(*overrides):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("precision", LOWERED)
def test_it_learns_what_float32_learns_and_goes_on_bitwise(tmp_path, precision):
    whole = everything(*fit(tmp_path / "whole", STEPS * BATCH, precision=precision))
    fit(tmp_path / "part", 10 * BATCH, precision=precision, every=5 * BATCH)
    checkpoint = tmp_path / "part" / "checkpoints" / "images-0000000080.ckpt"
    scaler = load_checkpoint(checkpoint).get("MixedPrecision")
    assert_equal(
        everything(*fit(tmp_path / "part", STEPS * BATCH, precision=precision, resume=checkpoint)), whole
    )
    exact = everything(*fit(tmp_path / "exact", STEPS * BATCH))
    assert all(value.dtype != torch.bfloat16 and value.dtype != torch.float16 for value in whole.values())
    start = make_module().state_dict()
    weights = [key for key in exact if key.startswith("raw.denoiser") and "weight" in key]
    off = torch.cat([(whole[key] - exact[key]).flatten() for key in weights]).norm()
    moved = torch.cat([(exact[key] - start[key[4:]]).flatten() for key in weights]).norm()
    assert 0 < off < (0.05 if precision == "bf16-mixed" else 0.01) * moved
    if precision == "16-mixed":
        assert scaler["scale"] == 2.0**16 and scaler["_growth_tracker"] == 10


class Spy(StepCallback):
    """What the optimizer got, and what became of it."""

    def __init__(self):
        self.norms, self.weights, self.averages, self.updated, self.seen = [], [], [], [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    def on_step(self, trainer, module):
        self.updated.append(module.updated)
        self.seen.append(module.images_seen)
        self.weights.append(module.denoiser.network.layers[0].weight.detach().clone())
        self.averages.append(module.averages["power"].network.layers[0].weight.clone())


class Last(Spy):
    """After the averages."""

    def setup(self, trainer, pl_module, stage):
        trainer.callbacks = [c for c in trainer.callbacks if c is not self] + [self]


def bump(module, at, value):
    """Put `value` into one gradient of each step that starts at one of the clock's times `at`."""
    weight = module.denoiser.network.layers[0].weight

    def hook(gradient):
        return (
            gradient.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(value))
            if module.images_seen in at
            else gradient
        )

    weight.register_hook(hook)
    return module


def test_gradients_are_measured_and_clipped_unscaled(tmp_path):
    found = {}
    for precision in ("32-true", "16-mixed"):
        spy, norm = Spy(), GradientNorm(clip=0.05)
        fit(tmp_path / precision, 4 * BATCH, extra=[norm, spy], precision=precision)
        found[precision] = spy.norms, float(norm._norm)
    assert found["16-mixed"][0] == pytest.approx([0.05] * 3, rel=1e-3)
    # 65,536 times larger if it were scaled
    assert found["16-mixed"][1] == pytest.approx(found["32-true"][1], rel=0.02) and found["32-true"][1] > 0.05


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_changes_no_weight_and_no_average_but_the_clock_goes_on(tmp_path, fused):
    bad, spy = 5 * BATCH, Last()
    module = bump(make_module(), {bad}, math.inf)
    factory = module.optimizer_factory
    module.optimizer_factory = lambda params: type(factory(params))(params, lr=1e-2, fused=fused)
    module, trainer = fit(tmp_path, 8 * BATCH, module=module, extra=[spy], precision="16-mixed")
    assert spy.seen == [n * BATCH for n in range(1, 9)] and module.images_seen == 8 * BATCH
    assert spy.updated == [n != 5 for n in range(8)]
    for kind in (spy.weights, spy.averages):
        same = [torch.equal(a, b) for a, b in itertools.pairwise(kind)]
        assert same == [n == 4 for n in range(7)]
        assert all(bool(value.isfinite().all()) for value in kind)
    # scaled half as much from then on, and the optimizer has not counted it
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**15
    assert {int(slot["step"]) for slot in trainer.optimizers[0].state.values()} == {7}
    logged = (tmp_path / "metrics.csv").read_text()
    assert "inf" not in logged and "nan" not in logged


@pytest.mark.parametrize("left_out", [1, 3])
def test_first_steps_that_overflow_leave_the_power_average_right(tmp_path, left_out):
    """The scaler starts high, so first steps are often left out. The clock has gone on by the first update, whose decay
    is then not 0. That is right: until then the live weights stood still where the average stands."""
    bad, spy = {n * BATCH for n in range(left_out)}, Last()
    fit(tmp_path, 10 * BATCH, module=bump(make_module(), bad, math.inf), extra=[spy], precision="16-mixed")
    assert spy.updated == [n >= left_out for n in range(10)]
    power = sigma_rel_to_gamma(0.1) + 1
    expected = make_module().denoiser.network.layers[0].weight.detach().double()
    for k, live in enumerate(spy.weights, 1):
        # the profile over all that the clock has counted, (1 - b / n)^(gamma + 1), steps left out included
        expected = torch.lerp(live.double(), expected, (1 - 1 / k) ** power)
        torch.testing.assert_close(spy.averages[k - 1].double(), expected, rtol=1e-5, atol=1e-8)
    assert not torch.equal(spy.averages[-1], spy.weights[-1])


def test_the_same_run_resumed_behind_such_a_step_is_bitwise_the_same(tmp_path):
    def run(folder, images, **options):
        module = bump(make_module(), {5 * BATCH}, math.inf)
        return everything(
            *fit(folder, images, module=module, precision="16-mixed", every=6 * BATCH, **options)
        )

    whole = run(tmp_path / "whole", 12 * BATCH)
    run(tmp_path / "part", 6 * BATCH)
    checkpoint = tmp_path / "part" / "checkpoints" / "images-0000000048.ckpt"
    assert_equal(run(tmp_path / "part", 12 * BATCH, resume=checkpoint), whole)


def test_gradients_that_always_overflow_end_the_run(tmp_path):
    module = bump(make_module(), range(3 * BATCH, 10**6), math.nan)
    with pytest.raises(NonFiniteLoss, match=r"^the gradient is not finite at step 27 \(216 images seen\)"):
        fit(tmp_path, 10**4, module=module, precision="16-mixed", every=10**4)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_other_precisions_lower_the_coefficients_too_and_are_refused(tmp_path):
    for precision in ("bf16-true", "16-true"):
        cfg = config(f"trainer.precision={precision}", "trainer=cpu", f"paths.run={tmp_path}", "name=x")
        cfg.trainer.precision = precision
        with pytest.raises(UserError, match=f"^trainer.precision={precision}: .*choose one of 32-true"):
            assemble(plain(cfg))


def test_float16_is_float16_on_a_cpu_too(tmp_path):
    # Lightning takes bfloat16 there, without a word
    cfg = config("trainer=cpu", "trainer.precision=16-mixed", f"paths.run={tmp_path}", "name=x")
    cfg.logger = {}
    trainer = assemble(plain(cfg)).trainer
    assert trainer.precision == "16-mixed" and trainer.precision_plugin.scaler is not None
    with trainer.precision_plugin.forward_context():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16


class Told(torch.nn.Module):
    """A network that autocast does not touch; it keeps what it was given."""

    def __init__(self, channels):
        super().__init__()
        self.gain, self.channels, self.given = torch.nn.Parameter(torch.tensor(0.5)), channels, []

    def forward(self, x, logsnr, cond=None):
        self.given.append((x.detach(), logsnr.detach()))
        out = self.gain * x * torch.tanh(logsnr).view(-1, *[1] * (x.ndim - 1))
        return torch.cat([out] * self.channels, dim=1)


METHODS = {
    "diffusion": [],
    "adaptive": ["schedule=adaptive"],
    "vdm": ["schedule=learned"],
    "edm2": [],
    "iddpm": ["model.out_channels=2"],
    "input_perturbation": [],
    "loss_aware": [],
}


@pytest.mark.parametrize("lowered", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_schedules_coefficients_and_losses_are_untouched_by_autocast(method, lowered):
    module = hydra.utils.instantiate(config(f"method={method}", "batch_size=8", *METHODS[method]).method)
    assert isinstance(module.denoiser, NetworkDenoiser)
    results = []
    for enabled in (False, True):
        network = module.denoiser.network = Told(2 if method == "iddpm" else 1)
        g = torch.Generator().manual_seed(0)
        x0 = torch.randint(0, 256, (8, 1, 8, 8), generator=g) / 127.5 - 1
        rng = StepRNG(seed=0, step=3, positions=slice(None), total=8, device=x0.device)
        with torch.autocast("cpu", lowered, enabled=enabled):
            terms = module.loss(module.denoiser, x0, {"label": torch.arange(8) % CLASSES}, rng)
            logsnr = torch.linspace(-12, 12, 8)
            out = module.denoiser.predict(x0, logsnr)
        terms.total.backward()
        parameters = [p.grad for p in module.parameters() if p.grad is not None]
        results.append([terms.total, terms.per_example, terms.logsnr, out.x0, out.raw, *parameters])
        results[-1] += [value for pair in network.given for value in pair]
        module.zero_grad()
    assert len(results[0]) == len(results[1]) > 8
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
        assert torch.equal(a, b)
