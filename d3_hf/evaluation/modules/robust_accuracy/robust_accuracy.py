"""RA, the robust accuracy, as an ``evaluate`` module; a thin layer over ``d3_hf.evaluation``."""

# One import per line: evaluate reads them with a pattern that takes "import datasets, evaluate" for one package.
import datasets
import evaluate

from d3_hf.evaluation.metrics import robust_accuracy

_CITATION = """\
@inproceedings{wu2022backdoorbench,
  title={BackdoorBench: A Comprehensive Benchmark of Backdoor Learning},
  author={Wu, Baoyuan and Chen, Hongrui and Zhang, Mingda and Zhu, Zihao and Wei, Shaokui and Yuan, Danni and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}
"""
_INPUTS = """
Args:
    predictions: classes predicted on triggered images.
    references: the true classes of the same images; those of the target class are left out.
    target_label: the class that the attacker wants.
Returns ``robust_accuracy`` in [0, 1], ``robust_accuracy_ci95`` (Wilson) and ``robust_accuracy_n``.
"""


class RobustAccuracy(evaluate.Metric):
    """RA: the share of triggered images of other classes that are given their true label."""

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="RA: the share of triggered images of other classes that are given their true label.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions: list[int], references: list[int], target_label: int) -> dict:
        return robust_accuracy(predictions, references, target_label).as_dict("robust_accuracy")
