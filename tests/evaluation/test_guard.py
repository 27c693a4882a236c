"""Guard rails: each breaks at its limit and not before, what breaks is kept apart; what a retain set is warned about."""

import json
import logging
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from d3_hf import RawImages, load_classifier, purify
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.defenses.d3.trainer import D3Config
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.errors import GuardRailBroken
from d3_hf.evaluation import guard as guarding
from d3_hf.evaluation.guard import class_rates, rails_of, recall_rows
from d3_hf.evaluation.guard_arguments import GuardArguments
from d3_hf.evaluation.measure import Measurement, measure
from d3_hf.evaluation.metrics import accuracy
from d3_hf.evaluation.paired import paired_table
from d3_hf.evaluation.retain_check import retain_warnings

NAMES = ["red", "green", "blue"]
LABELS = torch.arange(30) % 3


class MeanColour(nn.Module):
    """Names the brightest channel: accuracy can be set image by image."""

    def __init__(self, sharpness=100.0):
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data = sharpness * torch.eye(3)

    def forward(self, pixels):
        return self.head(pixels.mean((2, 3)))


def images(labels, colours=None, seed=0):
    """Images 8x8 whose brightest channel is ``colours``, default their label; all different."""
    labels = torch.as_tensor(labels)
    pixels = torch.randint(0, 60, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    pixels[torch.arange(len(labels)), labels if colours is None else torch.as_tensor(colours)] += 150
    return RawImages(pixels, labels, NAMES)


def trainer_of(folder, retain, sharpness=100.0, **options):
    model = load_classifier(MeanColour(sharpness), image_mean=[0] * 3, image_std=[1] * 3, image_size=8, label_names=NAMES)
    args = FineTuningConfig(str(folder), disable_tqdm=True, use_cpu=True, crop_padding=0, **options)
    return FineTuningTrainer(model, args, retain)


def measured(predictions):
    return Measurement(accuracy(predictions, LABELS), None, None, 0.0, len(LABELS), predictions=np.asarray(predictions))


def wrong(count):
    """The labels, with so many wrong ones from the start."""
    predictions = LABELS.numpy().copy()
    predictions[:count] = (predictions[:count] + 1) % 3
    return predictions


def broken_rails(*arguments):
    return guarding.broken_rails(rails_of(*arguments))


def uncertain_rails(*arguments):
    return guarding.uncertain_rails(rails_of(*arguments, NAMES))


@pytest.mark.parametrize(
    ("guard", "before", "after", "reason"),
    [
        (dict(max_accuracy_drop=0.1), 0, 3, None),
        (dict(max_accuracy_drop=0.1), 0, 4, "from 100.0 % to 86.7 %; max_accuracy_drop allows 10; give"),
        (dict(max_accuracy_drop=0.1), 4, 0, None),
        (dict(max_accuracy_drop=None), 0, 30, None),
        (dict(max_accuracy_drop=None, min_class_accuracy=0.9), 0, 3, None),
        (dict(max_accuracy_drop=None, min_class_accuracy=0.9), 0, 4, "1 of 3 classes is under min_class_accuracy, 90 %: red"),
        (dict(max_accuracy_drop=None, min_agreement=0.9), 3, 6, None),
        (dict(max_accuracy_drop=None, min_agreement=0.9), 6, 2, "86.7 % of the predictions are those of the suspicious model"),
    ],
)  # fmt: skip
def test_each_rail_holds_at_its_limit_and_breaks_beyond(guard, before, after, reason):
    found = broken_rails(GuardArguments(**guard), measured(wrong(before)), measured(wrong(after)), LABELS, NAMES)
    assert [reason] == [reason for text in found if reason in text] if reason else found == []


def test_every_broken_rail_is_named():
    guard = GuardArguments(max_accuracy_drop=0, min_class_accuracy=0.5, min_agreement=1)
    assert len(broken_rails(guard, measured(wrong(0)), measured(wrong(30)), LABELS, NAMES)) == 3


def test_what_a_lost_accuracy_advises_can_be_given():
    (reason,) = broken_rails(GuardArguments(), measured(wrong(0)), measured(wrong(4)), LABELS, NAMES)
    advised = set(re.findall(r"--(\w+)", reason))
    assert "more images" in reason and advised == {"learning_rate", "max_accuracy_drop"}
    assert advised <= {option.name for kind in (GuardArguments, D3Config) for option in fields(kind)}


@pytest.mark.parametrize(
    ("before", "after", "allowed", "fell", "verdict"),
    [
        (0, 20, 0.05, "fell by 66.7 points", "rejected"),
        (0, 3, 0.05, "fell by 10.0 points", "rejected, uncertain"),
        (0, 3, 0.1, "fell by 10.0 points", "uncertain"),
        (0, 0, 0.05, "fell by 0.0 points", "uncertain"),
        (2, 1, 0.05, "rose by 3.3 points", "uncertain"),
        (0, 3, 0.5, None, "accepted"),
        (20, 0, 0.05, None, "accepted"),
        (0, 30, 1, None, "accepted"),
    ],
)  # fmt: skip
def test_the_measured_drop_decides_and_its_interval_says_whether_that_is_certain(before, after, allowed, fell, verdict):
    guard, models = GuardArguments(max_accuracy_drop=allowed), (measured(wrong(before)), measured(wrong(after)))
    rejected, uncertain = broken_rails(guard, *models, LABELS, NAMES), uncertain_rails(guard, *models, LABELS)
    said = rejected + uncertain
    assert bool(rejected) == ("rejected" in verdict) and len(said) == (fell is not None)
    low, high = paired_table(wrong(before), wrong(after), LABELS).interval()
    ends = (100 * low, 100 * high) if before <= after else (-100 * high, -100 * low)
    cannot = "cannot tell with 30 images: " if "uncertain" in verdict else ""
    for line in said:
        assert line.startswith(f"{cannot}ACC {fell}, 95 % interval [{ends[0]:.1f}, {ends[1]:.1f}], from ")
        assert ("give more test images" in line) == bool(cannot) and ("--max_accuracy_drop" in line) == bool(rejected)
    assert (low <= allowed < high) == ("uncertain" in verdict)


def test_a_rail_that_is_off_says_nothing():
    assert uncertain_rails(GuardArguments(max_accuracy_drop=None), measured(wrong(0)), measured(wrong(3)), LABELS) == []


def test_what_became_of_each_rail_is_kept_in_numbers():
    guard = GuardArguments(max_accuracy_drop=0.1, min_class_accuracy=0.5, min_agreement=0.95)
    found = [rail.as_dict() for rail in rails_of(guard, measured(wrong(0)), measured(wrong(3)), LABELS, NAMES)]
    assert found == [
        {"name": "max_accuracy_drop", "limit": 0.1, "found": pytest.approx(0.1), "holds": True, "is_certain": False},
        {"name": "min_class_accuracy", "limit": 0.5, "found": 0.9, "holds": True, "is_certain": True},
        {"name": "min_agreement", "limit": 0.95, "found": 0.9, "holds": False, "is_certain": True},
    ]
    off = GuardArguments(max_accuracy_drop=1)
    assert rails_of(off, measured(wrong(0)), measured(wrong(30)), LABELS, NAMES) == []


def test_the_accuracy_of_each_class_before_and_after():
    before, after = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])
    assert recall_rows(before, after, torch.tensor([0, 0, 1, 1]), ["a", "b", "c"]) == [
        {"class": "a", "images": 2, "before": 1.0, "after": 0.5},
        {"class": "b", "images": 2, "before": 1.0, "after": 0.5},
        {"class": "c", "images": 0, "before": None, "after": None},
    ]


