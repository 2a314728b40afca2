"""report.html: whole, self-contained, and never in the way."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest
import tiny_runs

from diffusion_lab.app.report import figures, write_report
from diffusion_lab.app.report.build import by_class
from diffusion_lab.app.runs.run import RunFolder


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, its ids, and whether every tag is closed."""

    EMPTY = {"meta", "img", "br", "link", "input", "hr", "path", "use", "rect", "circle"}

    def __init__(self, text):
        super().__init__()
        self.outside, self.ids, self.open, self.headings, self._heading = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ("src", "href", "xlink:href") and not value.startswith(("data:", "#")):
                self.outside.append(value)
            if key == "id":
                self.ids.append(value)
        if tag not in self.EMPTY:
            self.open.append(tag)
        self._heading = tag == "h2"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag
        self._heading = False

    def handle_data(self, data):
        if self._heading:
            self.headings.append(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_runs.train(tmp_path_factory.mktemp("runs"), pictures=True).resolve()


def test_the_page_has_its_parts_and_needs_nothing_else(trained):
    text = (trained / "report.html").read_text()
    page = Page(text)
    assert page.headings == ["Samples", "Training", "Reproduce", "Details"]
    assert page.outside == [] and page.open == [] and len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert text.count("data:image/png;base64,") >= 3, "samples, real images, a trajectory"
    for part in (
        "Loss",
        "Loss by noise level",
        "Learning rate",
        "python train.py name=digits/quickstart",
    ):
        assert part in text
    assert trained.name in text and "max_images: 320" in text


def test_charts_take_the_pages_colours(trained):
    text = (trained / "report.html").read_text()
    assert "var(--series-1)" in text and "prefers-color-scheme: dark" in text
    assert not any(colour in text for colour in figures.VARIABLES)


def test_every_reference_inside_a_chart_is_met(trained):
    text = (trained / "report.html").read_text()
    ids = set(Page(text).ids)
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert wanted and wanted <= ids


def test_a_young_or_damaged_run_has_a_short_report(tmp_path, trained):
    folder = RunFolder(tmp_path / "young")
    folder.path.mkdir()
    shutil.copy(trained / "config.yaml", folder.config)
    assert Page(write_report(folder).read_text()).headings == ["Details"]
    folder.record.write_text("{ not json")
    folder.metrics_csv.write_text("images_seen,loss\n16,0.5\n32,")
    folder.metrics_json.write_text("[]")
    assert "Training" in Page(write_report(folder).read_text()).headings


def test_what_stands_in_a_config_cannot_break_out(tmp_path, trained):
    folder = RunFolder(tmp_path / "odd")
    folder.path.mkdir()
    config = (trained / "config.yaml").read_text().replace("digits/quickstart", "<script>alert(1)</script>")
    folder.config.write_text(config)
    folder.record.write_text(json.dumps({"status": '"><script>x</script>', "command": "<script>y</script>"}))
    assert "<script>" not in write_report(folder).read_text()


def test_classes_come_in_turn():
    labels = np.array([2, 0, 1, 1, 0, 2, 0])
    chosen = by_class(labels, 7, 3)
    assert list(labels[chosen]) == [0, 1, 2, 0, 1, 2] and len(set(chosen)) == 6
    assert by_class(None, 5, 0) == [0, 1, 2, 3, 4]


def test_a_tile_holds_the_images_unchanged():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    sheet = np.asarray(figures.tile(images, 3, smallest=1))
    assert sheet.shape == (9, 14, 4)
    assert (sheet[5:9, 5:9, 0] == images[4, :, :, 0]).all() and sheet[4, 0, 3] == 0


def test_the_headline_is_the_newest_score_by_the_protocol(tmp_path, trained):
    def evaluation(value, deviation=None):
        conditions = "digits-cnn-1437: n 1437" + (f" | DEVIATES: {deviation}" if deviation else "")
        item = {"label": "FD (digits-cnn)", "metric": "frechet", "value": value, "conditions": conditions}
        return {"records": [item]}

    def cards(*evaluations):
        folder.metrics_json.write_text(json.dumps({"evaluations": evaluations}))
        return re.findall(r'<div class="number">.*?</div>', write_report(folder).read_text())

    folder = RunFolder(tmp_path / "scored")
    folder.path.mkdir()
    shutil.copy(trained / "config.yaml", folder.config)
    (card,) = cards(evaluation(1.5), evaluation(2.5), evaluation(3.5, "n 20 instead of 1437"))
    assert "<b>2.5</b>" in card and "deviates" not in card
    (card,) = cards(evaluation(3.5, "n 20 instead of 1437"))
    assert "<b>3.5</b>" in card and "deviates: n 20 instead of 1437" in card
