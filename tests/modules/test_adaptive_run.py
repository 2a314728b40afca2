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
