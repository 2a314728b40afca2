"""Shards as a stream: endless, supplied for any number of processes, and never a decoder or a command but ours."""

import itertools
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from shard_files import samples, shards, spoil, write

from diffusion_lab.data import DataError, ShardStream

B = 8


def stream(urls, **options):
    options = {"shape": (3, 8, 8), "num_classes": 10, "batch_size": B, "seed": 3, "shuffle": 20, **options}
    return ShardStream(urls=str(urls), **options)


def batches(data, n, **where):
    data.setup()
    return list(itertools.islice(iter(data.loader(**{"start": 0, **where})), n))


def numbers(found):
    return [k for b in found for k in b["x0"][:, 0, 0, 0].tolist()]


@pytest.fixture
def pattern(tmp_path):
    shards(tmp_path, lengths=(40, 7, 23))
    return tmp_path / "train-{000..002}.tar"


def test_batches_are_those_of_a_data_set_read_by_index(pattern):
    (batch, *_) = found = batches(stream(pattern), 40)
    assert batch["x0"].shape == (B, 3, 8, 8) and batch["x0"].dtype == torch.uint8
    assert all(b["label"].tolist() == [k % 10 for k in numbers([b])] for b in found)
    assert set(numbers(found)) == set(range(70))
    assert numbers(found)[:30] != sorted(numbers(found)[:30])


def test_the_draws_are_those_of_the_seed_the_rank_and_the_start(pattern, capsys):
    first = numbers(batches(stream(pattern), 4))
    assert numbers(batches(stream(pattern), 4)) == first
    assert numbers(batches(stream(pattern, seed=4), 4)) != first
    assert numbers(batches(stream(pattern), 4, rank=1, world=2)) != numbers(
        batches(stream(pattern), 4, rank=0, world=2)
    )
    assert "cannot be taken up" not in capsys.readouterr().out
    resumed = numbers(batches(stream(pattern), 2, start=2 * B))
    assert resumed != first[2 * B :] and resumed != first[: 2 * B]
    assert "a stream cannot be taken up where it was left" in capsys.readouterr().out


def test_more_workers_and_processes_than_shards_starve_nobody(pattern):
    data = stream(pattern, num_workers=2)
    for rank in range(4):
        found = batches(data, 3, rank=rank, world=4)
        assert [len(b["x0"]) for b in found] == [B // 4] * 3


def test_mirroring(pattern, tmp_path):
    from PIL import Image

    half = Image.new("L", (8, 8))
    half.paste(255, (4, 0, 8, 8))
    half.save(tmp_path / "half.png")
    write(tmp_path / "half.tar", [("0.png", (tmp_path / "half.png").read_bytes())])
    found = batches(stream(tmp_path / "half.tar", shape=(1, 8, 8), num_classes=0, flip=True), 20)
    left = torch.cat([b["x0"][:, 0, 0, 0] for b in found])
    assert 40 < int((left == 255).sum()) < 120 and "label" not in found[0]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_commands_are_refused_unless_allowed(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "pipe:touch owned; cat train-{000..002}.tar"
    for urls in (command, f"{pattern}::{command}", command.replace("pipe", " PIPE")):
        with pytest.raises(DataError, match="starts a command") as error:
            batches(stream(urls), 1)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="starts a command"):
        stream(pattern, test_urls="pipe:touch owned").setup()
    assert not (tmp_path / "owned").exists()
    assert set(numbers(batches(stream(command, allow_pipe=True), 4))) <= set(range(70))
    assert (tmp_path / "owned").exists()
    monkeypatch.setenv("WDS_SECURE", "1")
    with pytest.raises(DataError, match="WDS_SECURE"):
        batches(stream(command, allow_pipe=True), 1)


def test_a_command_that_the_environment_hides_behind_a_url_is_not_started(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOPEN_REWRITE", "http://host/=pipe:touch owned && cat ")
    with pytest.raises(DataError, match="gives no samples"):
        batches(stream("http://host/train-000.tar"), 1)
    assert not (tmp_path / "owned").exists()


def test_a_stored_config_starts_no_command(tmp_path, monkeypatch):
    from diffusion_lab.app.build import data_module

    node = {"_target_": "diffusion_lab.data.shards.stream_module.ShardStream", "urls": "pipe:touch owned"}
    node |= {"test_urls": "pipe:touch owned", "allow_pipe": True, "shape": [3, 8, 8], "num_classes": 0}
    monkeypatch.chdir(tmp_path)
    data = data_module({"dataset": {**node, "batch_size": 4, "seed": 0}})
    with pytest.raises(DataError, match="starts a command"):
        data.test_images()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("urls", ["missing.tar", "-", "s4://bucket/a.tar"])
def test_what_cannot_be_opened_is_said_at_once(urls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        stream(urls).setup()
    assert urls in str(error.value) and "\n" not in str(error.value)


class Owned:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Owned())
    members = [
        m for k in range(4) for m in [*samples([k]), *((f"{k:04d}.{s}", evil) for s in ("pyd", "pth", "pkl"))]
    ]
    write(tmp_path / "a.tar", members)
    assert set(numbers(batches(stream("a.tar"), 3))) == {0, 1, 2, 3}
    assert not (tmp_path / "owned").exists()


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_unreadable_samples_are_left_out_and_counted(pattern, tmp_path, capfd):
    spoil(tmp_path / "train-001.tar", "0043.png")
    data = stream(pattern, max_corrupt=0.1)
    found = [data.on_before_batch_transfer(b, 0) for b in batches(data, 60)]
    assert 43 not in numbers(found) and set(numbers(found)) == set(range(70)) - {43}
    assert data.skipped > 0 and all(set(b) == {"x0", "label"} for b in found)
    assert "train-001.tar: '0043'" in capfd.readouterr().err


def test_too_much_that_cannot_be_read_is_an_error(pattern, tmp_path):
    for k in range(40, 47):
        spoil(tmp_path / "train-001.tar", f"{k:04d}.png")
    with pytest.raises(DataError, match=r"max_corrupt=0\.01"):
        batches(stream(pattern), 60)
    (tmp_path / "train-001.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match="gives no samples"):
        batches(stream(tmp_path / "train-001.tar"), 1)


def test_test_samples_are_read_once_and_training_samples_have_no_index(pattern, tmp_path):
    data = stream(pattern, test_urls=str(tmp_path / "train-001.tar"))
    assert data.test_images()[0][:, 0, 0, 0].tolist() == list(range(40, 47))
    with pytest.raises(DataError, match="dataset=shards"):
        data.train_images()
    with pytest.raises(DataError, match=r"dataset\.test_urls"):
        stream(pattern).test_images()


@pytest.mark.timeout(60)
def test_over_http(pattern, tmp_path):
    import shutil

    if shutil.which("curl") is None:
        pytest.skip("webdataset reads HTTP through curl, which is not installed")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        found = batches(stream(f"{base}/train-{{000..002}}.tar"), 4)
        assert len(numbers(found)) == 4 * B and set(numbers(found)) <= set(range(70))
    finally:
        server.shutdown()
        server.server_close()
