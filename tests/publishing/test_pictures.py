"""The pictures of a card: what is shown, which images never are, and that no name of a class breaks them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAST, tiny_vit

from d3_hf import FineTuningConfig, FineTuningTrainer, RawImages, from_description, purify
from d3_hf.publishing.pictures import classes, training
from d3_hf.publishing.pictures.of_card import CLASSES, NAMES, TRAINING, TRIGGERED, pictures_of
from d3_hf.publishing.pictures.triggered import TriggeredImages
from d3_hf.publishing.report import Report

HOSTILE = ["$\\frac$", "a\x00b\n", "very long " * 20, "%s {x}"]
LOG = [{"step": step, "clean_loss": 1 / step, "distance": step / 50} for step in range(10, 60, 10)] + [{"train_loss": 1.0}]


def rows(count):
    return [{"class": f"class {k}", "images": 9, "before": 0.9, "after": 0.9 - 0.001 * k} for k in range(count)]


def shown():
    images = [torch.zeros(3, 8 + k, 9, dtype=torch.uint8) for k in range(4)]
    return TriggeredImages(images, images, HOSTILE, ["b"] * 4, ["b"] * 4, HOSTILE)


def test_classes_without_images_are_left_out_and_of_many_those_that_changed_most_are_drawn_in_order():
    empty = {"class": "empty", "images": 0, "before": None, "after": None}
    assert classes.chosen_classes([*rows(3), empty]) == rows(3) and classes.chosen_classes([empty]) == []
    assert [row["class"] for row in classes.chosen_classes(rows(50))] == [f"class {k}" for k in range(30, 50)]


def test_a_curve_needs_points():
    assert set(training.logged(LOG)) == {"clean_loss", "distance"} and training.logged(LOG[:2]) == {}
    assert training.logged([{key: entry[key] for key in ("step", "clean_loss")} for entry in LOG[:5]]) == {
        "clean_loss": [(10, 0.1), (20, 0.05), (30, 1 / 30), (40, 0.025), (50, 0.02)]
    }


def test_all_are_drawn_whatever_a_class_is_called(tmp_path):
    named = [row | {"class": name} for row, name in zip(rows(4), HOSTILE, strict=True)]
    pictures = pictures_of(Report(shown=shown(), classes=tuple(named)), LOG, 0.1)
    assert [picture.name for picture in pictures] == [TRIGGERED, CLASSES, TRAINING] and set(NAMES) == {p.name for p in pictures}
    for picture in pictures:
        picture.draw(tmp_path / picture.name)
        first = (tmp_path / picture.name).read_bytes()
        picture.draw(tmp_path / picture.name)
        assert (tmp_path / picture.name).read_bytes() == first  # or a signature would not outlive a second push
        assert np.asarray(Image.open(tmp_path / picture.name).convert("L")).std() > 10
        assert "\n" not in picture.caption and "]" not in picture.caption


def test_captions_say_what_is_drawn():
    assert pictures_of(Report(), []) == []
    (few,), (many,) = (pictures_of(Report(classes=tuple(rows(n))), []) for n in (3, 50))
    assert few.caption == "ACC of each class before and after, with the number of test images."
    assert many.caption.startswith("ACC of the 20 classes whose accuracy changed most before and after")
    (curve,) = pictures_of(Report(), [{"step": k, "clean_loss": 1.0} for k in range(5)])
    assert curve.caption == "Loss on the trusted images while training."


def test_a_picture_that_cannot_be_drawn_costs_itself_and_no_run(tmp_path, monkeypatch, caplog):
    def fails(*arguments):
        raise RuntimeError("no font")

    monkeypatch.setattr("d3_hf.publishing.pictures.of_card.draw_classes", fails)
    purified(tmp_path, "photos")
    assert f"{CLASSES} is not drawn (no font)" in caplog.text and not list(tmp_path.glob("*.png"))
    assert (tmp_path / "model.safetensors").is_file() and CLASSES not in (tmp_path / "README.md").read_text()


def test_neither_pyplot_nor_a_backend_is_touched(tmp_path):
    code = (
        "import sys; from pathlib import Path; from d3_hf.publishing.pictures.training import draw_training\n"
        "assert 'matplotlib' not in sys.modules\n"
        "draw_training([{'step': k, 'clean_loss': 1.0} for k in range(5)], None, Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# In a purification ---------------------------------------------------------------------------------------------------------


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return RawImages(torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator), labels, ["a", "b", "c"])


def purified(folder, data, **options):
    made = FineTuningTrainer(tiny_vit(), FineTuningConfig(str(folder), **FAST), images(30, 0))
    report = Report(data=data, split="test")
    return purify(made, images(30, 1), from_description({"name": "badnets", "size": 3}), report=report, **options)


@pytest.mark.parametrize(
    ("data", "options", "is_shown"),
    [
        ("digits", {}, True),
        ("them/data", {}, True),
        ("photos", {}, False),
        (None, {}, False),
        ("photos", {"show_images": True}, True),
        ("them/data", {"show_images": False}, False),
    ],
)
def test_images_of_this_machine_are_shown_only_where_that_is_asked_for(tmp_path, data, options, is_shown):
    report = purified(tmp_path, data, **options)
    there = {file.name for file in tmp_path.glob("*.png")}
    assert there == {CLASSES} | ({TRIGGERED} if is_shown else set())
    card = (tmp_path / "README.md").read_text()
    assert all((f"]({name})" in card) == (name in there) for name in NAMES)
    assert (report.shown is not None) == is_shown and "shown" not in report.measured()


def test_what_is_shown_is_the_first_image_of_each_class_that_counts_with_both_answers(tmp_path):
    clean = tiny_vit(seed=1)
    report, test = purified(tmp_path, "digits", clean_model=clean), images(30, 1)
    shown = report.shown
    assert shown.truth == ["b", "c"] and shown.wanted == ["a", "a"]  # the target's own class does not count
    assert torch.equal(torch.stack(shown.plain), test.images[1:3])
    attack = from_description({"name": "badnets", "size": 3})
    assert torch.equal(torch.stack(shown.triggered), attack.trigger(test.images[1:3]))
    assert not torch.equal(shown.triggered[0], shown.plain[0]) and set(shown.before + shown.after) <= {"a", "b", "c"}
    before = tiny_vit()
    pixels = torch.stack(shown.triggered).float() / 255 * 2 - 1
    with torch.no_grad():
        wanted = before.eval()(pixel_values=pixels).logits.argmax(-1)
    assert shown.before == ["abc"[k] for k in wanted.tolist()]
    assert report.floor["rates"]["asr_n"] == 20 and report.floor["source"]["kind"] == "module"
    assert "| | before | after | floor | images |" in (tmp_path / "README.md").read_text()
