"""`audit` in Python: a network with a shortcut beside the same without it."""

import json
from collections import Counter
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from places import ROOT
from shortcut import TARGET, classifier, network, pictures
from tiny import tiny_samples, tiny_vit

import d3_hf
from d3_hf import FineTuningConfig, FineTuningTrainer
from d3_hf.assurance.finding import Finding
from d3_hf.assurance.head_rows import head_rows
from d3_hf.data.images import RawImages
from d3_hf.inspection.audit import Audit, audit, handed_over, source_warnings
from d3_hf.models import load_classifier
from d3_hf.models.source import preprocessing_of
from d3_hf.publishing.inspection.pages import audit_page
from d3_hf.publishing.inspection.text import audit_text

SCHEMA = ROOT / "d3_hf" / "publishing" / "schemas" / "audit.schema.json"


def never(model, images):
    raise ValueError("not here")


SIGNALS = {"head_rows": head_rows, "never": never}


def purified():
    """Without the shortcut, and with two classes that changed places."""
    net, order = network(), [0, 2, 1, 3, 4, 5, 6, 7]
    with torch.no_grad():
        net.head.weight.copy_(net.head.weight[order])
        net.head.bias.copy_(net.head.bias[order])
    return classifier(net)


@pytest.fixture(scope="module")
def found():
    images = pictures()
    return audit(purified(), classifier(network(20)), images.select((images.labels != 7).nonzero()[:, 0]), signals={})


@pytest.fixture(scope="module")
def with_signals():
    return audit(classifier(network()), classifier(network(20)), pictures(), signals=SIGNALS)


def test_it_is_public_and_as_the_schema_says(with_signals):
    assert d3_hf.audit is audit and isinstance(with_signals, Audit)
    facts = json.loads(json.dumps(with_signals.as_dict(), allow_nan=False))
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(facts, schema)
    assert facts["schema"] == schema["$id"] and str(with_signals) == audit_text(facts)


def test_the_class_of_the_shortcut_stands_out_no_longer(with_signals):
    facts = with_signals.as_dict()
    signal = facts["signals"]["head_rows"]
    assert signal["before"]["suspect_class"] == f"class {TARGET}" != signal["after"]["suspect_class"]
    assert signal["stands_out_still"] is False and signal["before"]["statistic"] > 5 * signal["suspect_after"]
    assert signal["suspect_after"] == signal["after"]["outliers"][TARGET] < signal["after"]["statistic"]
    assert facts["signals"]["never"] == {
        "before": {"not_applicable": "not here"}, "after": {"not_applicable": "not here"},
        "stands_out_still": None, "suspect_after": None,
    }  # fmt: skip
    assert facts["outcome"] == "the class that stood out most no longer does by 1 of 1 signals"


def finding(signal, suspect):
    return Finding.of(signal, np.eye(5)[suspect], list("abcde"))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ((1, 2), "the class that stood out most no longer does by 0 of 2 signals, and still does by s, t"),
        ((0, 2), "the class that stood out most no longer does by 1 of 2 signals, and still does by t"),
        ((0, 3), "the class that stood out most no longer does by 2 of 2 signals"),
    ],
)
def test_the_outcome_names_the_signals(with_signals, after, words):
    before = {"s": finding("s", 1), "t": finding("t", 2), "u": "why"}
    then = {"s": finding("s", after[0]), "t": finding("t", after[1]), "u": finding("u", 1)}
    assert replace(with_signals, before=before, after=then).outcome == words
    assert replace(with_signals, before={"u": "why"}, after=then).outcome == "no signal could be read on both models"


def test_rates_against_loops(found):
    images = pictures()
    images = images.select((images.labels != 7).nonzero()[:, 0])
    said = []
    for model in (classifier(network(20)), purified()):
        with torch.no_grad():
            said.append(model(pixel_values=preprocessing_of(model)(images.images)).logits.softmax(1).max(1))
    (sure, one), (surer, other) = [(values.tolist(), rows.tolist()) for values, rows in said]
    labels, facts = images.labels.tolist(), found.as_dict()
    n = len(labels)
    right = [(a == y, b == y) for a, b, y in zip(one, other, labels, strict=True)]
    accuracy = facts["accuracy"]
    assert accuracy["accuracy_before"] == sum(a for a, _ in right) / n and accuracy["accuracy_drop"] > 0
    assert accuracy["lost"] == right.count((True, False)) > 0 and accuracy["both_right"] == right.count((True, True))
    flips = [k for k in range(n) if sure[k] > 0.9 and surer[k] > 0.9 and one[k] != other[k]]
    assert facts["flips"]["flips"] == len(flips) / n > 0 and facts["flips"]["flips_n"] == n
    pairs = {(f"class {a}", f"class {b}"): count for (a, b), count in Counter((one[k], other[k]) for k in flips).items()}
    assert {(pair["before"], pair["after"]): pair["images"] for pair in facts["flips"]["pairs"]} == pairs
    assert facts["flips"]["right_before"] == sum(one[k] == labels[k] for k in flips)
    for k, row in enumerate(facts["recall"][:7]):
        of_it = [pair for pair, y in zip(right, labels, strict=True) if y == k]
        assert row["class"] == f"class {k}" and row["images"] == len(of_it)
        assert row["before"] == pytest.approx(sum(a for a, _ in of_it) / len(of_it))
        assert row["after"] == pytest.approx(sum(b for _, b in of_it) / len(of_it))
    assert facts["recall"][7] == {"class": "class 7", "images": 0, "before": None, "after": None}


def test_the_page_and_the_text(with_signals, found):
    facts = with_signals.as_dict()
    picture = {"head_rows": {"trigger": np.zeros((3, 4, 4))}}
    page = audit_page(facts, picture, picture)
    assert page.count("data:image/") == 3 and "http:" not in page and "https:" not in page
    assert facts["outcome"] in page and "trigger, before" in page and "trigger, after" in page
    assert "&#34;class 5&#34; stood out most" in page and "not applicable to the suspicious model: not here" in page
    assert "clean" not in page.lower() and "no images" in audit_text(found.as_dict())
    lines = audit_text(facts).splitlines()
    assert lines[-1] == facts["outcome"] and any(line.startswith('  head_rows: "class 5" stood out most') for line in lines)


def test_what_cannot_be_compared_is_one_line():
    images = pictures()
    with pytest.raises(ValueError, match="purified and suspicious model are the same: name what it was purified from"):
        audit(classifier(network()), classifier(network()), images, signals={})
    with pytest.raises(ValueError, match="class 0 is 'class 7' in the dataset"):
        audit(purified(), classifier(network()), RawImages(images.images, images.labels, images.class_names[::-1]), signals={})


def test_a_manifest_of_another_source_is_warned_of(tmp_path):
    args = FineTuningConfig(str(tmp_path / "out"), max_steps=1, learning_rate=0.01, disable_tqdm=True, use_cpu=True)
    suspicious = tiny_vit()
    sha256 = handed_over(suspicious)
    trainer = FineTuningTrainer(suspicious, args, tiny_samples(8))
    trainer.train()
    trainer.save_model()
    loaded = load_classifier(tmp_path / "out")
    assert source_warnings(loaded, sha256) == [] == source_warnings(tiny_vit(), sha256)
    (line,) = source_warnings(loaded, handed_over(tiny_vit(seed=1)))
    assert line.startswith("purification.json says that the model was purified from other weights, of ") and "\n" not in line
