"""A run whose weights are spread over two processes is the run of one process, in less memory, in the same files."""

import copy
import json

import pytest
import sharded_training
import test_processes
import torch
from sharded_training import BATCH, held, train

from diffusion_lab import sharded
from diffusion_lab.ema import EMA, ConstantDecay
from diffusion_lab.modules.checkpoint_io import checkpoint_name, load_checkpoint
from diffusion_lab.networks import EDM2, MLP, DiT, MMDiT, ResidualUViT, UNet, UViT, VDMUNet
from diffusion_lab.networks.magnitude_preserving import magnitude_preserving, normalize_weights

STEPS = 12
U = dict(in_channels=1, size=8, channels=8, multipliers=(1, 2), head_channels=8, num_classes=3)
TOKENS = dict(in_channels=1, size=8, patch=2, width=16, depth=2, heads=2, num_classes=3)
NETWORKS = {
    "unet": lambda: UNet(**U, blocks=1, attention=(4,)),
    "edm2": lambda: EDM2(**U, blocks=1, attention=(4,)),
    "uvit": lambda: UViT(**U, patch=1, blocks=(1, 2), embedding=32),
    "residual_uvit": lambda: ResidualUViT(**U, patch=1, blocks=(1, 2), embedding=32),
    "vdm": lambda: VDMUNet(in_channels=1, channels=16, blocks=1, num_classes=3),
    "dit": lambda: DiT(**TOKENS),
    "checkpointing": lambda: DiT(**TOKENS, checkpointing=True),
    "mmdit": lambda: MMDiT(**TOKENS, token_width=6),
    "mlp": lambda: MLP(dim=64, width=16, depth=2, num_classes=3),
}


