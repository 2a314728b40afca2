"""Pictures and distances during training: what is made, on which seeds, and that training does not notice."""

import json
import math

import pytest
import torch
from PIL import Image
from tiny_training import BATCH, CLASSES, Data, Flat, assert_equal, everything, fit, generation, make_module

from diffusion_lab.callbacks import FrechetDuringTraining, SampleGrid
from diffusion_lab.callbacks.pictures import scatter, tile
from diffusion_lab.callbacks.sampling import chosen, conditions, pick
from diffusion_lab.images import to_uint8
from diffusion_lab.metrics.frechet import frechet_distance
from diffusion_lab.modules import RunError


def test_grid_and_trajectories_are_drawn_and_training_does_not_notice(tmp_path):
    grid = SampleGrid(
        generation=generation(),
        every_images=10 * BATCH,
        num_per_class=2,
        trajectories=3,
        dirpath=str(tmp_path / "samples"),
        moments=4,
    )
    frechet = FrechetDuringTraining(generation=generation(), every_images=10 * BATCH, n=30, extractor=Flat())
    with_pictures = everything(*fit(tmp_path / "a", 25 * BATCH, extra=[grid, frechet]))
    without = everything(*fit(tmp_path / "b", 25 * BATCH))
    assert_equal(with_pictures, without)
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == [f"{what}-{n:010d}.png" for what in ("grid", "trajectory") for n in (80, 160, 200)]
    # 3 classes wide and 2 high; 4 moments wide and 3 samples high; cells of 4 + 1 pixels, enlarged
    for name, columns, rows in ((names[0], CLASSES, 2), (names[3], 4, 3)):
        width, height = Image.open(tmp_path / "samples" / name).size
        assert width * (5 * rows + 1) == height * (5 * columns + 1)
    assert sorted(frechet.values) == [80, 160, 200]
    header, *rows = (tmp_path / "a" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("fd@30/flat/ema")
    logged = {int(r.split(",")[0]): float(r.split(",")[column]) for r in rows if r.split(",")[column]}
    assert logged == frechet.values


def test_the_distance_is_that_of_the_fixed_seeds(tmp_path):
    frechet = FrechetDuringTraining(
        generation=generation(), every_images=10**6, n=23, extractor=Flat(), ema="raw", seed=100, batch_size=7,
        file=str(tmp_path / "frechet.jsonl"),
    )  # fmt: skip
    module, _ = fit(tmp_path, 4 * BATCH, extra=[frechet])
    module.denoiser.eval()
    with torch.no_grad():
        images = generation()(
            module.denoiser,
            seeds=range(100, 123),
            cond={"label": torch.arange(23) % CLASSES},
        )
    fake = to_uint8(images).flatten(1).double()
    real = Data().test_images()[0].flatten(1).double()
    expected = frechet_distance(fake.mean(0), fake.T.cov(), real.mean(0), real.T.cov())
    assert frechet.values[32] == pytest.approx(expected, rel=1e-6)
    assert frechet.name == "fd@23/flat/raw"
    (line,) = (tmp_path / "frechet.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (
        told["images_seen"] == 32 and told["value"] == frechet.values[32] and told["label"] == "FD@23 (flat)"
    )
    assert "seeds 100..122, weights raw, sampler DDIM" in told["conditions"] and told["reference_n"] == len(
        real
    )


def test_the_live_module_stays_in_training_mode(tmp_path):
    modes = []

    class Spy(Flat):
        def __call__(self, images):
            modes.append(module.denoiser.network.training)
            return super().__call__(images)

    module = make_module()
    frechet = FrechetDuringTraining(
        generation=generation(), every_images=2 * BATCH, n=4, extractor=Spy(), ema="raw"
    )
    fit(tmp_path, 5 * BATCH, extra=[frechet], module=module)
    assert module.denoiser.network.training
    assert modes and all(modes)  # features come after sampling, when the mode is back


def test_an_unknown_average_is_one_clear_line(tmp_path):
    grid = SampleGrid(generation=generation(), every_images=BATCH, ema="best", dirpath=str(tmp_path / "s"))
    with pytest.raises(RunError, match="no average is called 'best'; there are: raw, ema, power"):
        fit(tmp_path, 5 * BATCH, extra=[grid])
    frechet = FrechetDuringTraining(
        generation=generation(), every_images=10**6, n=4, extractor=Flat(), ema="best"
    )
    module = make_module()
    with pytest.raises(RunError, match="no average is called 'best'"):
        fit(tmp_path / "f", 5 * BATCH, extra=[frechet], module=module)
    # before anything is trained
    assert module.images_seen == 0


@pytest.mark.parametrize("names", [(), ("power",), ("power", "ema")])
def test_without_a_name_it_is_the_first_average_or_the_live_weights(names):
    module = make_module()
    others = [make_module(seed=seed).denoiser for seed in range(1, 3)]
    module.averages.update(zip(names, others, strict=False))
    assert chosen(module, None) == (names[0] if names else "raw")
    assert pick(module, None) is (others[0] if names else module.denoiser)
    assert pick(module, "raw") is module.denoiser


def test_pictures_hold_the_pixels():
    images = torch.stack([torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), 1.0)])
    picture = tile(images, 2, smallest=7)
    assert picture.size == (7, 4)
    assert picture.getpixel((1, 1)) == (0, 0, 0) and picture.getpixel((5, 2)) == (255, 255, 255)
    assert tile(torch.zeros(5, 3, 2, 2), 2, smallest=7).size == (7, 10)


def test_points_of_the_plane():
    canvas = scatter(torch.tensor([[0.0, 0.0], [2.99, 2.99], [9.0, 0.0], [math.nan, 0.0]]))
    dark = (canvas[0] < 0).nonzero().tolist()
    assert [0, 191] in dark and len(dark) == 2


@pytest.mark.parametrize(
    "options",
    [{"every_images": 0}, {"every_images": 8, "num_per_class": 0}, {"every_images": 8, "moments": 0}],
)
def test_bad_settings_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="SampleGrid"):
        SampleGrid(generation=generation(), dirpath=str(tmp_path), **options)
    with pytest.raises(ValueError, match="FrechetDuringTraining"):
        FrechetDuringTraining(generation=generation(), every_images=8, extractor=Flat(), n=1)


def test_samples_are_conditioned_on_what_the_data_set_gives():
    asked = []

    class Trainer:
        class datamodule:
            @staticmethod
            def conditions(seeds, labels):
                asked.append((seeds, labels))
                return {"image": torch.ones(2, 1)}

    labels, cpu = torch.tensor([1, 2]), torch.device("cpu")
    found = conditions(Trainer, [7, 8], labels, cpu)
    assert set(found) == {"label", "image"} and torch.equal(found["label"], labels)
    assert asked[0][0] == [7, 8] and torch.equal(asked[0][1], labels)
    assert set(conditions(Trainer, [7, 8], None, cpu)) == {"image"}
    # a data module of another kind knows only labels, or nothing
    assert set(conditions(object(), [7, 8], labels, cpu)) == {"label"}
    assert conditions(object(), [7, 8], None, cpu) is None
