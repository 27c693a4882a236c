"""`check` in Python: what it says of a real small model, its files and images, and of models and images at the edges."""

import json
import pickle
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from fake_hub import logged_in
from safetensors.torch import load_file
from shortcut import TARGET, Net, classifier, network, pictures
from tiny import CLASSES, SIZE, tiny_resnet, tiny_vit

import d3_hf
from d3_hf.assurance.head_rows import head_rows
from d3_hf.data.images import RawImages
from d3_hf.evaluation.confidence import Answers, answers, confident_flips
from d3_hf.files import sha256
from d3_hf.inspection.check import Check, check
from d3_hf.inspection.cost import cost_of
from d3_hf.inspection.files import file_facts
from d3_hf.models import load_classifier
from d3_hf.models.source import preprocessing_of, source_of

QUICK = {"head_rows": head_rows}
BARE = {"signals": QUICK, "defences": ()}


def coloured(count=24, classes=CLASSES, seed=0):
    """Images whose colour tells the class, for the tiny networks."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    pixels = torch.randint(0, 80, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), labels % 3] += 120
    return RawImages(pixels, labels, [f"LABEL_{k}" for k in range(classes)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ViT as it is saved, with a pickled copy of its weights."""
    folder = tmp_path_factory.mktemp("check") / "vit"
    model = tiny_vit()
    model.save_pretrained(folder)
    model.image_processor.save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return check(load_classifier(folder), coloured(), coloured(12), signals=QUICK)


def test_it_is_public_and_what_it_returns_is_whole(found):
    assert d3_hf.check is check and isinstance(found, Check)
    facts = found.as_dict()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["model"]["architecture"] == "vit" and facts["model"]["source"]["name"] == "vit"
    assert facts["fit"]["images"] == facts["fit"]["accuracy_n"] == 24 and facts["fit"]["per_class"]["counts"] == [8, 8, 8]
    assert facts["suspicion"]["signals"].keys() == {"head_rows"} and not facts["suspicion"]["alarm"]


def test_files_of_a_folder(found, folder):
    assert found.files["copies"] == [["model.safetensors"], ["pytorch_model.bin"]] and found.files["others"] == []
    names = {"config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin"}
    assert found.files["sha256"] == {name: sha256(folder / name) for name in names}
    (scan,) = found.files["pickles"].values()
    assert scan["issues"] == scan["suspicious"] == 0 and "torch.FloatStorage" in scan["globals"]


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


def test_what_lies_beside_the_weights_is_scanned_and_not_run(folder, tmp_path, capsys):
    place = shutil.copytree(folder, tmp_path / "vit")
    (place / "training_args.bin").write_bytes(pickle.dumps(Evil()))
    (place / "model.onnx").write_bytes(b"")
    facts = file_facts(source_of(load_classifier(place)))
    assert facts["others"] == ["model.onnx"] and "it ran" not in capsys.readouterr().out
    assert facts["pickles"]["training_args.bin"]["globals"] == ["builtins.print"]


def test_copies_that_disagree_are_refused_by_the_loader(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "vit")
    weights = load_file(place / "model.safetensors")
    torch.save({name: weight + 1 for name, weight in weights.items()}, place / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds two copies of its weights that differ"):
        load_classifier(place)


def test_files_of_one_file_and_of_none(tmp_path):
    torch.save(network().state_dict(), tmp_path / "net.pth")
    options = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=8)
    facts = file_facts(source_of(load_classifier(tmp_path / "net.pth", module=Net(), **options)))
    assert facts["copies"] == [["net.pth"]] and facts["sha256"] == {"net.pth": sha256(tmp_path / "net.pth")}
    assert facts["pickles"]["net.pth"]["issues"] == 0
    for source in (source_of(classifier(network())), None):
        assert file_facts(source) == {"copies": [], "others": [], "sha256": {}, "pickles": {}}


def test_files_of_the_hub(folder, tmp_path, monkeypatch):
    with logged_in(monkeypatch) as server:
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        server.publish("me/vit", folder)
        model = load_classifier("me/vit")
        facts = file_facts(source_of(model))
        assert facts["copies"] == [["model.safetensors"]] and facts["others"] == ["pytorch_model.bin"]
        assert facts["sha256"]["model.safetensors"] == sha256(folder / "model.safetensors")
        assert facts["hub"]["security_scan"] == {"scansDone": True, "filesWithIssues": []}
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        offline = file_facts(source_of(model))
        assert offline["others"] is None and set(offline["hub"].values()) == {"not available"}
    huggingface_hub.close_session()


def test_fit_against_loops():
    images = pictures(40)
    images.images[9] = images.images[1]  # of the same class
    images.labels[3] = 0
    model = classifier(network())
    facts = check(model, images, **BARE).fit
    with torch.no_grad():
        rows = model(pixel_values=preprocessing_of(model)(images.images)).logits.softmax(1)
    wrong = [row.argmax().item() != label and row.max() > 0.9 for row, label in zip(rows, images.labels.tolist(), strict=True)]
    right = [row.argmax().item() == label for row, label in zip(rows, images.labels.tolist(), strict=True)]
    assert facts["contradicted"] == sum(wrong) / 40 > 0 and facts["accuracy"] == sum(right) / 40
    assert facts["copies"] == 1 and facts["sizes"] == [[8, 8], [8, 8]]
    assert facts["per_class"] == {"counts": [6, 5, 5, 4, 5, 5, 5, 5], "fewest": 4, "most": 6, "none": []}
    assert facts["mapping"] == "by name" and facts["accuracy_ci95"][0] < facts["accuracy"] <= facts["accuracy_ci95"][1]


