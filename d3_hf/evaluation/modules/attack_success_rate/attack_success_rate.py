"""ASR, the attack success rate, as an ``evaluate`` module; a thin layer over ``d3_hf.evaluation``."""

# One import per line: evaluate reads them with a pattern that takes "import datasets, evaluate" for one package.
import datasets
import evaluate

from d3_hf.evaluation.metrics import attack_success_rate

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
Returns ``attack_success_rate`` in [0, 1], ``attack_success_rate_ci95`` (Wilson) and ``attack_success_rate_n``.
"""


class AttackSuccessRate(evaluate.Metric):
    """ASR: the share of triggered images of other classes that are classified as the target."""

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="ASR: the share of triggered images of other classes that are classified as the target.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions: list[int], references: list[int], target_label: int) -> dict:
        return attack_success_rate(predictions, references, target_label).as_dict("attack_success_rate")
