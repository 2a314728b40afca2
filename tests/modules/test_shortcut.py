"""The wiring of shortcut models: a student begins as its teacher and teaches itself; resume is bitwise."""

from functools import partial

import pytest
import torch
from tiny_distillation import BATCH, SCHEDULE, Hearing, fit, hearing_teacher, state

from diffusion_lab.callbacks import EMACallback
from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.denoisers import ShortcutDenoiser, V
from diffusion_lab.ema import ConstantDecay
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.losses import SNRPlusOne
from diffusion_lab.losses.distillation import ShortcutLoss
from diffusion_lab.modules import RunError
from diffusion_lab.modules.distillation import ShortcutModule
from diffusion_lab.modules.errors import DoesNotFit
from diffusion_lab.process import VariancePreserving
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import STEPS

TOTAL = 6 * BATCH


def student_of(seed=1, finest=8):
    return ShortcutDenoiser(
        network=Hearing(seed, scalars=[STEPS]),
        interpolant=VariancePreserving(),
        prediction=V(),
        finest=finest,
    )


def module_of(share=0.5, **options):
    options = {
        "denoiser": student_of(),
        "teacher": hearing_teacher(),
        "loss": ShortcutLoss(schedule=SCHEDULE, weighting=SNRPlusOne(schedule=SCHEDULE), share=share),
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        **options,
    }
    return ShortcutModule(seed=0, global_batch_size=BATCH, **options)


def ema():
    return EMACallback(profiles={"ema": ConstantDecay(half_life_images=BATCH)})


class Watch(StepCallback):
    """What had a gradient at each step."""

    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append(
            {n for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
        )


def asked(denoiser, steps=None, n=5):
    x = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(7))
    cond = {} if steps is None else {STEPS: torch.full((n,), float(steps))}
    was = denoiser.training
    answer = denoiser.eval()(x, torch.linspace(-3, 3, n), {"label": torch.arange(n) % 2, **cond})
    denoiser.train(was)
    return answer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    module, watch, folder = module_of(target="ema"), Watch(), tmp_path_factory.mktemp("whole")
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    assert all(torch.equal(asked(module.denoiser, n), asked(module.teacher)) for n in (None, 1, 2, 8))
    # and not because nothing was there to be silenced
    assert not torch.equal(asked(student_of(), 1), asked(student_of(), 8))
    found = state(module, fit(folder, module, TOTAL, extra=[ema(), watch]))
    return module, watch, before, found, folder


def test_the_student_alone_learns_all_of_it_and_in_time_to_tell_steps_apart(whole):
    module, watch, before, _, _ = whole
    # the silenced layer first, then what is below it; the vector for a number that is not given never
    heard = {n for n, _ in module.named_parameters() if not n.endswith("null")}
    below = {n for n in heard if ".scalar_embeddings." in n and ".layers.0." in n}
    assert len(below) == 2 and watch.gradients[0] == heard - below
    assert watch.gradients[1:] == [heard] * 5
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert not torch.allclose(asked(module.denoiser, 1), asked(module.denoiser, 8), atol=1e-4)
    assert torch.equal(asked(module.denoiser), asked(module.denoiser, 8))
    assert {name.split(".")[0] for name in module.state_dict()} == {"denoiser"}


@pytest.mark.parametrize("at", [1, 4])
def test_a_resume_is_bitwise_with_an_average_for_a_target(tmp_path, whole, at):
    *_, expected, folder = whole
    module = module_of(target="ema")
    checkpoint = folder / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
    got = state(module, fit(tmp_path, module, TOTAL, resume=checkpoint, extra=[ema()]))
    assert got.keys() == expected.keys() and len(got) > 20
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


def test_an_average_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(
        (DoesNotFit, RunError), match=r"method\.target=other: there is no such average; there are: ema"
    ):
        fit(tmp_path, module_of(target="other"), TOTAL, extra=[ema()])


def step_of(module):
    """The losses of one step, without a trainer."""
    x0 = torch.randn(BATCH, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    rng = StepRNG(seed=0, step=0, positions=slice(None), total=BATCH)
    return module.distil(x0, {"label": torch.zeros(BATCH, dtype=torch.long)}, rng)


def test_targets_are_made_without_dropout_and_without_gradient_by_the_student_or_its_average():
    module = module_of(share=1.0)
    modes = []
    module.denoiser.network.register_forward_hook(
        lambda net, *_: modes.append((net.training, torch.is_grad_enabled()))
    )
    module.denoiser.train()
    with torch.autocast("cpu", torch.bfloat16):
        step_of(module).total.backward()
    assert modes == [(False, False), (False, False), (True, True)]
    assert module.denoiser.network.training and module.denoiser.network.drop.training
    # under autocast the student still learns
    assert all(p.grad is not None for n, p in module.denoiser.named_parameters() if not n.endswith("null"))
    average = student_of(seed=5).eval()
    asked_average = []
    average.network.register_forward_hook(lambda *_: asked_average.append(1))
    module = module_of(share=1.0, target="ema")
    module.averages["ema"] = average
    step_of(module)
    assert len(asked_average) == 2


def test_the_teacher_is_asked_where_it_is_wanted_and_with_guidance():
    module = module_of()
    module.teacher.network.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    step_of(module)
    module, heard = module_of(from_data=False, guidance=lambda t: ClassifierFree(t, scale=2.0)), []
    module.loss.forward = lambda *_, **options: heard.append(options)
    step_of(module)
    assert isinstance(heard[0]["teacher"], ClassifierFree)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": student_of(seed=2)}, "a shortcut model already"),
        ({"guidance": lambda teacher: ClassifierFree(teacher, scale=2.0)}, "method.from_data=false"),
    ],
)
def test_what_does_not_fit_is_one_line(options, words):
    with pytest.raises(ValueError, match=words) as error:
        module_of(**options)
    assert "\n" not in str(error.value)
