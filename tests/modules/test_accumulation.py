"""A batch in parts is the batch: weights, averages, optimizer, learned loss and log agree to rounding."""

import pytest
import torch
from sharded_training import BATCH, train
from tiny_training import everything

STEPS = 12


def trained(folder, accumulate, precision):
    module, trainer = train(folder, STEPS * BATCH, sharded=False, accumulate=accumulate, precision=precision)
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    log = [
        float(row[name]) for row in rows for name in ("loss", "learning_rate", "gradient_norm") if row[name]
    ]
    assert len(log) == 3 * STEPS * BATCH // 24 and trainer.global_step == STEPS
    assert module.images_seen == STEPS * BATCH
    return everything(module, trainer), log


# in lower precision the sum over a part is rounded before it is added to the others
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("16-mixed", 5e-3)])
def test_parts_add_up(tmp_path, precision, tolerance):
    whole, log = trained(tmp_path / "1", 1, precision)
    start = everything(*train(tmp_path / "0", BATCH, sharded=False, precision=precision))
    assert max(float((whole[k] - start[k]).abs().max()) for k in whole if k.startswith("raw.denoiser")) > 0.05
    for accumulate in (2, 4):
        parts, parts_log = trained(tmp_path / str(accumulate), accumulate, precision)
        assert parts.keys() == whole.keys()
        for name, value in parts.items():
            torch.testing.assert_close(
                value, whole[name], rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert parts_log == pytest.approx(log, rel=max(1e-4, tolerance))
