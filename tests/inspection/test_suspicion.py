"""A model beside its twins: which p follows, which twins are refused, and what is kept of them in a file."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from shortcut import TARGET, classifier, network, pictures

from d3_hf.assurance.calibration import class_z, combined_p, own_classes_p
from d3_hf.assurance.finding import Finding
from d3_hf.assurance.head_rows import head_rows
from d3_hf.assurance.latent_shift import latent_shift
from d3_hf.assurance.signals import MOST_CLASSES, SIGNALS, read_signal
from d3_hf.inspection.null import SCHEMA, Kind, Null, Twin, read_null
from d3_hf.inspection.suspicion import suspicion_of
from d3_hf.inspection.triggers import triggers_in
from d3_hf.publishing.inspection.words import signal_line, together_lines

QUICK = {"head_rows": head_rows, "latent_shift": latent_shift}
IMAGES = pictures()


def twin(seed):
    return classifier(network(seed=seed))


@pytest.fixture(scope="module")
def found():
    """A network with a shortcut beside nine without one."""
    return suspicion_of(classifier(network(20)), IMAGES, map(twin, range(2, 11)), alarm_at=0.1, signals=QUICK)


def renamed():
    model = twin(2)
    model.config.id2label = dict(enumerate(["cat", "dog", "cow", "hen", "pig", "fox", "bat", "ant"]))
    return model


def test_signals_carry_their_own_names():
    assert all(function.__name__ == name for name, function in SIGNALS.items()) and MOST_CLASSES.keys() <= SIGNALS.keys()


def test_a_planted_shortcut_stands_out_of_the_twins(found):
    facts = found.as_dict()
    assert facts["alarm"] and facts["outcome"] == "alarm at p = 0.1 (9 twins)"
    assert (facts["p"], facts["least_p"]) == (0.1, 0.1)
    for name in QUICK:
        assert facts["signals"][name]["suspect_class"] == f"class {TARGET}" and facts["signals"][name]["p"] == 0.1
        assert facts["signals"][name]["class_beside_twins"] == f"class {TARGET}"
        assert len(facts["signals"][name]["scores"]) == len(facts["signals"][name]["z"]) == len(IMAGES.class_names)
    assert facts["class_beside_twins"] == f"class {TARGET}"
    assert facts["twins"] == [f"twin {number}" for number in range(1, 10)] and not facts["warnings"]


def test_p_is_that_of_the_scores(found):
    read = [[signal(classifier(network(20)), IMAGES).scores for signal in QUICK.values()]]
    read += [[signal(twin(seed), IMAGES).scores for signal in QUICK.values()] for seed in range(2, 11)]
    assert [list(one.scores.values()) for one in found.null.twins] == [[tuple(row) for row in one] for one in read[1:]]
    assert found.p == combined_p(read[0], read[1:])
    z = class_z(read[0], read[1:])[0]
    for s, name in enumerate(QUICK):
        assert found.p_values[name] == combined_p(read[0][s][None], np.array(read[1:])[:, s, None])
        assert found.as_dict()["signals"][name]["z"] == z[s].tolist()


def test_the_models_own_other_classes_are_a_null_too(found):
    facts = found.as_dict()["signals"]
    for name in QUICK:
        assert facts[name]["p_own_classes"] == own_classes_p(found.findings[name].scores) < 0.01
        line = signal_line(name, facts[name])
        assert f"against its own other classes p = {facts[name]['p_own_classes']:.2g}, as if" in line
        assert line.startswith(
            f'{name}: "class {TARGET}" stands out of the twins most, z = {max(facts[name]["z"]):.3g}, p = 0.1'
        )
    few = suspicion_of(classifier(network(20)), IMAGES, signals=QUICK).as_dict()["signals"]["head_rows"]
    assert (
        few["p"] is few["z"] is few["class_beside_twins"] is None
        and few["p_own_classes"] == facts["head_rows"]["p_own_classes"]
    )  # which needs no twins


def test_without_twins_there_is_no_p():
    facts = suspicion_of(classifier(network(20)), IMAGES, signals=QUICK).as_dict()
    assert facts["p"] is facts["least_p"] is None and not facts["alarm"]
    assert "nothing can be concluded" in facts["outcome"] and facts["signals"]["head_rows"]["p"] is None


@pytest.mark.parametrize(("count", "known"), [(2, False), (3, True)])
def test_how_far_a_class_stands_out_is_said_beside_three_twins(found, count, known):
    few = suspicion_of(classifier(network(20)), IMAGES, null=Null(found.null.kind, found.null.twins[:count]), signals=QUICK)
    facts = few.as_dict()
    assert facts["p"] >= facts["least_p"] == 1 / (1 + count) and few.class_beside_twins in IMAGES.class_names
    said = [facts["class_beside_twins"]] + [facts["signals"][name]["class_beside_twins"] for name in QUICK]
    assert said == [f"class {TARGET}" if known else None] * 3
    assert all((facts["signals"][name]["z"] is not None) is known for name in QUICK)
    assert bool(together_lines(facts)) is known and ("stands out of the twins" in str(check_lines(facts))) is known


def check_lines(facts):
    return [signal_line(name, signal) for name, signal in facts["signals"].items()]


def test_too_few_twins_cannot_alarm(found):
    few = suspicion_of(classifier(network(20)), IMAGES, null=found.null, signals=QUICK)
    assert not few.verdict.alarm and few.p == 0.1
    assert few.verdict.words == "no alarm possible at this power: 9 twins give p >= 0.1; 19 are needed for 0.05"


def test_a_null_that_was_saved_gives_the_same(found, tmp_path):
    file = tmp_path / "made" / "null.json"
    found.null.write(file)
    again = suspicion_of(classifier(network(20)), IMAGES, null=read_null(file), alarm_at=0.1, signals=QUICK)
    assert again.as_dict() == found.as_dict() and read_null(file) == found.null
    more = suspicion_of(classifier(network(20)), IMAGES, [twin(11)], read_null(file), 0.1, QUICK)
    assert len(more.null.twins) == 10 and more.as_dict()["least_p"] == 1 / 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vit"}, "another kind of models: architecture vit, not .*Net"),
        ({"parameters": 7}, "parameters 7, not"),
        ({"images": 12}, "images 12, not 160"),
        ({"classes": ["cat", "dog"]}, r"classes cat, dog \(2\), not class 0, class 1"),
    ],
)
def test_a_null_of_another_kind_is_refused(found, tmp_path, change, message):
    content = json.loads(json.dumps({"schema": SCHEMA, "kind": asdict(found.null.kind) | change, "twins": []}))
    (tmp_path / "null.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        suspicion_of(classifier(network(20)), IMAGES, null=read_null(tmp_path / "null.json"), signals=QUICK)
    assert "\n" not in str(caught.value)


def test_a_null_of_other_images_is_warned_of(found):
    facts = suspicion_of(classifier(network(20)), pictures(seed=1), null=found.null, signals=QUICK).as_dict()
    assert facts["warnings"] == ["the null's scores are from other images: give the same ones, or p may not hold"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"null.json is no null of twins \(it is no mapping\)"),
        ('{"schema": 1, "kind": {}, "twins": []}', "no kind.architecture"),
        ('{"schema": "urn:d3_hf:null:9", "kind": KIND, "twins": []}', "no null of twins of this version"),
        ('{"schema": "urn:d3_hf:null:3", "kind": KIND, "twins": [{"name": 1}]}', "--save_null FILE.json"),
        ('{"schema": "urn:d3_hf:null:3", "kind": KIND, "twins": [TWIN, TWIN]}', "a and a are the same model"),
        ('{"schema": "urn:d3_hf:null:3", "kind": KIND, "twins": [NAN]}', "a score is not finite"),
        ('{"schema": "urn:d3_hf:null:3", "kind": KIND, "twins": [LONG]}', "a has 2 scores of head_rows for 1 classes"),
    ],
)
def test_a_damaged_null_is_one_line(tmp_path, content, message):
    kind = json.dumps(asdict(Kind("a", 1, ("x",), 2, "0")))
    one = Twin("a", "0", {"head_rows": (1.0,)})
    text = content.replace("KIND", kind).replace("TWIN", json.dumps(asdict(one)))
    text = text.replace("LONG", json.dumps(asdict(Twin("a", "0", {"head_rows": (1.0, 2.0)}))))
    (tmp_path / "null.json").write_text(text.replace("NAN", json.dumps(asdict(one)).replace("1.0", "NaN")))
    with pytest.raises(ValueError, match=message) as caught:
        read_null(tmp_path / "null.json")
    assert "\n" not in str(caught.value)


def test_a_null_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no null .*--save_null"):
        read_null(tmp_path / "null.json")


@pytest.mark.parametrize(
    ("twins", "message"),
    [
        (lambda: [classifier(network(20))], "twin 1 is the model itself: each model counts once"),
        (lambda: [twin(2), twin(2)], "twin 2 is twin 1 itself"),
        (lambda: [classifier(network(classes=5))], "twin 1 is of another kind than the model: parameters"),
        (lambda: [renamed()], "twin 1 is of another kind than the model: class 0 is 'class 0' in the dataset and 'cat' in the"),
    ],
)
def test_twins_that_are_none(twins, message):
    with pytest.raises(ValueError, match=message):
        suspicion_of(classifier(network(20)), IMAGES, twins(), signals={"head_rows": head_rows})


def test_a_signal_that_a_twin_lacks_is_left_out_of_p():
    calls = iter([None, None, "cannot", None])

    def moody(model, images):
        if why := next(calls):
            raise FloatingPointError(f"{why}\nnow")
        return Finding.of("moody", np.arange(8.0), images.class_names)

    found = suspicion_of(
        classifier(network(20)), IMAGES, map(twin, (2, 3, 4)), signals={"moody": moody, "head_rows": head_rows}
    )
    assert found.compared == ["head_rows"] and found.as_dict()["signals"]["moody"]["p"] is None
    assert found.warnings == ["moody is left out of p, since it cannot be read on twin 2: cannot"]


def test_where_no_signal_can_be_read_there_is_no_p(found):
    ten = IMAGES.select(range(10))
    facts = suspicion_of(classifier(network()), ten, [twin(2)], signals=QUICK).as_dict()
    assert facts["p"] is None and facts["outcome"].startswith("no alarm possible: no signal could be read")
    assert facts["signals"]["head_rows"] == {"not_applicable": "the signals need at least 20 images, better 500; got 10"}


def test_a_signal_that_would_take_hours_is_not_read():
    many = classifier(network(classes=300))
    images = pictures(600, classes=300)
    assert read_signal("latent_shift", latent_shift, many, images).startswith("with 300 classes it takes hours")
    assert isinstance(read_signal("head_rows", head_rows, many, images), Finding)


def test_pictures_among_details():
    names, trigger = list("abc"), np.zeros((3, 4, 4))
    per_class = np.stack([np.full((3, 4, 4), k) for k in range(3)])
    first = Finding.of("s", np.array([0.0, 5.0, 1.0]), names, trigger=trigger, path=np.zeros((2, 3)), each=per_class)
    found = triggers_in({"s": first, "t": "not applicable"})
    assert found.keys() == {"s"} and found["s"].keys() == {"trigger", "each"} and (found["s"]["each"] == 1).all()


def test_nothing_of_the_model_changes():
    model = classifier(network(20))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    suspicion_of(model, IMAGES, [twin(2)], signals=QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_twin_twice_is_no_null():
    one = Twin("a", "0", {})
    with pytest.raises(ValueError, match="are the same model"):
        Null(Kind("a", 1, ("x",), 2, "0"), (one, one))
