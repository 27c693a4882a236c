"""The figures: the line through victim and purified model, weight changes, features, classes, and the recipe that draws."""

import copy
import importlib.util
import json
import math

import pytest
import torch
import torch.nn.functional as F
from places import RECIPES
from tiny import SIZE, tiny_resnet, tiny_timm_vit, tiny_vit
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from d3_hf.attacks import BadNets, save_attack
from d3_hf.data.images import RawImages
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.evaluation import landscape
from d3_hf.evaluation.measure import measure
from d3_hf.evaluation.metrics import Proportion
from d3_hf.models.batch_norm import reestimate_batch_norm
from d3_hf.models.head import find_head

FILE = RECIPES / "figures.py"
ATTACK = BadNets(target_label=1)
MODELS = [tiny_vit, tiny_resnet, tiny_timm_vit]


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return RawImages(pixels, torch.arange(30) % 3, ["a", "b", "c"])


def preprocessing_of(model):
    return Preprocessing.from_processor(model.image_processor)


def trained(make, seed):
    """A tiny model whose BatchNorm statistics are its own."""
    model = make(seed).train()
    with torch.no_grad():
        for _ in range(3):
            model(pixel_values=torch.randn(16, 3, SIZE, SIZE) * (1 + seed))
    return model.eval()


@pytest.mark.parametrize("make", MODELS)
def test_ends_of_the_path_are_the_two_models(make, images):
    models = trained(make, 0), trained(make, 1)
    untouched = [copy.deepcopy(model.state_dict()) for model in models]
    preprocessing = preprocessing_of(models[0])
    points = landscape.path(*models, images, preprocessing, ATTACK, steps=(0, 1), progress=False)
    counted = images.labels != ATTACK.target_label
    triggered = preprocessing(ATTACK.trigger(images.images[counted]))
    for model, point in zip(models, points, strict=True):
        found = measure(model, images, preprocessing, ATTACK, progress=False)
        assert (point.accuracy, point.asr) == (found.accuracy, found.asr)
        with torch.no_grad():
            clean = F.cross_entropy(model(pixel_values=preprocessing(images.images)).logits, images.labels)
            backdoor = F.cross_entropy(model(pixel_values=triggered).logits, torch.ones(len(triggered), dtype=torch.long))
        assert point.clean_loss == pytest.approx(clean.item(), abs=1e-5)
        assert point.backdoor_loss == pytest.approx(backdoor.item(), abs=1e-5)
    assert points[0].clean_loss != points[1].clean_loss
    for model, state in zip(models, untouched, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_points_by_default():
    assert landscape.STEPS == (-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4)


def test_interpolation():
    start, end = trained(tiny_resnet, 0).state_dict(), trained(tiny_resnet, 1).state_dict()
    end["resnet.embedder.embedder.normalization.num_batches_tracked"] += 7
    for t in (0, 1):
        assert all(
            torch.equal(value, (start, end)[t][name])
            for name, value in landscape.interpolate(start, end, t).items()
            if value.is_floating_point()
        )
    beyond = landscape.interpolate(start, end, 2)
    name = find_head(tiny_resnet(), (SIZE, SIZE)) + ".weight"
    torch.testing.assert_close(beyond[name], 2 * end[name] - start[name])
    counter = "resnet.embedder.embedder.normalization.num_batches_tracked"
    assert torch.equal(beyond[counter], start[counter]) and beyond[counter].dtype == torch.int64


@pytest.mark.parametrize("t", [-4.0, 4.0])
def test_no_variance_is_negative(t):
    start, end = trained(tiny_resnet, 0).state_dict(), trained(tiny_resnet, 1).state_dict()
    variances = [name for name in start if name.endswith("running_var")]
    straight = torch.cat([start[name] + t * (end[name] - start[name]) for name in variances])
    found = torch.cat([landscape.interpolate(start, end, t)[name] for name in variances])
    assert straight.min() < 0  # or there would be nothing to keep it from
    torch.testing.assert_close(found, straight.clamp(min=0))


def test_half_precision_is_interpolated_in_float32():
    start, end = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}, {"w": torch.tensor([1.0078125], dtype=torch.bfloat16)}
    assert landscape.interpolate(start, end, 0.5)["w"] == torch.tensor([1.00390625])