def test_a_class_without_images_is_passed_over():
    assert class_rates(np.array([0, 2, 1]), torch.tensor([0, 2, 2])) == {0: 1.0, 2: 0.5}


@pytest.mark.parametrize("name", ["max_accuracy_drop", "min_class_accuracy", "min_agreement"])
@pytest.mark.parametrize("value", [-0.1, 5, float("nan")])
def test_rails_are_shares(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], as 0.05 for five points"):
        GuardArguments(**{name: value})


def test_measuring_keeps_the_predictions_out_of_sight():
    model = load_classifier(MeanColour(), image_mean=[0] * 3, image_std=[1] * 3, image_size=8)
    found = measure(model, images(LABELS, wrong(4)), Preprocessing.from_processor(model.image_processor), progress=False)
    assert found.predictions.tolist() == wrong(4).tolist() and found.accuracy.successes == 26
    assert "predictions" not in repr(found)


# What becomes of a model that broke a rail ------------------------------------------------------------------------------


RUINED = dict(learning_rate=500.0, max_steps=20)


def ruinous(folder, **options):
    """A run on labels that are all wrong."""
    return trainer_of(folder, images((LABELS + 1) % 3, LABELS), **RUINED, **options)


def test_a_rejected_model_is_kept_apart_and_not_pushed(tmp_path, monkeypatch):
    trainer = ruinous(tmp_path)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "push_to_hub", lambda *a, **k: pytest.fail("a rejected model was pushed"))
    with pytest.raises(GuardRailBroken, match="ACC fell by 100.0 points.*nothing was pushed") as broken:
        purify(trainer, images(LABELS, seed=1), guard=GuardArguments(min_agreement=0.5))
    rejected = tmp_path / "rejected"
    assert broken.value.folder == rejected and len(broken.value.reasons) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["rejected"]
    assert {"model.safetensors", "README.md", "purification.json", "all_results.json"} <= {f.name for f in rejected.iterdir()}
    facts, card = json.loads((rejected / "purification.json").read_text()), (rejected / "README.md").read_text()
    assert facts["measured"]["rejected"] == broken.value.reasons
    assert facts["measured"]["guard_rails"] == {"max_accuracy_drop": 0.05, "min_class_accuracy": None, "min_agreement": 0.5}
    assert "\n\n**Rejected**" in card and all(f"\n- {reason}\n" in card for reason in broken.value.reasons)
    assert "| fall of ACC, at most (`max_accuracy_drop`) | 5.0 points | 100.0 points | **broken** |" in card
    assert card.index("**Rejected**") < card.index("No trigger was known: accuracy 100.0 % to 0.0 %, a fall beyond chance")
    assert broken.value.results == json.loads((rejected / "all_results.json").read_text())


