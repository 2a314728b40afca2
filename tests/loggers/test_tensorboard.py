import numpy as np
import pytest
from PIL import Image

from diffusion_lab.loggers import TensorBoard, close_loggers, log_image, log_metrics

reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_scalars_and_pictures_lie_on_the_images_axis(tmp_path):
    log = TensorBoard(dirpath=str(tmp_path))
    for n in (1000, 2000):
        log_metrics([log], {"loss": 1000 / n}, n)
    log_image([log], "samples/grid", Image.fromarray(np.zeros((4, 5, 3), np.uint8)), 2000)
    close_loggers([log])
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1000, 1.0), (2000, 0.5)]
    (image,) = events.Images("samples/grid")
    assert (image.step, image.width, image.height) == (2000, 5, 4)
