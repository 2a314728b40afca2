"""The card beside exported weights: what the run's files say, no folder of this machine, the user's own words kept."""

import json
import shutil

import pytest
from tiny_runs import main, record_of, train

from diffusion_lab.app.export.model_card import BEGIN, END, shareable, write_card
from diffusion_lab.app.runs.run import RunFolder
from diffusion_lab.app.runs.weights import metadata


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), max_images=64)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "mine")


def card(run):
    return (run / "export" / "README.md").read_text()


def test_it_says_what_the_record_says_and_no_folder_of_this_machine(run):
    text, told = card(run), record_of(run)
    facts = metadata(run / "export" / "ema.safetensors")
    assert facts["images_seen"] == "64" and facts["average"] == "ema" and facts["config"] == told["identity"]
    assert facts["commit"].startswith((told["sessions"][0]["git"] or {"commit": "unknown"})["commit"])
    for words in (
        "# digits/quickstart\n",
        "data: digits, examples of shape 1 x 8 x 8, 10 classes",
        "network: `UNet(",
        "images seen: 64, in batches of 16",
        f"| `ema.safetensors` | ema | 64 | `{facts['sha256'][:16]}` |",
        "max_images=64",
        f"torch {told['sessions'][0]['versions']['torch']}",
        f"settings: {told['identity']}",
        "Not measured yet",
        "python sample.py run=<this folder>",
    ):
        assert words in text, words
    assert str(run) not in text and "paths.runs" not in text and "/tmp" not in text
    assert text.startswith("---\n# license: ")


def test_the_python_in_it_runs(run):
    code = card(run).split("```python\n")[1].split("```")[0].replace("<this folder>", str(run / "export"))
    names = {}
    exec(code, names)
    assert names["x0"].shape == (1, 1, 8, 8)


def test_scoring_adds_the_figures_and_leaves_the_users_words(run):
    path = run / "export" / "README.md"
    path.write_text(
        card(run).replace("# license: which one is yours to say, e.g. ", "license: ") + "\nMy own words.\n"
    )
    assert main("evaluate", f"run={run}", "num_samples=24", "batch_size=24", "grid.steps=1") == 0
    text = card(run)
    record = json.loads((run / "metrics.json").read_text())["evaluations"][0]["records"][0]
    assert f"| {record['label']} | {record['shown']} | 64 | n 24 instead of" in text
    assert record["conditions"] in text and "Not measured yet" not in text
    assert text.startswith("---\nlicense: apache-2.0\n") and text.endswith("\nMy own words.\n")
    assert text.count(BEGIN) == text.count(END) == 1


def test_a_readme_of_the_users_own_is_not_touched(run):
    path = run / "export" / "README.md"
    path.write_text("All mine.\n")
    assert write_card(RunFolder(run)) is None and path.read_text() == "All mine.\n"
    shutil.rmtree(run / "export")
    assert write_card(RunFolder(run)) is None and not path.exists()


def test_of_a_path_only_the_last_part_is_given_away():
    line = "python train.py dataset.root=/home/me/cats a=[/x/y,~/z/w/] paths.runs=/runs 'name=a b' run_id=7 b=c/d"
    assert shareable(line) == "python train.py dataset.root=.../cats 'a=[.../y,.../w]' 'name=a b' b=c/d"


@pytest.mark.parametrize(
    "word, kept",
    [
        ("dataset={root:/home/bob/secret/data}", "'dataset={root:.../data}'"),
        ("dataset.root='/home/bob/my data'", """'dataset.root='"'"'.../my data'"'"''"""),
        ("dataset.root=~bob/data", "dataset.root=.../data"),
        ("dataset.root=file:///home/bob/x", "dataset.root=.../x"),
        ("dataset.train=https://host/a/b.tar", "dataset.train=https://host/a/b.tar"),
        ("experiment=digits/quickstart", "experiment=digits/quickstart"),
    ],
)
def test_a_folder_of_this_machine_never_stands_in_a_card(word, kept):
    import shlex

    assert shareable(shlex.join(["python", "train.py", word])) == f"python train.py {kept}"
