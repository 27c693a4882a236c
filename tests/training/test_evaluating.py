"""`evaluate` and `predict`: what they take, and that every image is measured once and in order."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from forms import COUNT, LABELS, NAMES, PICTURE_FORMS, PIXELS, READY, SAMPLES, SPLITS, images, trainer
from torch.utils.data import TensorDataset

from d3_hf.data.training_images import TrainingImages


@pytest.fixture(scope="module")
def measuring(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("measuring"), images(), {"a": images(), "b": SAMPLES})


@pytest.mark.parametrize(
    "form", ["transform", "mapped", "TensorDataset", "Subset", *(f"picture:{form}" for form in PICTURE_FORMS)]
)  # fmt: skip
def test_evaluate_and_predict_take_what_the_constructor_takes(measuring, form):
    is_picture = form.startswith("picture:")
    data = PICTURE_FORMS[form.removeprefix("picture:")]() if is_picture else READY[form]()
    predicted = measuring.predict(data)
    expected = measuring.eval_dataset["a"].images if is_picture else PIXELS
    pixels = measuring.preprocessing.normalize(expected) if is_picture else expected
    with torch.no_grad():
        logits = measuring.model.eval()(pixel_values=pixels).logits
    np.testing.assert_allclose(predicted.predictions, logits.numpy(), atol=1e-5)
    assert predicted.label_ids.tolist() == LABELS.tolist()
    accuracy = (logits.argmax(1) == LABELS).float().mean().item()
    assert predicted.metrics["test_accuracy"] == pytest.approx(accuracy)
    assert measuring.evaluate(data)["eval_accuracy"] == pytest.approx(accuracy)


def test_a_dict_of_evaluation_sets(measuring):
    own = measuring.evaluate()
    given = measuring.evaluate({"a": images(), "b": TensorDataset(PIXELS, LABELS)}, metric_key_prefix="held_out")
    for name in ("a", "b"):
        assert own[f"eval_{name}_accuracy"] == given[f"held_out_{name}_accuracy"]
        assert own[f"eval_{name}_loss"] == pytest.approx(given[f"held_out_{name}_loss"])
    assert measuring.evaluate("b")["eval_loss"] == pytest.approx(own["eval_b_loss"])
    assert measuring.evaluate(SPLITS)["eval_test_accuracy"] == own["eval_a_accuracy"]
    assert isinstance(measuring.eval_dataset["a"], TrainingImages)


@pytest.mark.parametrize("unlabelled", [images().remove_columns("label"), [{"pixel_values": pixels} for pixels in PIXELS]])
def test_images_without_labels_are_predicted(measuring, unlabelled):
    predicted = measuring.predict(unlabelled)
    labelled = images() if isinstance(unlabelled, Dataset) else SAMPLES
    np.testing.assert_array_equal(predicted.predictions, measuring.predict(labelled).predictions)
    assert predicted.label_ids is None and "test_accuracy" not in predicted.metrics


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made: made.predict(SPLITS), r"test_dataset is a DatasetDict: pass one of its splits, test_dataset\['train'\]"),
        (lambda made: made.evaluate(images(NAMES[::-1])), "class 0 is 'frog' in the dataset and 'cat' in the model"),
        (lambda made: made.evaluate({"x": PIXELS}), r"eval_dataset is a Tensor: pass torch.utils.data.TensorDataset"),
        (lambda made: made.evaluate(images().to_iterable_dataset()), "eval_dataset is measured as a whole"),
    ],
)
def test_what_cannot_be_measured_on_is_named(measuring, call, message):
    with pytest.raises(ValueError, match=message):
        call(measuring)


def test_evaluation_sets_are_checked_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\]: a sample is a dict of pixels"):
        trainer(tmp_path, SAMPLES, {"a": SAMPLES, "b": [{"pixels": 0}]})


def test_no_row_is_left_out_or_moved_whatever_the_training_does(tmp_path):
    options = {"dataloader_drop_last": True, "per_device_eval_batch_size": 5}
    made = trainer(tmp_path, images(), images(), **options)
    assert made.predict(images()).label_ids.tolist() == LABELS.tolist()
    assert len(made.get_eval_dataloader().dataset) == COUNT and len(made.get_eval_dataloader()) == 4
    assert made.args.dataloader_drop_last


def test_persistent_workers_do_not_answer_with_another_data_set(tmp_path):
    made = trainer(tmp_path, images(), dataloader_num_workers=1, dataloader_persistent_workers=True)
    whole, part = made.get_eval_dataloader(images()), made.get_eval_dataloader(images().select(range(4)))
    assert (len(whole.dataset), len(part.dataset)) == (COUNT, 4)


def test_the_best_model_is_chosen_by_one_of_several_sets(tmp_path):
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_a_accuracy"}
    made = trainer(tmp_path, SAMPLES, {"a": images(), "b": SAMPLES}, **options, **best)
    made.train()
    found = [log["eval_a_accuracy"] for log in made.state.log_history if "eval_a_accuracy" in log]
    assert len(found) == 3 and made.state.best_metric == max(found)
    assert made.evaluate("a")["eval_accuracy"] == max(found)


@pytest.mark.parametrize(
    ("evaluated", "options", "message"),
    [
        ({"a": SAMPLES}, {"metric_for_best_model": "accuracy"}, "will not be measured: it can be eval_a_accuracy, eval_a_loss"),
        (SAMPLES, {"metric_for_best_model": "acc"}, "acc will not be measured: it can be eval_accuracy, eval_loss"),
        (None, {"eval_on_start": True}, "eval_on_start measures eval_dataset: pass one"),
    ],
)
def test_an_evaluation_that_would_fail_later_is_refused(tmp_path, evaluated, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, SAMPLES, evaluated, **options)