def test_a_network_that_overflows_has_an_infinite_loss(images):
    first, second = tiny_vit(0), tiny_vit(1)
    with torch.no_grad():
        second.classifier.weight.fill_(3e38)  # four times that is infinite
    far = landscape.path(first, second, images, preprocessing_of(first), ATTACK, steps=(4,), progress=False)[0]
    assert far.clean_loss == far.backdoor_loss == math.inf
    assert far.accuracy.successes == far.asr.successes == 0


def test_reestimated_statistics_are_those_of_a_pass_in_train_mode(images):
    model = trained(tiny_resnet, 0)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, preprocessing = copy.deepcopy(model).train(), preprocessing_of(model)
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the last batch alone
    plain(pixel_values=preprocessing(images.images))
    reestimate_batch_norm(model, [preprocessing(images.images)])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name]) if "num_batches" not in name else None
        if "running" in name:
            assert not torch.allclose(tensor, old[name])
    assert not any(module.training for module in model.modules())
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize(
    ("asr", "expected"),
    [
        ([1.0, 1.0, 0.9, 0.1, 0.0], 0.375),  # half of the way between t = 0.75 and t = 0.5
        ([1.0, 0.5, 0.2, 0.1, 0.0], 0.75),
        ([0.9, 0.1, 0.8, 0.1, 0.0], 0.25 + 0.25 * 4 / 7),  # the first time from the purified model
        ([1.0, 1.0, 1.0, 1.0, 0.6], 0.0),
        ([0.4, 0.4, 0.4, 0.4, 0.0], None),
    ],
)
def test_how_far_back_the_backdoor_works_again(asr, expected):
    rates = {t / 4: Proportion(round(100 * rate), 100) for t, rate in enumerate(asr)}
    line = [landscape.PathPoint(t, 0.0, 0.0, Proportion(1, 1), rate) for t, rate in rates.items()]
    beyond = [landscape.PathPoint(t, 0.0, 0.0, Proportion(1, 1), Proportion(1, 1)) for t in (-0.5, 2.0)]
    assert landscape.t50([beyond[0], *line, beyond[1]]) == pytest.approx(expected)


def test_path_with_reestimated_statistics(images):
    models = trained(tiny_resnet, 0), trained(tiny_resnet, 1)
    arguments = (*models, images, preprocessing_of(models[0]), ATTACK, (1, 3))
    interpolated = landscape.path(*arguments, progress=False)
    estimated = landscape.path(*arguments, batch_norm="re-estimated", retain=images, progress=False)
    reestimate_batch_norm(models[1], [arguments[3](images.images)])
    with torch.no_grad():
        logits = models[1](pixel_values=arguments[3](images.images)).logits
    assert estimated[0].clean_loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), abs=1e-5)
    assert all(a.clean_loss != b.clean_loss for a, b in zip(interpolated, estimated, strict=True))


def test_weight_changes():
    before = tiny_resnet(0)
    after = copy.deepcopy(before)
    name = find_head(before, (SIZE, SIZE)) + ".weight"
    with torch.no_grad():
        after.get_parameter(name).mul_(3)
    for relative in (True, False):
        changes = landscape.weight_changes(before, after, relative=relative)
        weight = before.get_parameter(name).detach().flatten()
        expected = 2 * weight / weight.square().mean().sqrt() if relative else 2 * weight
        torch.testing.assert_close(changes.pop(name), expected)
        assert changes and not any(change.any() for change in changes.values())
        assert all(parameter.ndim > 1 for key, parameter in before.named_parameters() if key in changes)


@pytest.mark.parametrize("make", MODELS)
def test_features_are_what_the_head_sees(make, images):
    model = make().train()
    preprocessing = preprocessing_of(model)
    features = landscape.penultimate_features(model, images, preprocessing)
    head = model.get_submodule(find_head(model, preprocessing.size))
    assert model.training and not head._forward_pre_hooks
    assert features.dtype == torch.float32 and features.shape == (len(images), head.in_features)
    with torch.no_grad():
        logits = model.eval()(pixel_values=preprocessing(images.images)).logits
    torch.testing.assert_close(features @ head.weight.detach().T + head.bias.detach(), logits, rtol=1e-4, atol=1e-5)


