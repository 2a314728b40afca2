import logging
import warnings

from diffusion_lab.loggers import hush_lightning


def test_adverts_go_and_the_rest_stays(caplog, monkeypatch):
    hush_lightning()
    hush_lightning()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    # Hydra's logging set-up, run in-process by other tests, disables the loggers that exist
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    logger.warning("Tip: try installing [litlogger](https://pypi.org/project/litlogger/)")
    logger.warning("something that matters")
    assert [r.getMessage() for r in caplog.records] == ["something that matters"]


def test_the_banner_of_several_processes_goes(caplog, monkeypatch):
    hush_lightning()
    for name in ("lightning.fabric.utilities.distributed", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "disabled", False)
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logging.getLogger("lightning.fabric"), "propagate", True)
        logger.warning("Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2")
        logger.warning("----\ndistributed_backend=gloo\nAll distributed processes registered.")
    assert not caplog.records


def test_hints_go_and_other_warnings_stay():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hush_lightning()
        warnings.warn(
            "The 'train_dataloader' does not have many workers which may be a bottleneck", stacklevel=1
        )
        warnings.warn("something that matters", stacklevel=1)
    assert [str(w.message) for w in seen] == ["something that matters"]