def test_images_of_many_sizes_keep_their_order():
    images = coloured()
    many = RawImages([image[:, : SIZE - row % 3] for row, image in enumerate(images.images)], images.labels, images.class_names)
    model = tiny_vit()
    found, each = answers(model, many, 5), [answers(model, many.select([row])) for row in range(24)]
    assert found.predicted.tolist() == [one.predicted[0] for one in each]
    np.testing.assert_allclose(found.confidence, [one.confidence[0] for one in each], rtol=1e-5)
    assert check(model, many, **BARE).fit["sizes"] == [[14, 16], [16, 16]]


def test_confident_flips():
    one = Answers(np.array([0, 0, 1, 2]), np.array([0.95, 0.95, 0.99, 0.91]))
    other = Answers(np.array([0, 1, 2, 1]), np.array([0.95, 0.95, 0.8, 0.97]))
    assert confident_flips(one, other).tolist() == [False, True, False, True]
    assert one.contradicted(np.array([0, 1, 1, 0])).successes == 2


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_costs(make):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("d3", "ft_sam"):
        cost = cost_of(name, model, coloured())
        assert cost.why_not is None and cost.seconds_per_update > 0 and cost.updates >= 200
        assert cost.minutes == cost.seconds_per_update * cost.updates / 60
        assert cost.peak_memory_mib > 10  # torch alone is more
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_defence_that_refuses_says_why():
    cost = cost_of("rnp", tiny_vit(), coloured())
    assert "BatchNorm" in cost.why_not and cost.minutes is None and "\n" not in cost.why_not


def test_costs_that_are_wanted(found):
    assert [(cost.defence, cost.images, cost.why_not) for cost in found.costs] == [("d3", 12, None), ("ft_sam", 12, None)]


def ten_images():
    return classifier(network()), pictures(10)


def no_images_of_a_class():
    images = pictures()
    return classifier(network()), images.select((images.labels != 2).nonzero()[:, 0])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (ten_images, "at least 20 images"),
        (no_images_of_a_class, "images of every class; there are none of class 2"),
    ],
)
def test_what_signals_cannot_read_is_said_and_the_rest_is_there(case, message):
    facts = check(*case(), **BARE).as_dict()
    (signal,) = facts["suspicion"]["signals"].values()
    assert message in signal["not_applicable"] and "\n" not in signal["not_applicable"]
    assert facts["fit"]["accuracy"] > 0.5 and "nothing can be concluded" in facts["suspicion"]["outcome"]
    assert facts["fit"]["per_class"]["none"] == (["class 2"] if case is no_images_of_a_class else [])


def test_of_two_classes_only_twins_say_something():
    names, twins = ["class 0", "class 1"], (classifier(network(classes=2, seed=seed)) for seed in (2, 3))
    found = check(classifier(network(classes=2)), pictures(classes=2), twins=twins, **BARE)
    (signal,) = found.as_dict()["suspicion"]["signals"].values()
    assert signal["p_own_classes"] is None and signal["p"] in (1 / 3, 2 / 3, 1) and signal["suspect_class"] in names
    assert "2 classes are too few to compare with each other, only with twins" in str(found)


def not_finite():
    model = classifier(network())
    model.network.head.weight.data[1, 1] = torch.nan
    return model, pictures()


def other_classes():
    images = pictures()
    return classifier(network()), RawImages(images.images, images.labels, images.class_names[::-1])


def other_order():
    """Images under numbers that no name tells, and a model that knows them under others."""
    images, model = pictures(), classifier(network())
    model.config.id2label = {k: f"LABEL_{k}" for k in range(len(images.class_names))}
    return model, RawImages(images.images, (images.labels + 1) % 8, [str(k) for k in range(8)])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (not_finite, "are not finite"),
        (other_classes, "class 0 is 'class 7' in the dataset and 'class 0' in the model"),
        (other_order, "if the classes were in another order"),
    ],
)
def test_what_does_not_fit_is_one_line(case, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(*case(), **BARE)
    assert "\n" not in str(caught.value)


def test_a_model_of_one_class_is_one_line(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "vit")
    settings = json.loads((place / "config.json").read_text()) | {"id2label": {"0": "cat"}, "label2id": {"cat": 0}}
    (place / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="a classifier tells at least 2 apart"):
        load_classifier(place)


def test_twins_make_an_alarm_possible():
    twins = (classifier(network(seed=seed)) for seed in range(2, 11))
    found = check(classifier(network(20)), pictures(), twins=twins, alarm_at=0.1, **BARE)
    assert found.alarm and found.suspicion.findings["head_rows"].suspect_class == TARGET
    assert len(found.null.twins) == 9