def test_images_of_several_sizes_keep_their_order(images):
    model = tiny_vit()
    preprocessing = preprocessing_of(model)
    cut = [image[:, : SIZE - row % 3] for row, image in enumerate(images.images)]
    several = RawImages(cut, images.labels, images.class_names)
    features = landscape.penultimate_features(model, several, preprocessing)
    alone = [landscape.penultimate_features(model, several.select([row]), preprocessing) for row in range(len(cut))]
    torch.testing.assert_close(features, torch.cat(alone))
    triggered = landscape.triggered_images(several, ATTACK, 3)
    assert triggered.index.tolist() == [row for row in range(30) if row % 3 != ATTACK.target_label]
    for row, image in zip(triggered.index.tolist(), triggered.images, strict=True):
        assert torch.equal(image, ATTACK.trigger(cut[row]))


def test_silhouette_shows_a_backdoor():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    centres = 10 * torch.eye(4)

    def around(rows):
        return centres[rows] + 0.5 * torch.randn(len(rows), 4, generator=generator)

    clean = around(labels)
    assert landscape.silhouette(clean, labels, around(torch.full((60,), 3))) > 0.8  # a cluster of their own
    assert abs(landscape.silhouette(clean, labels, around(torch.zeros(60, dtype=torch.long)))) < 0.2  # inside the target's
    assert landscape.silhouette(clean, labels, around(labels[:60])) < -0.5  # each in its own class


def test_classes_sum_to_the_whole(images):
    model = tiny_vit()
    preprocessing = preprocessing_of(model)
    classes = landscape.per_class(model, images, preprocessing, ATTACK)
    whole = measure(model, images, preprocessing, ATTACK, progress=False)
    assert list(classes) == ["a", "c"]
    for key in ("asr", "ra"):
        parts = [getattr(found, key) for found in classes.values()]
        assert sum(part.n for part in parts) == getattr(whole, key).n
        assert sum(part.successes for part in parts) == getattr(whole, key).successes


def test_triggered_images_of_different_sizes(images):
    several = RawImages([images.images[0], images.images[1], images.images[2][:, :12]], images.labels[:3], ["a", "b", "c"])
    found = landscape.triggered_images(several, ATTACK, 3)
    assert found.labels.tolist() == [0, 2] and found.index.tolist() == [0, 2]
    assert all(torch.equal(x, ATTACK.trigger(several.images[row])) for x, row in zip(found.images, (0, 2), strict=True))


def test_an_infinite_loss_can_be_written_and_drawn(figures, tmp_path):
    row = {"t": 0.0, "clean_loss": 1.0, "backdoor_loss": figures.finite(math.inf), "accuracy": 0.5, "asr": 1.0}
    numbers = {"batch_norm": "interpolated", "paths": {"one": [row, row | {"t": 1.0}]}}
    figures.draw("path", json.loads(json.dumps(numbers, allow_nan=False)), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def refuse(what, images):
    resnet, vit, prep = tiny_resnet(0), tiny_vit(0), preprocessing_of(tiny_vit(0))
    only_target = images.select([1, 4])
    features, labels = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])
    wide = copy.deepcopy(vit)
    wide.classifier = torch.nn.Linear(8, 4)
    zero = copy.deepcopy(vit)
    torch.nn.init.zeros_(zero.classifier.weight)
    calls = {
        "names": lambda: landscape.path(resnet, vit, images, prep, ATTACK),
        "shapes": lambda: landscape.path(vit, wide, images, prep, ATTACK),
        "batch norm": lambda: landscape.path(vit, vit, images, prep, ATTACK, batch_norm="frozen"),
        "no retain": lambda: landscape.path(resnet, resnet, images, prep, ATTACK, batch_norm="re-estimated"),
        "no statistics": lambda: landscape.path(
            vit, vit, images, prep, ATTACK, batch_norm="re-estimated", retain=images, progress=False
        ),
        "label": lambda: landscape.path(vit, vit, images, prep, BadNets(target_label=3)),
        "target only": lambda: landscape.path(vit, vit, only_target, prep, ATTACK),
        "target only by class": lambda: landscape.per_class(vit, only_target, prep, ATTACK),
        "zero": lambda: landscape.weight_changes(zero, vit),
        "widths": lambda: landscape.silhouette(features, labels, torch.zeros(3, 3)),
        "one triggered": lambda: landscape.silhouette(features, labels, torch.zeros(1, 2)),
    }
    calls[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("names", "different architectures: .* only in the"),
        ("shapes", r"different architectures: classifier.* \(3"),
        ("batch norm", "batch_norm must be one of interpolated, re-estimated; got 'frozen'"),
        ("no retain", "pass retain"),
        ("no statistics", "needs BatchNorm and clean images"),
        ("label", "target_label 3 is out of range"),
        ("target only", "no image is of a class that the attack counts"),
        ("target only by class", "no image is of a class that the attack counts"),
        ("zero", "classifier.weight was zero throughout"),
        ("widths", r"got shapes \(4, 2\), \(4,\) and \(3, 3\)"),
        ("one triggered", "2 triggered images; got 4 and 1"),
    ],
)
def test_refusals(what, message, images):
    with pytest.raises(ValueError, match=message):
        refuse(what, images)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A victim's folder, two purified forms of it and one with other preprocessing; ten classes, images from `digits`."""
    root = tmp_path_factory.mktemp("models")
    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=10, initializer_range=0.3, id2label={i: str(i) for i in range(10)},
    )  # fmt: skip
    for seed, name in enumerate(("victim", "one", "two", "other")):
        set_seed(seed)
        model = ViTForImageClassification(config)
        torch.nn.init.normal_(model.vit.embeddings.cls_token)
        torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
        model.save_pretrained(root / name)
        mean = [0.4 if name == "other" else 0.5] * 3
        ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=mean, image_std=[0.5] * 3).save_pretrained(
            root / name
        )
    save_attack(ATTACK, root / "victim")
    record = {"recipe": {"dataset_name": "moved/away"}, "planted": {}, "measured": {"victim": {}}}
    (root / "victim" / "victim.json").write_text(json.dumps(record))
    return root


