"""An offline W&B run is read back from the file it leaves: LevelDB log framing around protobuf records."""

import json
import struct
import time
import warnings

import pytest
from PIL import Image

from diffusion_lab.loggers import WandB, close_loggers, log_image, log_metrics

wandb_pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")

BLOCK = 32768


def records(path):
    """Yield the records of a .wandb file: 7-byte header, then blocks of `crc u32, length u16, type u8, data`."""
    data = path.read_bytes()
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = wandb_pb.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def key(item):
    return item.key or "/".join(item.nested_key)


def read(folder):
    """What is in the file of a run; wandb's own process may write the end of it a moment after `finish` returns."""
    deadline = time.monotonic() + 20.0
    while not (found := read_now(folder))[-1] and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def read_now(folder):
    (path,) = folder.rglob("*.wandb")
    history, config, run_id, metrics, finished = [], {}, None, [], False
    for record in records(path):
        if record.HasField("history"):
            history.append({key(i): json.loads(i.value_json) for i in record.history.item})
        for source in (record.run.config, record.config):
            config |= {key(i): json.loads(i.value_json) for i in source.update}
        if record.HasField("run"):
            run_id = record.run.run_id
        if record.HasField("metric"):
            metrics.append(record.metric)
        finished = finished or record.HasField("exit")
    return history, config, run_id, metrics, finished


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


def job(folder, loss, picture=True):
    log = WandB(dirpath=str(folder), project="tests", tags=["tiny"])
    log.log_hyperparams({"seed": 3, "model": {"width": 8}})
    log_metrics([log], {"loss": loss}, 1000)
    log_metrics([log], {"loss": loss / 2, "fd@500/pixels/ema": 4.5}, 2000)
    if picture:
        log_image([log], "samples/grid", Image.new("RGB", (8, 6), (255, 0, 0)), 2000)
    return log


def test_history_config_and_pictures_are_found_and_jobs_are_apart(tmp_path):
    # two jobs of a sweep in one process
    for name, loss in (("a", 0.5), ("b", 0.25)):
        close_loggers([job(tmp_path / name, loss)])
    ids = []
    for name, loss in (("a", 0.5), ("b", 0.25)):
        history, config, run_id, metrics, finished = read(tmp_path / name)
        assert finished
        assert [(row["images_seen"], row["loss"]) for row in history if "loss" in row] == [
            (1000, loss),
            (2000, loss / 2),
        ]
        assert any(row.get("fd@500/pixels/ema") == 4.5 for row in history)
        assert config["seed"] == 3 and config["model"] == {"width": 8}
        (grid,) = [row for row in history if "samples/grid/_type" in row]
        assert grid["images_seen"] == 2000
        assert (grid["samples/grid/width"], grid["samples/grid/height"]) == (8, 6)
        (picture,) = (tmp_path / name).rglob("samples/grid*.png")
        assert Image.open(picture).getpixel((0, 0)) == (255, 0, 0)
        axis = [m for m in metrics if m.glob_name == "*" or m.name == "loss"]
        assert axis and all(m.step_metric == "images_seen" for m in axis)
        assert run_id == (tmp_path / name / "wandb_id.txt").read_text().strip()
        ids.append(run_id)
    assert ids[0] != ids[1]


def test_an_offline_run_says_how_to_upload_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    close_loggers([job(tmp_path / "a", 0.5, picture=False)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "wandb sync" in line]
    folder = line.removeprefix("W&B offline: upload with  wandb sync ")
    assert folder.startswith("a/wandb/offline-run-") and list((tmp_path / folder).glob("*.wandb"))


def test_looking_for_an_account_warns_of_nothing(monkeypatch, tmp_path):
    from diffusion_lab.loggers import wandb as ours

    for key in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours._mode(None) == "offline"


def test_a_resumed_job_keeps_its_id(tmp_path):
    first = job(tmp_path, 1.0, picture=False)
    before = first.experiment.id
    close_loggers([first])
    second = WandB(dirpath=str(tmp_path), project="tests")
    assert second.experiment.id == before == second.version
    close_loggers([second])


def test_a_run_left_open_is_not_joined(tmp_path):
    # the first job died before it could close its run
    first = job(tmp_path / "a", 1.0, picture=False)
    second = job(tmp_path / "b", 2.0, picture=False)
    assert first.experiment.id != second.experiment.id
    close_loggers([first, second])


def test_under_an_agent_of_a_sweep_the_run_is_the_agent_s(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    # without a sweep it may be left over from anything: two jobs of one shell would share a run
    assert WandB(dirpath=str(tmp_path / "alone"), offline=True).run_id() != "given"
    monkeypatch.setenv("WANDB_SWEEP_ID", "a sweep")
    assert WandB(dirpath=str(tmp_path / "job"), offline=True).run_id() == "given"
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    assert WandB(dirpath=str(tmp_path / "job"), offline=True).run_id() == "given"