@pytest.fixture
def mesh(tmp_path):
    """A world of one process: everything is cut into a single part, by the same code."""
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_learns_and_is_averaged_the_same_in_shards(mesh, name):
    g = torch.Generator().manual_seed(0)
    whole = NETWORKS[name]()
    with torch.no_grad():
        for p in whole.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    cuts, averages = copy.deepcopy(whole), []
    assert not sharded.is_sharded(cuts) and len(sharded.blocks(cuts)) > 1
    for network in (whole, cuts):
        averages.append(EMA(network, ConstantDecay(half_life_images=10, ramp_up=None)))
    for network in (cuts, averages[1].module):
        sharded.shard(network, mesh)
    assert sharded.is_sharded(cuts) and type(next(cuts.parameters())).__name__ == "DTensor"
    x = torch.randn(4, 64, generator=g) if name == "mlp" else torch.randn(4, 1, 8, 8, generator=g)
    given = (x, torch.linspace(-3, 3, 4), {"label": torch.tensor([0, 1, 2, -1])})
    norms, outs = [], []
    for network, average in zip((whole, cuts), averages, strict=True):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
        outs.append(network(*given))
        outs[-1].square().mean().backward()
        norms.append(sharded.total_norm([p.grad for p in network.parameters() if p.grad is not None]))
        optimizer.step()
        normalize_weights(magnitude_preserving(network))
        average.update(network, 8, 8)
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)
    for mine, theirs in ((cuts, whole), (averages[1].module, averages[0].module)):
        found, expected = sharded.gather(mine.state_dict(), keep=True), theirs.state_dict()
        assert list(found) == list(expected) and not any(sharded._is_cut(v) for v in found.values())
        for key, value in found.items():
            torch.testing.assert_close(
                value, expected[key], rtol=1e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_whole_tensors_are_loaded_sampled_and_sharded_again(mesh):
    network, other = NETWORKS["dit"](), NETWORKS["dit"]()
    given = (torch.randn(2, 1, 8, 8), torch.zeros(2), None)
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(0.01)
    sharded.shard(network, mesh)
    sharded.load_whole(network, other.state_dict())
    with torch.no_grad(), sharded.unsharded(network):
        # no collective in here: that is what lets processes call it differently often
        assert not any(sharded._is_cut(p) for p in network.parameters())
        torch.testing.assert_close(network(*given), other(*given))
        assert not any(sharded._is_cut(p) for p in network.parameters())
    assert all(sharded._is_cut(p) for p in network.parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        sharded.load_whole(network, {})


def test_what_is_not_sharded_passes_through():
    tensor = torch.ones(3)
    assert sharded.local(tensor) is tensor and sharded.cut(tensor, torch.zeros(3)) is tensor
    state = {"a": [tensor, (1, "b")], "c": None}
    assert sharded.gather(state, keep=False) == state
    assert sharded.total_norm([tensor, 2 * tensor]).item() == pytest.approx(15**0.5)


def test_a_run_in_one_part_saves_and_goes_on_as_any_other(tmp_path):
    # the whole strategy, in this process
    try:
        train(tmp_path / "cut", 4 * BATCH, every=2 * BATCH, scores=True)
        resumed = tmp_path / "cut" / "checkpoints" / checkpoint_name(2 * BATCH)
        train(tmp_path / "again", 4 * BATCH, resume=resumed)
    finally:
        torch.distributed.destroy_process_group()
    train(tmp_path / "whole", 4 * BATCH, sharded=False)
    train(tmp_path / "on", 4 * BATCH, sharded=False, resume=resumed)
    whole = flat(tmp_path / "whole", 4 * BATCH)
    for other in ("cut", "again", "on"):
        assert_close(flat(tmp_path / other, 4 * BATCH), whole)


# ---- two processes -----------------------------------------------------------------------------------------------


def start(monkeypatch, folder, **options):
    """Run two sharded processes to their end."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(test_processes, "SCRIPT", sharded_training.__file__)
    codes, outputs = test_processes.finish(test_processes.start(folder, 2, **options))
    assert codes == [0, 0], outputs
    return folder


def flat(folder, images):
    """Everything a checkpoint holds, flattened."""
    out = {}

    def walk(prefix, value):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            if isinstance(inner, dict | list | tuple):
                walk(f"{prefix}/{key}", inner)
            else:
                out[f"{prefix}/{key}"] = inner

    walk("", load_checkpoint(folder / "checkpoints" / checkpoint_name(images)))
    return out


def assert_close(a, b):
    # whether a file was written within an epoch or at the end of training is no difference
    assert len(a) > 100 and a.pop("/epoch", 0) + b.pop("/epoch", 0) < 3
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert type(value) is torch.Tensor
            torch.testing.assert_close(value, b[key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        elif not isinstance(value, float):
            assert value == b[key], key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, held(*train(folder, 2 * STEPS * BATCH, sharded=False, scores=True, every=STEPS * BATCH))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = {"devices": 2, "max_images": STEPS * BATCH, "scores": True}
        return start(monkeypatch, tmp_path_factory.mktemp("two"), **options)


@pytest.mark.slow
def test_two_processes_in_shards_reach_what_one_reaches(two, alone):
    # weights, averages, optimizer state, names and shapes: the file of one process
    assert_close(flat(two, STEPS * BATCH), flat(alone[0], STEPS * BATCH))
    start = sharded_training.make_module().state_dict()
    moved = [
        float((v - start[k[12:]]).abs().max())
        for k, v in flat(two, STEPS * BATCH).items()
        if "state_dict" in k
    ]
    assert max(moved) > 0.05


@pytest.mark.slow
def test_logs_and_pictures_are_those_of_one(two, alone):
    rows = [
        [line.split(",") for line in (f / "metrics.csv").read_text().splitlines()] for f in (two, alone[0])
    ]
    assert rows[0][0] == rows[1][0] and "fd@31/flat/ema" in rows[0][0]
    for ours, theirs in zip(rows[0][1:], rows[1][1:], strict=False):
        for name, a, b in zip(rows[0][0], ours, theirs, strict=True):
            # two ended, and was scored, where one went on
            if a and b and not name.startswith(("images_per_s", "model_tflop")):
                assert float(a) == pytest.approx(float(b), rel=1e-3), name
    assert sum(bool(row[rows[0][0].index("fd@31/flat/ema")]) for row in rows[0][1:]) == 3
    names = [{p.name for p in (folder / "samples").iterdir()} for folder in (two, alone[0])]
    assert len(names[0] & names[1]) == 4


@pytest.mark.slow
def test_each_process_holds_half(two, alone):
    shares = [json.loads((two / f"held-{rank}.json").read_text()) for rank in range(2)]
    for kind, whole in alone[1].items():
        parts = [share[kind] for share in shares]
        # each also holds the whole of the loss, a few numbers, and the optimizer's counters
        assert whole <= sum(parts) < whole + 500, kind
        assert max(parts) < 0.56 * whole, kind


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(two, alone, tmp_path, monkeypatch):
    stopped = {folder: folder / "checkpoints" / checkpoint_name(STEPS * BATCH) for folder in (two, alone[0])}
    train(tmp_path / "one", 2 * STEPS * BATCH, sharded=False, resume=stopped[two])
    whole = flat(alone[0], 2 * STEPS * BATCH)
    assert_close(flat(tmp_path / "one", 2 * STEPS * BATCH), whole)
    options = {"devices": 2, "max_images": 2 * STEPS * BATCH, "resume": str(stopped[alone[0]])}
    assert_close(flat(start(monkeypatch, tmp_path / "two", **options), 2 * STEPS * BATCH), whole)
    # and with micro-batches
    again = start(monkeypatch, tmp_path / "micro", **options, accumulate=2)
    assert_close(flat(again, 2 * STEPS * BATCH), whole)
