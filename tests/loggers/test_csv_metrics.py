import math

import pytest
import torch

from diffusion_lab.loggers import CSVMetrics, close_loggers, log_metrics, rewind


def read(folder):
    return (folder / "metrics.csv").read_text()


def test_rows_merge_columns_grow_and_digits_survive(tmp_path):
    log = CSVMetrics(dirpath=str(tmp_path / "run"))
    log_metrics([log], {"loss": 0.1 + 0.2}, 10)
    log_metrics([log], {"lr": torch.tensor(0.5)}, 10)
    log_metrics([log], {"loss": math.nan}, 20)
    log_metrics([log], {"a,b": 3, "loss": 1e-300}, 30)
    log_metrics([log], {"late": 1.0}, 30)
    assert read(tmp_path / "run") == (
        'images_seen,loss,lr,"a,b",late\n10,0.30000000000000004,0.5,,\n20,nan,,,\n30,1e-300,,3,1.0\n'
    )
    with pytest.raises(ValueError, match="images_seen"):
        log.log_metrics({"x": 1.0})


def test_every_row_is_on_disk_at_once(tmp_path):
    log = CSVMetrics(dirpath=str(tmp_path))
    for n in range(5):
        log_metrics([log], {"loss": float(n)}, n)
        assert read(tmp_path).count("\n") == n + 2


def test_rewind_and_going_on_give_the_uninterrupted_file(tmp_path):
    def write(log, steps):
        for n in steps:
            log_metrics([log], {"loss": n / 7}, n)
            if n % 40 == 0:
                log_metrics([log], {"fd": n / 3}, n)

    whole = CSVMetrics(dirpath=str(tmp_path / "whole"))
    write(whole, range(10, 200, 10))
    for crash, resume in ((90, 60), (30, 30), (30, 0), (190, 190)):
        folder = tmp_path / f"{crash}-{resume}"
        write(CSVMetrics(dirpath=str(folder)), range(10, crash + 1, 10))
        with (folder / "metrics.csv").open("a") as file:
            file.write("95,0.12")  # a row cut off by the crash
        log = CSVMetrics(dirpath=str(folder))
        rewind([log], resume)
        write(log, range(resume + 10, 200, 10))
        close_loggers([log])
        assert read(folder) == read(tmp_path / "whole"), (crash, resume)


def test_a_second_logger_appends(tmp_path):
    log_metrics([CSVMetrics(dirpath=str(tmp_path))], {"loss": 1.0}, 1)
    log_metrics([CSVMetrics(dirpath=str(tmp_path))], {"loss": 2.0}, 2)
    assert read(tmp_path) == "images_seen,loss\n1,1.0\n2,2.0\n"
