"""ACC, the accuracy on clean images, as an ``evaluate`` module; a thin layer over ``d3_hf.evaluation``."""

# One import per line: evaluate reads them with a pattern that takes "import datasets, evaluate" for one package.
import datasets
import evaluate

from d3_hf.evaluation.metrics import accuracy

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
    predictions: predicted classes.
    references: true classes.
Returns ``accuracy`` in [0, 1], ``accuracy_ci95`` (Wilson) and ``accuracy_n``.
"""


class Accuracy(evaluate.Metric):
    """ACC: the share of images given their true label."""

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="ACC: the share of images given their true label.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict:
        return accuracy(predictions, references).as_dict("accuracy")