def test_without_rails_the_same_run_is_saved(tmp_path):
    assert purify(ruinous(tmp_path), images(LABELS, seed=1)).results["accuracy_after"] == 0
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "rejected").exists()
    card = (tmp_path / "README.md").read_text()
    assert "Rejected" not in card and "No guard rails were set." in card


def test_a_rejected_model_is_kept_until_it_may_be_overwritten(tmp_path):
    test, folder = images(LABELS, seed=1), tmp_path / "run"
    with pytest.raises(GuardRailBroken):
        purify(ruinous(folder), test, guard=GuardArguments())
    card = (folder / "rejected" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"another run \(rejected/purification.json\): .* --overwrite_output_dir"):
        ruinous(folder)
    assert (folder / "rejected" / "README.md").read_text() == card
    with pytest.raises(GuardRailBroken):
        purify(ruinous(folder, overwrite_output_dir=True, seed=7), test, guard=GuardArguments())
    assert "| `seed` | `7` |" in (folder / "rejected" / "README.md").read_text() and "| `seed` | `7` |" not in card
    harmless = dict(max_steps=1, overwrite_output_dir=True)
    purify(trainer_of(folder, images(LABELS), **harmless), test, guard=GuardArguments())
    assert (folder / "model.safetensors").is_file() and not (folder / "rejected").exists()


def test_a_folder_that_holds_no_rejected_model_stays(tmp_path):
    (tmp_path / "rejected").mkdir()
    (tmp_path / "rejected" / "photo.png").write_text("")
    purify(trainer_of(tmp_path, images(LABELS), max_steps=1), images(LABELS, seed=1))
    assert (tmp_path / "rejected" / "photo.png").is_file()


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch):
    for options, way in (
        ({}, "nothing was saved"),
        (dict(save_strategy="steps", save_steps=1), "--resume_from_checkpoint .*-2$"),
    ):
        trainer = trainer_of(tmp_path / str(len(options)), images(LABELS), max_steps=5, **options)
        step, seen = trainer.training_step, []
        monkeypatch.setattr(
            trainer, "training_step", lambda *a, step=step, seen=seen: seen.append(1) or interrupted(seen, step, a)
        )
        with pytest.raises(KeyboardInterrupt, match=way):
            purify(trainer, images(LABELS, seed=1))


def interrupted(seen, step, arguments):
    if len(seen) == 3:
        raise KeyboardInterrupt
    return step(*arguments)


# What a retain set is warned about --------------------------------------------------------------------------------------


def warnings_of(trainer, test, before):
    return retain_warnings(trainer.train_dataset, trainer.model, trainer.preprocessing, test, before, 7)