@pytest.mark.parametrize("name", ["path", "weights", "features", "classes"])
def test_commands_write_a_picture_and_its_numbers(name, figures, folders, tmp_path):
    picture = tmp_path / "new" / f"{name}.png"
    purified = [f"{label}={folders / label}" for label in ("one", "two")]
    figures.main([name, "--victim", str(folders / "victim"), "--purified", *purified, "--output", str(picture),
                  "--dataset_name", "digits", "--max_test_images", "40"])  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(picture.with_suffix(".json").read_text())
    assert numbers["figure"] == name and numbers["attack"] == ATTACK.describe()
    if name == "path":
        assert list(numbers["paths"]) == ["one", "two"] and numbers["batch_norm"] is None
        assert [row["t"] for row in numbers["paths"]["one"]] == list(landscape.STEPS) and list(numbers["t50"]) == ["one", "two"]
    if name == "weights":
        assert all(
            sum(group["share"]) + group["unchanged"] == pytest.approx(1)
            for groups in numbers["changes"].values()
            for group in groups.values()
        )
    if name == "features":
        assert list(numbers["models"]) == ["victim", "one", "two"]
        assert len(numbers["models"]["one"]["points"]) == len(numbers["classes"]) == 40 + numbers["n_triggered"]
    if name == "classes":
        assert "1" not in numbers["models"]["victim"]  # the target
        assert sum(found["ra_n"] for found in numbers["models"]["two"].values()) < 40
    again = tmp_path / "again.png"
    figures.draw(name, numbers, again)
    assert again.read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"": "shapes"}, ValueError, "name a figure first: path, weights, features, classes; got 'shapes'"),
        ({"--output": "x.pdf"}, ValueError, r"output must be a .png file; got x.pdf"),
        ({"--purified": "{one}"}, ValueError, "purified must be NAME=FOLDER"),
        ({"--purified": "victim={one}"}, ValueError, "different names, none of them 'victim'"),
        ({"--purified": "a={one} a={two}"}, ValueError, "different names"),
        ({"--purified": "a={one} b={one} c={one} d={one} e={one} f={one} g={one}"}, ValueError, "6 purified models; got 7"),
        ({"--purified": "a={other}"}, ValueError, "a resizes or normalises images differently"),
        ({"--victim": "{one}"}, FileNotFoundError, "holds no victim.json"),
        ({"--batch_norm": "frozen"}, ValueError, "batch_norm must be one of"),
    ],
)
def test_commands_refuse(changed, error, message, figures, folders, tmp_path):
    options = {"": "path", "--victim": "{victim}", "--purified": "a={one}", "--output": str(tmp_path / "x.png")} | changed
    places = {name: folders / name for name in ("victim", "one", "two", "other")}
    words = [word.format(**places) for name, value in options.items() for word in (name, *value.split()) if word]
    with pytest.raises(error, match=message):
        figures.main([*words, "--dataset_name", "digits", "--max_test_images", "10"])
    assert not list(tmp_path.iterdir())
