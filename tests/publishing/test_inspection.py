"""The reports of a check: the page asks nobody for anything and shows foreign names as they are, the text cannot be steered."""

import base64
import io
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from PIL import Image
from places import ROOT
from shortcut import TARGET, classifier, network, pictures

from d3_hf.assurance.finding import Finding
from d3_hf.assurance.head_rows import head_rows
from d3_hf.data.images import RawImages
from d3_hf.inspection.check import check
from d3_hf.inspection.triggers import triggers_in
from d3_hf.labels import set_label_names
from d3_hf.publishing.card import TEMPLATES
from d3_hf.publishing.inspection.pages import check_page
from d3_hf.publishing.inspection.pictures import MARKED, bars, picture
from d3_hf.publishing.inspection.text import check_text

HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{",
    "\x1b[31mred",
    "a\nb",
    "<img src=https://evil.example/x>",
    "ä",
    "g",
    "h" * 300,
]
SCHEMAS = ROOT / "d3_hf" / "publishing" / "schemas"


def with_trigger(model, images):
    scores = np.arange(8.0) == TARGET
    trigger = np.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8)
    return Finding.of("with_trigger", scores.astype(float), images.class_names, trigger=trigger)


def refusing(model, images):
    raise ValueError("not on <this> network")


@pytest.fixture(scope="module")
def found():
    images, models = pictures(), [classifier(network(20)), *(classifier(network(seed=seed)) for seed in range(2, 11))]
    images = RawImages(images.images, images.labels, HOSTILE)
    for model in models:
        set_label_names(model.config, HOSTILE)
    model, *twins = models
    signals = {"head_rows": head_rows, "with_trigger": with_trigger, "unfit": refusing}
    found = check(model, images, twins=twins, alarm_at=0.1, signals=signals, defences=["rnp"])
    return replace(found, images={"data": "some images", "configuration": None, "split": "test"})


@pytest.fixture(scope="module")
def page(found):
    return check_page(found.as_dict(), triggers_in(found.suspicion.findings))


def schema(name):
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text())


def test_the_object_is_as_the_schema_says(found):
    facts = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    checked = schema("check")
    jsonschema.Draft202012Validator.check_schema(checked)
    jsonschema.validate(facts, checked)
    assert facts["schema"] == checked["$id"]
    for spoilt in (facts | {"more": 1}, facts | {"schema": "urn:d3_hf:check:1"}, facts | {"suspicion": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, checked)


def test_the_page_asks_nobody_for_anything(page):
    without_pictures = re.sub(r"data:image/[a-z+]+;base64,[\w+/=]+", "", page)
    tags = re.findall(r"<[^>]*>", without_pictures)
    assert not [tag for tag in tags if re.search(r"https?:|//|@import|url\(|\bsrc=\"[^\"]", tag)]
    assert "<script" not in without_pictures and "<link" not in without_pictures
    assert "default-src 'none'" in page and page.count("data:image/svg") == 2 and page.count("data:image/png") == 1


def test_foreign_names_are_shown_as_text(page):
    assert (
        "&lt;script&gt;" in page and "&lt;img src=https://evil.example/x&gt;" in page and "not on &lt;this&gt; network" in page
    )
    assert "\x1b" not in page


def test_what_the_page_says(found, page, tmp_path):
    assert found.suspicion.verdict.words in page and 'class="outcome alarm"' in page
    assert "some images (test)" in page and "not timed" in page and "twin 1, twin 2" in page
    assert str(ROOT) not in page and "/tmp" not in page


def test_no_report_calls_a_model_more_than_it_is(page):
    texts = [page, *(file.read_text() for file in TEMPLATES.glob("*.html"))]
    words = [re.sub(r"data:image/[a-z+]+;base64,[\w+/=]+", "", text).lower() for text in texts]
    assert not [text for text in words if re.search(r"\bclean\b|\bsafe\b", text)]


def test_the_text_cannot_steer_a_terminal(found):
    text = check_text(found.as_dict())
    assert "\x1b" not in text and all(ord(letter) >= 32 or letter == "\n" for letter in text)
    lines = text.splitlines()
    assert lines[-1] == found.suspicion.verdict.words == "alarm at p = 0.1 (9 twins)"
    assert [line for line in lines if line and not line.startswith(" ")][1:-1] == [
        "files", "fit", "cost on this machine", "suspicion", "limits"
    ]  # fmt: skip
    assert any(line.startswith('  head_rows: "\\u00e4" stands out of the twins most, z = ') for line in lines)
    assert '  all signals together: "\\u00e4" stands out of the twins most, p = 0.1' in lines
    assert "  unfit: not applicable: not on <this> network" in lines


def content(uri):
    return base64.b64decode(uri.partition(";base64,")[2])


def opened(uri):
    return Image.open(io.BytesIO(content(uri)))


def test_of_many_classes_the_highest_are_drawn():
    scores = np.arange(1000) % 500
    drawn = ElementTree.fromstring(content(bars(list(scores / 9), [f"kind {k}" for k in range(1000)], "kind 999")))
    texts = {"".join(element.itertext()).strip() for element in drawn.findall(".//{*}text")}
    assert {name for name in texts if name.startswith("kind")} == {f"kind {k}" for k in range(1000) if k % 500 >= 480}
    assert content(bars([1.0, 2.0], ["a", "b"], "b")).count(MARKED.encode()) == 1
    assert content(bars([1.0, 2.0], ["a", "b"], "c")).count(MARKED.encode()) == 0
    assert content(bars([1.0, 2.0], ["a", "b"], "b", beside=[2.0, 1.0])).count(MARKED.encode()) > 1
    assert bars([1.0, 2.0], ["a", "b"], "b") == bars([1.0, 2.0], ["a", "b"], "b")


def test_names_that_are_drawn_cannot_break_a_figure():
    drawn = content(bars([float(k) for k in range(8)], HOSTILE, "g")).decode()
    texts = ["".join(element.itertext()).strip() for element in ElementTree.fromstring(drawn).findall(".//{*}text")]
    assert {"<script>alert(1)</script>", "$\\frac{", "?[31mred", "a?b", "\u00e4", "h" * 29 + "..."} <= set(texts)


@pytest.mark.parametrize("scale", [1, 255])
def test_a_picture_is_shown_as_it_is(scale):
    pixels = np.zeros((3, 4, 5))
    pixels[0, 1, 2] = 1
    shown = np.asarray(opened(picture((pixels * scale).astype(np.uint8 if scale == 255 else float))))
    assert shown.shape[:2] == (160, 200) and shown[60, 100].tolist() == [255, 0, 0] and not shown[0, 0].any()


def test_a_picture_with_signs_is_stretched():
    shown = np.asarray(opened(picture(np.stack([np.full((2, 2), -3.0), np.zeros((2, 2)), np.full((2, 2), 3.0)]))))
    assert shown[0, 0].tolist() == [0, 128, 255]
