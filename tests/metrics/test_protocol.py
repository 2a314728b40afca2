"""Records: a wrong evaluation shows in the printed line, and only the true thing is called FID."""

import json
from dataclasses import replace

import pytest

from diffusion_lab.images import QUANTISATION
from diffusion_lab.metrics.protocol import FID50K, Protocol, Record, Source, describe_seeds, standard_protocol

HASH = "ab" * 32
TRUE_INCEPTION = "6726825d" + "0" * 56
DIGITS = Protocol(name="digits-cnn-1437", features="digits-cnn", features_sha256=HASH, n=1437)
RIGHT = Record(
    metric="frechet",
    value=1.23456,
    real=0.71,
    real_n=1437,
    protocol=DIGITS,
    features="digits-cnn",
    features_sha256=HASH,
    resize="none",
    quantisation=QUANTISATION,
    n=1437,
    reference="test",
    reference_sha256="cd" * 32,
    reference_n=360,
    source=Source(
        seeds="0..1436", ema="ema", sampler="Heun()", grid="karras 16", guidance="scale 1.5", nfe=62
    ),
)
FID = replace(
    RIGHT,
    protocol=FID50K,
    features="inception-v3-tf",
    features_sha256=TRUE_INCEPTION,
    resize="TF1 bilinear 299",
    n=50_000,
    reference="train",
    reference_n=50_000,
)


def test_a_right_evaluation_prints_everything_and_no_complaint():
    line = str(RIGHT)
    assert line.startswith("FD@1437 (digits-cnn) = 1.235 (real 0.71) | ")
    for part in (
        "digits-cnn abababab", "resize none", QUANTISATION, "against test (n 360, cdcdcdcd)", "seeds 0..1436",
        "weights ema", "sampler Heun()", "grid karras 16", "guidance scale 1.5", "NFE 62",
    ):  # fmt: skip
        assert part in line
    assert RIGHT.deviations == () and "DEVIATES" not in line and "\n" not in line


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"source": replace(RIGHT.source, ema="raw")}, "raw weights instead of averaged"),
        ({"reference": "train"}, "reference train instead of test"),
        ({"n": 100}, "n 100 instead of 1437"),
        ({"resize": "bicubic 32"}, "resize bicubic 32 instead of none"),
        ({"quantisation": "floor"}, f"quantisation floor instead of {QUANTISATION}"),
        ({"features": "pixels"}, "features pixels instead of digits-cnn"),
        ({"features_sha256": "ef" * 32}, "feature weights efefefef instead of abababab"),
    ],
)
def test_a_wrong_evaluation_says_so_in_its_line(change, complaint):
    wrong = replace(RIGHT, **change)
    assert wrong.deviations == (complaint,)
    assert str(wrong).endswith(f"| DEVIATES: {complaint}")


def test_the_label_carries_the_number_of_images():
    assert replace(RIGHT, n=100).label == "FD@100 (digits-cnn)"
    assert (
        replace(
            RIGHT, metric="accuracy", short="accuracy", percent=True, value=0.9712, real=0.9944, real_n=360
        ).label
        == "accuracy@1437 (digits-cnn)"
    )
    assert replace(
        RIGHT, metric="accuracy", short="accuracy", percent=True, value=0.9712, real=0.9944, real_n=360
    ).shown() == ("97.12 % (real@360 99.44 %)")
    assert replace(RIGHT, real=None, real_n=None).shown() == "1.235"
    assert replace(RIGHT, real_n=1000).shown() == "1.235 (real@1000 0.71)"


def test_only_the_published_network_under_its_whole_protocol_is_called_fid():
    assert FID.label == "FID" and not FID.deviations
    # more images give a smaller number
    assert replace(FID, n=60_000).label == "FID@60000"
    # a handful of real images is no reference, nor is what nobody pinned
    assert replace(FID, reference_n=12).label == "FID@50000"
    own = replace(FID50K, reference="mine")
    assert replace(FID, protocol=own, reference="mine").label == "FID@50000"
    pinned = replace(FID50K, reference_sha256=FID.reference_sha256[:12])
    assert replace(FID, protocol=pinned, reference="VIRTUAL.npz", reference_n=0).label == "FID"
    assert "reference with hash" in replace(FID, protocol=pinned, reference_sha256="ff" * 32).deviations[0]
    # a measure that looks at some of the samples is held to the number of all
    assert replace(FID, n=10_000, of_n=50_000).deviations == ()
    assert replace(FID, n=2000).label == "FID@2000"
    assert replace(FID, reference="test").label == "FID@50000"
    assert replace(FID, resize="bicubic 299").label == "FID@50000"
    assert replace(FID, source=Source(ema="raw")).label == "FID@50000"
    # a protocol that asks for little does not make a FID
    assert replace(FID, n=2000, protocol=replace(FID50K, n=2000)).label == "FID@2000"
    # other weights under the same name never are one
    assert replace(FID, features_sha256=HASH).label == "FD@50000 (inception-v3-tf)"
    # nor are other features with the right hash
    assert replace(FID, features="mine").label == "FD@50000 (mine)"


def test_records_survive_json_and_do_not_believe_their_label():
    data = json.loads(RIGHT.to_json())
    assert data["label"] == RIGHT.label and data["deviations"] == []
    data["label"] = "FID"
    assert Record.from_dict(data) == RIGHT and Record.from_dict(data).label == "FD@1437 (digits-cnn)"
    with pytest.raises(ValueError, match="not an evaluation record"):
        Record.from_dict({**data, "extra": 1})
    del data["protocol"]
    with pytest.raises(ValueError, match="not an evaluation record"):
        Record.from_dict(data)


def test_values_of_different_n_are_not_comparable():
    assert RIGHT.differences(replace(RIGHT, value=3.0, source=Source())) == ()
    assert RIGHT.differences(replace(RIGHT, n=100)) == ("n 1437 against 100",)
    assert RIGHT.differences(replace(RIGHT, reference_sha256="x", reference_n=1)) == (
        f"reference_sha256 {'cd' * 32} against x",
        "reference_n 360 against 1",
    )


def test_standard_protocols():
    given = {"features_sha256": HASH, "resize": "none", "quantisation": QUANTISATION}
    digits = standard_protocol(features="digits-cnn", train_n=1437, **given)
    assert digits == DIGITS
    assert standard_protocol(features="mnist-cnn", train_n=60_000, **given).n == 10_000
    assert standard_protocol(features="mnist-cnn", train_n=None, **given).n == 10_000
    assert standard_protocol(features="inception-v3-tf", train_n=1437, **given) is FID50K
    with pytest.raises(ValueError, match="n >= 2"):
        Protocol(name="x", features="pixels", n=1)


def test_seeds_as_text():
    assert describe_seeds(range(1437)) == "0..1436"
    assert describe_seeds([7, 8]) == "7..8"
    assert describe_seeds([5, 1, 9]) == "3 from 1 to 9"
    assert describe_seeds([]) == "none"


def test_what_a_protocol_asks_for_and_nobody_knows_is_a_deviation():
    asked = replace(DIGITS, ema="ema", seeds="0..9", sampler="Heun(", guidance="Unguided", nfe=35)
    unknown = replace(RIGHT, protocol=asked, source=Source())
    assert unknown.deviations == (
        "weights unknown instead of ema",
        "seeds unknown instead of 0..9",
        "sampler unknown instead of Heun(",
        "guidance unknown instead of Unguided",
        "NFE unknown instead of 35",
    )
    known = Source(ema="ema", seeds="0..9", sampler="Heun()", guidance="Unguided()", nfe=35)
    assert replace(unknown, source=known).deviations == ()
