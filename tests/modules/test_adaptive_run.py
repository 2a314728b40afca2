"""What an adaptive loss learns is that of the whole batch, however it was shared out, and is kept in checkpoints.

That resumed runs and two processes learn the same is in test_resume.py and test_processes.py, whose runs adapt.
"""

import torch
from tiny_training import BATCH, fit, make_module


def still(module):
    # dropout is keyed by micro-batch
    module.denoiser.network.layers[2].p = 0.0
    return module


def test_the_schedule_follows_the_loss_of_the_whole_batch(tmp_path):
    found = []
    for accumulate in (1, 2):
        module, _ = fit(
            tmp_path / str(accumulate), 6 * BATCH, accumulate=accumulate, module=still(make_module())
        )
        found.append(module.loss.schedule.means)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[0], make_module().loss.schedule.means, rtol=0.1), (
        "it has learnt something"
    )


def test_what_a_loss_learns_does_not_decay(tmp_path):
    """AdamW would draw a schedule's end points, or an uncertainty, towards zero, whatever the objective says."""
    module = make_module()
    module.loss.own = torch.nn.Parameter(torch.tensor(3.0))
    before = module.denoiser.network.layers[0].weight.detach().clone()
    module.optimizer_factory = lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5)
    fit(tmp_path, 4 * BATCH, module=module)
    assert float(module.loss.own) == 3.0 and module.optimizers().param_groups[0]["weight_decay"] == 0.5
    assert not torch.equal(before, module.denoiser.network.layers[0].weight)
