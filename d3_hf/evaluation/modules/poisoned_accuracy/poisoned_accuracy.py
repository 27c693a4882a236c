"""PACC, the poisoned accuracy, as an ``evaluate`` module; a thin layer over ``d3_hf.evaluation``."""

# One import per line: evaluate reads them with a pattern that takes "import datasets, evaluate" for one package.
import datasets
import evaluate

from d3_hf.evaluation.metrics import poisoned_accuracy

_CITATION = """\
@inproceedings{zhao2026rga,
  title={Don't Shift the Trigger: Robust Gradient Ascent for Backdoor Unlearning},
  author={Zhao, Xingyi and Xie, Tian and Qi, Xiaojun and Xu, Depeng and Yuan, Shuhan},
  booktitle={International Conference on Learning Representations},
  year={2026}
}
"""
_INPUTS = """
Args:
    predictions: classes predicted on triggered images of all classes, the attacker's target among them.
    references: the true classes of the same images.
Returns ``poisoned_accuracy`` in [0, 1], ``poisoned_accuracy_ci95`` (Wilson) and ``poisoned_accuracy_n``.
"""


class PoisonedAccuracy(evaluate.Metric):
    """PACC: the share of triggered images of all classes that are given their true label."""

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="PACC: the share of triggered images of all classes that are given their true label.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict:
        return poisoned_accuracy(predictions, references).as_dict("poisoned_accuracy")
