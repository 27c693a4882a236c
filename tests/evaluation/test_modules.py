"""ACC, ASR, RA and PACC as modules of `evaluate`: the package's own functions, without a network."""

from pathlib import Path

import evaluate
import pytest

import d3_hf.evaluation.modules
from d3_hf.evaluation.metrics import Proportion

LABELS, PREDICTIONS = [0, 0, 1, 1, 2, 2, 2], [0, 1, 0, 1, 0, 0, 1]
METRICS = [
    ("accuracy", "Accuracy", {}, Proportion(2, 7)),
    ("attack_success_rate", "AttackSuccessRate", {"target_label": 0}, Proportion(3, 5)),
    ("poisoned_accuracy", "PoisonedAccuracy", {}, Proportion(2, 7)),
    ("robust_accuracy", "RobustAccuracy", {"target_label": 0}, Proportion(1, 5)),
]


@pytest.mark.parametrize(("name", "class_name", "options", "expected"), METRICS)
def test_metric_by_class(tmp_path, name, class_name, options, expected):
    metric = getattr(d3_hf.evaluation.modules, class_name)(cache_dir=str(tmp_path))
    found = metric.compute(predictions=PREDICTIONS, references=LABELS, **options)
    assert found == expected.as_dict(name)


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """One folder for all tests: evaluate imports its copies as one package, whose place Python remembers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.parametrize(("name", "class_name", "options", "expected"), METRICS)
def test_metric_by_path_offline(tmp_path, modules_cache, name, class_name, options, expected):
    metric = evaluate.load(f"{d3_hf.evaluation.modules.METRICS_FOLDER}/{name}", cache_dir=str(tmp_path))
    metric.add_batch(predictions=PREDICTIONS[:4], references=LABELS[:4])
    metric.add_batch(predictions=PREDICTIONS[4:], references=LABELS[4:])
    assert metric.compute(**options) == expected.as_dict(name)
    assert type(metric).__module__.startswith("evaluate_modules.")


def test_metric_files_lie_where_a_user_finds_them():
    for name, *_ in METRICS:
        assert (Path(d3_hf.evaluation.modules.METRICS_FOLDER) / name / f"{name}.py").is_file()
