import errno
import os
import pickle
import resource

import pytest
import torch

from diffusion_lab.modules import checkpoint_io
from diffusion_lab.modules.checkpoint_io import (
    AtomicCheckpointIO,
    checkpoint_name,
    find_resumable,
    images_of,
    load_checkpoint,
    save_checkpoint,
)
from diffusion_lab.modules.errors import CheckpointNotSaved, CheckpointTruncated, CheckpointUnsafe, RunError


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def content(n=0):
    return {
        "state_dict": {"w": torch.arange(500.0) + n},
        "images_seen": n,
        "name": "x",
        "list": [1, 2.5, None],
    }


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 400


def test_round_trip_is_bitwise_and_readable_without_us(tmp_path):
    path = tmp_path / "deep" / checkpoint_name(12800)
    assert path.name == "images-0000012800.ckpt" and images_of(path) == 12800
    io = AtomicCheckpointIO()
    io.save_checkpoint(content(3), path)
    for loaded in (io.load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["state_dict"]["w"], content(3)["state_dict"]["w"])
        assert loaded["list"] == [1, 2.5, None]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kept", [0, 1, 39, 40, 100, 0.3, 0.6, -41, -60, -300])
def test_truncation_anywhere_in_the_archive_is_detected(tmp_path, kept):
    path = tmp_path / checkpoint_name(1)
    save_checkpoint(content(), path)
    whole = path.read_bytes()
    size = kept if isinstance(kept, int) else int(kept * len(whole))
    path.write_bytes(whole[:size])
    with pytest.raises(CheckpointTruncated) as error:
        load_checkpoint(path)
    assert one_line(error) and str(path) in str(error.value)


def test_one_flipped_bit_is_detected(tmp_path):
    path = tmp_path / checkpoint_name(1)
    save_checkpoint(content(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointTruncated, match="checksum"):
        load_checkpoint(path)


@pytest.mark.parametrize("how", ["archive", "archive with trailer", "pickle"])
def test_a_checkpoint_with_code_is_refused_and_the_code_not_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / checkpoint_name(1)
    if how == "archive":
        torch.save({"x": RunsCode()}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"x": RunsCode()}))
    else:
        save_checkpoint({"x": RunsCode()}, path)
    with pytest.raises(CheckpointUnsafe) as error:
        load_checkpoint(path)
    assert one_line(error)
    assert not (tmp_path / "pwned").exists()
    # the test can fail: an ordinary load does run it
    if how == "archive":
        torch.load(path, weights_only=False)
        assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("after", [0, 1, 5, 20])
def test_full_disk_keeps_the_previous_file(tmp_path, monkeypatch, after):
    path = tmp_path / checkpoint_name(1)
    save_checkpoint(content(1), path)
    written = []

    def write(file, data):
        written.append(len(data))
        if len(written) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data)

    monkeypatch.setattr(checkpoint_io, "_write", write)
    with pytest.raises(CheckpointNotSaved, match="No space left on device") as error:
        save_checkpoint(content(2), path)
    assert one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_checkpoint(path)["images_seen"] == 1


def test_the_kernel_refusing_to_write_is_handled(tmp_path):
    # a real refusal: files of this process may not grow beyond 16 KiB
    path = tmp_path / checkpoint_name(1)
    save_checkpoint(content(1), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        with pytest.raises(CheckpointNotSaved, match="File too large"):
            save_checkpoint({"w": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_checkpoint(path)["images_seen"] == 1


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(content(), tmp_path / checkpoint_name(1))
    assert list(tmp_path.iterdir()) == []


def test_find_resumable_skips_bad_files_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_resumable(tmp_path) == (None, [])
    assert find_resumable(tmp_path / "missing") == (None, [])
    for n in (100, 200, 300, 400):
        save_checkpoint(content(n), tmp_path / checkpoint_name(n))
    (tmp_path / "notes.ckpt").write_text("not ours")
    assert find_resumable(tmp_path) == (tmp_path / checkpoint_name(400), [])
    cut = tmp_path / checkpoint_name(400)
    cut.write_bytes(cut.read_bytes()[:-100])
    torch.save({"x": RunsCode()}, tmp_path / checkpoint_name(300))
    path, messages = find_resumable(tmp_path)
    assert path == tmp_path / checkpoint_name(200)
    assert len(messages) == 2
    assert "0000000400" in messages[0] and "cut short" in messages[0]
    assert "0000000300" in messages[1] and "refused" in messages[1]


def test_missing_file_and_foreign_archive(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        load_checkpoint(tmp_path / "none.ckpt")
    torch.save({"w": torch.ones(3)}, tmp_path / "plain.ckpt")
    assert torch.equal(load_checkpoint(tmp_path / "plain.ckpt")["w"], torch.ones(3))
    with pytest.raises(ValueError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={})
