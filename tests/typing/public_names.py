"""What type checkers make of the public names, used as in the README. `mypy` reads this file; nothing runs it.

`assert_type` fails where a name is `Any`, and an ignore that is not needed is an error too.
"""

from typing import Any, assert_type

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

import d3_hf
from d3_hf import (
    D3Config,
    D3Trainer,
    FineTuningConfig,
    FineTuningTrainer,
    GuardArguments,
    Preprocessing,
    PurifyConfig,
    PurifyTrainer,
    RawImages,
    audit,
    check,
    from_description,
    load_classifier,
    load_encoder,
    load_images,
    measure,
    purify,
    retain_split,
)
from d3_hf.attacks import Attack
from d3_hf.evaluation.measure import Measurement
from d3_hf.inspection.audit import Audit
from d3_hf.inspection.check import Check
from d3_hf.publishing.report import Report

model = load_classifier("path/to/classifier")
assert_type(model, PreTrainedModel)
assert_type(load_encoder("path/to/encoder"), PreTrainedModel)

images = load_images("digits")
assert_type(images, DatasetDict)
retain, rest = retain_split(images["train"], fraction=0.05, seed=0)
assert_type((retain, rest), tuple[Dataset, Dataset])
test = RawImages.from_dataset(images["test"])
assert_type(test, RawImages)

args = D3Config(output_dir="out", lambda_clean=4.0)
assert_type(args.lambda_clean, float | None)
assert_type(args.learning_rate, float | None)
trainer = D3Trainer(model=model, args=args, train_dataset=retain)
assert_type(trainer, D3Trainer)
rival: PurifyTrainer = FineTuningTrainer(model=model, args=FineTuningConfig(output_dir="out"), train_dataset=retain)
configs: list[type[PurifyConfig]] = [D3Config, FineTuningConfig]

attack = from_description({"name": "badnets"})
assert_type(attack, Attack)
assert_type(trainer.preprocessing, Preprocessing)
report = purify(trainer, test, attack, GuardArguments())
assert_type(report, Report)
assert_type(report.results, dict[str, Any])
assert_type(measure(model, test, trainer.preprocessing, attack), Measurement)
assert_type(check(model, test, twins=[model]), Check)
assert_type(audit(model, model, test), Audit)
assert_type(d3_hf.__version__, str)

misspelt = d3_hf.D3Trainr  # type: ignore[attr-defined]
D3Config(output_dir="out", lamda_clean=4.0)  # type: ignore[call-arg]
load_classifier("path/to/classifier", architectur="resnet18")  # type: ignore[call-arg]
retain_split(images["train"], fraction="all")  # type: ignore[arg-type]