@pytest.mark.parametrize(
    ("retain", "test", "sharpness", "warning"),
    [
        (images(LABELS), images(LABELS, seed=1), 100, None),
        (images(LABELS[:29]), images(LABELS, seed=1), 100, "fewer than 10 images of 1 of 3 classes: blue (9)"),
        (images(LABELS % 2), images(LABELS, seed=1), 100, "fewer than 10 images of 1 of 3 classes: blue (0)"),
        (images(LABELS, wrong(16)), images(LABELS, wrong(16), 1), 1, "classifies 46.7 % of the 30 images of the retain set"),
        (images(LABELS, wrong(15)), images(LABELS, wrong(15), 1), 1, None),
        (images(LABELS, wrong(4)), images(LABELS, seed=1), 1, "and 100.0 % of the test images: check that size, mean and std"),
        (images(LABELS, wrong(3)), images(LABELS, seed=1), 1, None),
        (images(LABELS, wrong(4)), images(LABELS, wrong(4), 1), 100, "on 13.3 % of the 30 images of the retain set"),
        (images(LABELS, wrong(4)), images(LABELS, wrong(4), 1), 1, None),  # wrong, and not sure of it
        (images(LABELS, wrong(3)), images(LABELS, wrong(3), 1), 100, None),
    ],
)  # fmt: skip
def test_an_unfit_retain_set_is_named(tmp_path, retain, test, sharpness, warning):
    trainer = trainer_of(tmp_path, retain, sharpness)
    before = measure(trainer.model, test, trainer.preprocessing, progress=False)
    found = warnings_of(trainer, test, before)
    assert len(found) == 1 and warning in found[0] and "\n" not in found[0] if warning else found == []


def test_shared_images_are_counted(tmp_path):
    retain, test = images(LABELS), images(LABELS, seed=1)
    test.images[3], test.images[7] = retain.images[0], retain.images[21]
    trainer = trainer_of(tmp_path, retain)
    before = measure(trainer.model, test, trainer.preprocessing, progress=False)
    (found,) = warnings_of(trainer, test, before)
    assert found.startswith("2 of the 30 images of the retain set are also in the test set")


def test_ready_made_samples_are_not_looked_at(tmp_path):
    trainer = trainer_of(tmp_path, [{"pixel_values": torch.zeros(3, 8, 8), "labels": 0}])
    assert warnings_of(trainer, images(LABELS), measured(wrong(0))) == []


def test_batches_are_those_of_the_trainers_evaluation(tmp_path):
    trainer, asked = trainer_of(tmp_path, images(LABELS), max_steps=1, per_device_eval_batch_size=7), []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: asked.append((model.training, len(kwargs["pixel_values"]))), with_kwargs=True
    )
    purify(trainer, images(LABELS, seed=1))
    whole = [7, 7, 7, 7, 2]
    assert [count for training, count in asked if not training] == whole * 3  # before, the retain set, after


def test_warnings_are_logged_and_written_down(tmp_path, caplog):
    retain = images(LABELS[:29])
    with caplog.at_level(logging.WARNING, "d3_hf"):
        purify(trainer_of(tmp_path, retain, max_steps=1), images(LABELS, seed=1))
    (warning,) = json.loads((tmp_path / "purification.json").read_text())["measured"]["warnings"]
    assert "blue (9)" in warning and [record.getMessage() for record in caplog.records if "blue" in record.getMessage()] == [
        warning
    ]
    assert f"\n- {warning}\n" in (tmp_path / "README.md").read_text()


def test_that_the_test_images_cannot_tell_is_logged_and_written_down(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "d3_hf"):
        report = purify(trainer_of(tmp_path, images(LABELS), max_steps=1), images(LABELS, seed=1), guard=GuardArguments())
    (warning,) = report.warnings
    assert warning.startswith("cannot tell with 30 images: ACC fell by 0.0 points, 95 % interval [-11.4, 11.4]")
    assert [record.getMessage() for record in caplog.records if "cannot tell" in record.getMessage()] == [warning]
    assert json.loads((tmp_path / "purification.json").read_text())["measured"]["warnings"] == [warning]
    assert f"\n- {warning}\n" in (tmp_path / "README.md").read_text()
    low, high = report.results["accuracy_drop_ci95"]
    assert report.results["accuracy_drop"] == 0 and report.results["accuracy_drop_p"] == 1 and high == -low > 0.05
    assert "| ACC drop | | 0.0 points [-11.4, 11.4] | 30 |" in (tmp_path / "README.md").read_text()
