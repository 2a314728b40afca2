"""Extractors: what they accept, whose weights they hold, and that nothing else than the published Inception passes."""

import hashlib
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_lab.metrics.features import (
    MNISTCNN,
    WEIGHTS,
    Classifier,
    Coordinates,
    DigitsCNN,
    FeatureExtractor,
    Inception,
    ManyOutputs,
    Pixels,
    UpsampledDigitsCNN,
    extract,
    offered,
)
from diffusion_lab.metrics.inception import FILE_NAME
from diffusion_lab.metrics.small_cnn import SmallCNN
from diffusion_lab.metrics.train_classifier import RECIPES, digest, digits_split, jitter, mnist_split, train


def test_pixels_are_in_the_units_of_x0():
    images = torch.tensor([[[[0, 255], [51, 204]]]], dtype=torch.uint8)
    torch.testing.assert_close(Pixels()(images), torch.tensor([[-1.0, 1.0, -0.6, 0.6]]))
    with pytest.raises(TypeError, match="uint8"):
        Pixels()(images.float())


def test_coordinates_take_floats_only():
    points = torch.tensor([[0.5, -3.0]])
    assert torch.equal(Coordinates()(points), points)
    with pytest.raises(TypeError, match="pixels"):
        Coordinates()(torch.zeros(2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("make, dim, size, least", [(DigitsCNN, 32, 8, 0.985), (MNISTCNN, 64, 28, 0.99)])
def test_packaged_classifiers(make, dim, size, least):
    extractor = make()
    assert isinstance(extractor, FeatureExtractor) and isinstance(extractor, Classifier)
    assert extractor.dim == dim and re.fullmatch("[0-9a-f]{64}", extractor.sha256)
    assert extractor.test_accuracy >= least
    images = torch.randint(0, 256, (5, 1, size, size), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    features, logits = extractor.features_and_logits(images)
    assert features.shape == (5, dim) and features.dtype == torch.float32 and logits.shape == (5, 10)
    assert torch.equal(extractor(images), features)
    assert not any(p.requires_grad for p in extractor.parameters())
    for key in ("seed", "split", "torch", "train_sha256", "test_sha256", "command", "recipe"):
        assert extractor.metadata[key]
    with pytest.raises(ValueError, match=f"{extractor.name} takes images"):
        extractor(images[:, :, :-1])
    with pytest.raises(ValueError, match="takes images"):
        extractor(images.expand(-1, 3, -1, -1))
    with pytest.raises(TypeError, match="uint8"):
        extractor(images.float())


def test_packaged_weights_are_small():
    sizes = {path.name: path.stat().st_size for path in WEIGHTS.glob("*.safetensors")}
    assert set(sizes) == {"digits_cnn.safetensors", "mnist_cnn.safetensors"}
    assert all(size < 500_000 for size in sizes.values()), sizes


def test_the_digits_classifier_saw_exactly_the_train_split_of_the_data_module():
    from diffusion_lab.data.digits import Digits

    data = Digits(batch_size=8, seed=0)
    data.setup()
    (train_images, train_labels), (test_images, test_labels) = data.train_images(), data.test_images()
    split, metadata = digits_split(), DigitsCNN().metadata
    assert torch.equal(split.train, train_images) and torch.equal(split.train_labels, train_labels)
    assert torch.equal(split.test, test_images) and torch.equal(split.test_labels, test_labels)
    assert (len(split.train), len(split.test)) == (1437, 360)
    assert metadata["train_sha256"] == digest(train_images) and metadata["test_sha256"] == digest(test_images)


def test_the_accuracy_in_the_metadata_is_true_and_the_covariance_sound():
    split, extractor = digits_split(), DigitsCNN()
    features, logits = extractor.features_and_logits(split.test)
    found = (logits.argmax(1) == split.test_labels).double().mean().item()
    assert found == pytest.approx(
        extractor.test_accuracy, abs=1.5 / 360
    )  # an image on the edge may tip elsewhere
    spectrum = torch.linalg.eigvalsh(torch.cov(features.double().T))
    assert spectrum[0] > 1e-4 * spectrum[-1]  # 360 images determine all 32 directions
    trained = extractor(split.train)
    torch.testing.assert_close(trained.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(trained.std(0), torch.ones(32), rtol=1e-4, atol=1e-4)


@pytest.mark.needs_data
def test_the_mnist_classifier_saw_the_published_train_split(data_root):
    from pathlib import Path

    split, extractor = mnist_split(Path(data_root) / "mnist"), MNISTCNN()
    assert extractor.metadata["train_sha256"] == digest(split.train)
    assert extractor.metadata["test_sha256"] == digest(split.test)
    logits = extractor.features_and_logits(split.test[:2000])[1]
    assert (logits.argmax(1) == split.test_labels[:2000]).double().mean() > 0.98


def test_training_is_a_function_of_its_seed_and_learns():
    from dataclasses import replace

    split = digits_split()
    recipe = replace(
        RECIPES["digits"], steps=300, architecture=replace(RECIPES["digits"].architecture, channels=(8, 16))
    )
    torch.manual_seed(1)
    first = train(split, recipe, seed=3)
    torch.manual_seed(2)
    again, other = train(split, recipe, seed=3), train(split, recipe, seed=4)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.embed.weight, other.embed.weight)
    with torch.no_grad():
        logits = first(split.test.float() / 127.5 - 1)[1]
    assert (logits.argmax(1) == split.test_labels).double().mean() > 0.8


def test_standardising_leaves_the_logits():
    torch.manual_seed(0)
    network = SmallCNN(size=8, channels=(4,), dim=6)
    x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features, logits = network(x)
        network.standardise(features * 1.0)
        after, logits_after = network(x)
    torch.testing.assert_close(logits_after, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.std(0), torch.ones(6), rtol=1e-3, atol=1e-3)


def test_jitter_without_amounts_changes_nothing():
    from dataclasses import replace

    x = digits_split().train[:20].float() / 127.5 - 1
    still = replace(RECIPES["digits"], rotation=0.0, stretch=0.0, shift=0.0, dither=0.0)
    rng = torch.Generator().manual_seed(0)
    torch.testing.assert_close(jitter(x, still, rng), x, rtol=0, atol=1e-5)
    moved = jitter(x, RECIPES["digits"], rng)
    assert moved.min() >= -1 and moved.max() <= 1 and not torch.allclose(moved, x, atol=0.1)


def test_missing_or_foreign_weights_are_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_classifier makes them") as caught:
        DigitsCNN(weights_path=tmp_path / "none.safetensors")
    assert "\n" not in str(caught.value)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="does not hold a classifier"):
        DigitsCNN(weights_path=tmp_path / "broken.safetensors")
    save_file(load_file(WEIGHTS / "digits_cnn.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="does not hold a classifier"):
        DigitsCNN(weights_path=tmp_path / "bare.safetensors")


def test_the_random_file_has_the_published_layout(random_inception):
    state = torch.load(random_inception, weights_only=True)
    assert len(state) == 566 and state["fc.weight"].shape == (1008, 2048)
    assert sum(x.numel() for x in state.values()) == 23_885_486


def test_inception_with_other_weights_is_refused_unless_told(random_inception):
    with pytest.raises(ValueError, match="not the published Inception") as caught:
        Inception(weights_path=random_inception)
    start = hashlib.sha256(random_inception.read_bytes()).hexdigest()[:8]
    assert start in str(caught.value) and "6726825d" in str(caught.value) and "\n" not in str(caught.value)


def test_inception_features_are_those_of_torch_fidelity(random_inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    ours = Inception(weights_path=random_inception, verify=False)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], str(random_inception))
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    features = ours(images)
    assert features.shape == (2, 2048) and features.dtype == torch.float32 and ours.dim == 2048
    # multiplying the batch norms into the convolutions moves the last digits
    truth = theirs(images)[0]
    torch.testing.assert_close(features, truth, rtol=1e-4, atol=2e-6 * truth.abs().max().item())
    assert ours.sha256 == hashlib.sha256(random_inception.read_bytes()).hexdigest()
    grey = images[:1, :1]
    assert torch.equal(ours(grey), ours(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(TypeError, match="uint8"):
        ours(images.float())
    with pytest.raises(ValueError, match="takes images"):
        ours(images[:, :2])


def test_all_outputs_of_inception_come_from_one_pass_and_alone(random_inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    ours = Inception(weights_path=random_inception, verify=False)
    assert isinstance(ours, ManyOutputs) and not isinstance(ours, Classifier)
    assert offered(ours) == ("features", "logits", "spatial")
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(random_inception))
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, made: seen.append(made))
    images = torch.randint(0, 256, (2, 3, 40, 30), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    features, logits = theirs(images)
    truth = {
        "features": features,
        "logits": logits,
        "spatial": seen[0].permute(0, 2, 3, 1)[..., :7].flatten(1),
    }  # as TensorFlow has it
    together = extract(ours, images, ("spatial", "logits", "features"))
    assert {name: tuple(found.shape) for name, found in together.items()} == {
        "features": (2, 2048), "logits": (2, 1008), "spatial": (2, 7 * 17 * 17),
    }  # fmt: skip
    for name, found in together.items():
        assert truth[name].std() > 0.01
        torch.testing.assert_close(found, truth[name], rtol=1e-4, atol=2e-6 * truth[name].abs().max().item())
        assert torch.equal(extract(ours, images, (name,))[name], found)
    with pytest.raises(ValueError, match="no pool"):
        extract(ours, images, ("pool",))


def test_only_what_is_asked_for_is_computed(random_inception):
    ours = Inception(weights_path=random_inception, verify=False)
    ran = []
    for name in ("Mixed_6c", "Mixed_6d", "Mixed_7c", "fc"):
        getattr(ours.network, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    extract(ours, images, ("spatial",))
    assert ran == ["Mixed_6c"]  # and one branch of the next block


def test_missing_inception_names_file_size_hash_and_source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for path in (None, tmp_path / "elsewhere.pth"):
        with pytest.raises(FileNotFoundError) as caught:
            Inception(weights_path=path)
        message = str(caught.value)
        assert "\n" not in message
        for part in (FILE_NAME, "95.7 MB", "6726825d", "https://", "weights_path"):
            assert part in message
    assert str(tmp_path / "elsewhere.pth") in message


def test_the_cache_of_torch_fidelity_is_looked_into(tmp_path, monkeypatch, random_inception):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / FILE_NAME
    place.parent.mkdir(parents=True)
    place.symlink_to(random_inception)
    with pytest.raises(ValueError, match="not the published"):  # found, and unlike torch-fidelity verified
        Inception()
    assert Inception(verify=False).dim == 2048


def test_a_weights_file_that_carries_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"conv": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="does not hold Inception weights") as caught:
        Inception(weights_path=tmp_path / "hostile.pth", verify=False)
    assert not marker.exists() and "\n" not in str(caught.value)
    torch.save({"conv": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold Inception weights"):
        Inception(weights_path=tmp_path / "other.pth", verify=False)


def test_the_script_writes_the_same_file_twice_and_says_what_it_did(tmp_path, monkeypatch, capsys):
    import sys
    from dataclasses import replace

    from diffusion_lab.metrics import train_classifier

    monkeypatch.setitem(train_classifier.RECIPES, "digits", replace(RECIPES["digits"], steps=3))
    for folder in ("a", "b"):
        monkeypatch.setattr(
            sys, "argv", ["train_classifier", "digits", "--seed", "5", "--out", str(tmp_path / folder)]
        )
        train_classifier.main()
    assert (tmp_path / "a/digits_cnn.safetensors").read_bytes() == (
        tmp_path / "b/digits_cnn.safetensors"
    ).read_bytes()
    assert capsys.readouterr().out.count("test accuracy") == 2
    written = DigitsCNN(weights_path=tmp_path / "a/digits_cnn.safetensors")
    assert written.metadata["seed"] == "5" and written.metadata["torch"] == torch.__version__
    assert written.sha256 != DigitsCNN().sha256


def test_upsampled_digits_have_the_features_of_the_digits():
    small, large = DigitsCNN(), UpsampledDigitsCNN()
    images = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    blocks = images.repeat_interleave(4, -1).repeat_interleave(4, -2)
    torch.testing.assert_close(large(blocks), small(images), rtol=1e-5, atol=1e-5)
    assert large.resize != small.resize and large.sha256 == small.sha256
    with pytest.raises(ValueError, match=r"square images \(N, 1, 8 k, 8 k\), not \(5, 1, 12, 12\)"):
        large(torch.zeros(5, 1, 12, 12, dtype=torch.uint8))
