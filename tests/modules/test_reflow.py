"""The wiring of reflow: pairs of each step, or kept ones that are the same whenever they are made; resume."""

from functools import partial

import pytest
import torch
from tiny_distillation import BATCH, SCHEDULE, Hearing, denoiser, fit, hearing_teacher, state

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.losses import SNRPlusOne
from diffusion_lab.losses.distillation import ReflowLoss
from diffusion_lab.modules import RunError
from diffusion_lab.modules.distillation import ReflowModule
from diffusion_lab.process import VariancePreserving
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.samplers.grids import uniform_u

TOTAL, STEPS = 6 * BATCH, 3


def module_of(**options):
    options = {
        "denoiser": denoiser(seed=1),
        "teacher": denoiser(seed=2),
        "sampler": DDIM(),
        "grid": uniform_u(SCHEDULE, STEPS),
        "loss": ReflowLoss(schedule=SCHEDULE, weighting=SNRPlusOne(schedule=SCHEDULE)),
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        **options,
    }
    return ReflowModule(seed=0, global_batch_size=BATCH, **options)


class Watch(StepCallback):
    """How often the teacher was asked, what had a gradient, and the pairs."""

    def __init__(self, module):
        self.calls, self.gradients, self.pairs, self.asked = [], [], [], 0
        module.teacher.network.register_forward_hook(self.count)
        loss = module.loss.forward

        def listening(student, ends, eps, cond, rng, one_step):
            self.pairs.append((ends, eps, cond))
            return loss(student, ends, eps, cond, rng, one_step=one_step)

        module.loss.forward = listening

    def count(self, *_):
        self.asked += 1

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.calls.append(self.asked)
        self.asked = 0
        self.gradients.append([p.grad is not None and bool(p.grad.any()) for p in module.parameters()])


@pytest.mark.parametrize(
    ("pairs", "calls"), [(None, [3] * 6), (2 * BATCH, [3, 3, 0, 0, 0, 0]), (BATCH + 1, [3, 3, 0, 0, 0, 0])]
)
def test_the_student_learns_on_pairs_that_are_kept_or_new_and_a_resume_is_bitwise(tmp_path, pairs, calls):
    module = module_of(pairs=pairs)
    watch = Watch(module)
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    expected = state(module, fit(tmp_path / "whole", module, TOTAL, extra=[watch]))
    assert watch.calls == calls and all(all(gradients) for gradients in watch.gradients)
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert {name.split(".")[0] for name in module.state_dict()} == {"denoiser"}
    # the pairs are the teacher's, from pure noise
    for ends, eps, cond in watch.pairs:
        _, sigma = VariancePreserving()(module.grid[0])
        again = DDIM()(module.teacher, float(sigma) * eps, module.grid)
        torch.testing.assert_close(ends, again)
        assert cond is None
    distinct = {tuple(ends.flatten().tolist()) for ends, *_ in watch.pairs}
    assert len(distinct) == (6 if pairs is None else 2)
    assert len({tuple(eps.flatten().tolist()) for _, eps, _ in watch.pairs}) == len(distinct)
    for at in (1, 4):
        module = module_of(pairs=pairs)
        watch_again = Watch(module)
        checkpoint = tmp_path / "whole" / "checkpoints" / f"images-{at * BATCH:010d}.ckpt"
        got = state(
            module, fit(tmp_path / f"again{at}", module, TOTAL, resume=checkpoint, extra=[watch_again])
        )
        assert got.keys() == expected.keys() and len(got) > 12
        assert not [name for name in got if not torch.equal(got[name], expected[name])]
        for (a, b, _), (c, d, _) in zip(watch_again.pairs, watch.pairs[at:], strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)


def test_kept_pairs_are_the_same_in_micro_batches(tmp_path):
    found = []
    for accumulate in (1, 2):
        module = module_of(pairs=BATCH)
        watch = Watch(module)
        fit(tmp_path / str(accumulate), module, 2 * BATCH, accumulate=accumulate, extra=[watch])
        assert watch.calls == [3 * accumulate, 0]
        found.append(torch.cat([eps for _, eps, _ in watch.pairs]))
    assert torch.equal(*found)


class Labelled(ReflowModule):
    """The tiny data have no labels: the sign of an image's sum is its class."""

    def losses(self, x0, cond, rng):
        return super().losses(x0, {"label": (x0.flatten(1).sum(1) > 0).long(), **(cond or {})}, rng)


def labelled(**options):
    student = NetworkDenoiser(network=Hearing(1), interpolant=VariancePreserving(), prediction=V())
    plain = module_of()
    return Labelled(
        denoiser=student, teacher=hearing_teacher(), sampler=DDIM(), grid=plain.grid, loss=plain.loss, seed=0,
        optimizer=plain.optimizer_factory, global_batch_size=BATCH, **options,
    )  # fmt: skip


@pytest.mark.parametrize("pairs", [None, BATCH])
def test_labels_are_those_of_the_data_or_for_kept_pairs_each_class_as_often(tmp_path, pairs):
    module, heard = labelled(pairs=pairs, guidance=partial(ClassifierFree, scale=2.0)), []
    module.teacher.network.register_forward_hook(lambda _, inputs, output: heard.append(inputs[2]["label"]))
    watch = Watch(module)
    fit(tmp_path, module, 2 * BATCH, extra=[watch])
    labels = [cond["label"] for *_, cond in watch.pairs]
    if pairs is None:
        assert not torch.equal(*labels)
    else:
        assert torch.equal(*labels) and torch.bincount(labels[0]).tolist() == [BATCH // 2] * 2
    # guided: both branches, the second with the labels that the student is told
    assert len(heard[0]) == 2 * BATCH and torch.equal(heard[0][BATCH:], labels[0])


def test_other_conditions_cannot_be_drawn():
    module = labelled(pairs=BATCH)
    with pytest.raises(RunError, match=r"method\.pairs=null"):
        module.labels({"label": torch.zeros(2), "text": torch.zeros(2)}, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": DDPM()}, "must solve the teacher's ODE, and DDPM draws noise"),
        ({"pairs": 0}, "method.pairs must be at least 1, or null"),
    ],
)
def test_what_does_not_fit_is_one_line(options, words):
    with pytest.raises(ValueError, match=words) as error:
        module_of(**options)
    assert "\n" not in str(error.value)
