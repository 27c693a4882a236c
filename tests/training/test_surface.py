"""What else a user of `Trainer` touches: it works as there, or is refused at the start."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import FAST, PROCESSOR, SGD, tiny_resnet, tiny_samples, tiny_vit
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from d3_hf import D3Config, D3Trainer, FineTuningConfig, FineTuningTrainer, load_classifier

SAMPLES = tiny_samples()


def trainer(folder, model=None, arguments=None, **options):
    args = FineTuningConfig(str(folder), **({"per_device_train_batch_size": 4, "learning_rate": 0.1} | FAST | options))
    return FineTuningTrainer(model or tiny_vit(), args, SAMPLES, SAMPLES, **(arguments or {}))


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True .* set per_device_train_batch_size"),
        ({"bf16_full_eval": True}, "an evaluation would leave the weights rounded; bf16=True"),
        ({"fp16_full_eval": True}, "an evaluation would leave the weights rounded; fp16=True"),
        ({"label_names": ["label"]}, "batches name their labels `labels`"),
        ({"remove_unused_columns": True}, "the trainer takes what it needs of the columns"),
        ({"train_sampling_strategy": "group_by_length"}, "images have no lengths; use random or sequential"),
        ({"train_sampling_strategy": "batch_rebalance"}, "images have no lengths; use random or sequential"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **option)
    assert not (tmp_path / "run").exists()


def test_another_loss_or_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func has no place: the defence computes its own loss"):
        trainer(tmp_path, arguments={"compute_loss_func": F.cross_entropy})
    with pytest.raises(ValueError, match="args is a TrainingArguments, which lacks the defence's options: pass a D3Config"):
        D3Trainer(tiny_vit(), TrainingArguments(str(tmp_path), use_cpu=True), SAMPLES)
    with pytest.raises(ValueError, match="hyperparameter_search makes models by model_init"):
        trainer(tmp_path).hyperparameter_search(n_trials=1)


def test_optimizers_of_ones_own_step(tmp_path):
    found = []
    for name in ("own", "by class"):
        model = tiny_vit()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        by_class = {"optimizer_cls_and_kwargs": (torch.optim.Adam, {"lr": 0.01})}
        arguments = {"own": {"optimizers": (optimizer, schedule)}, "by class": by_class}
        made = trainer(tmp_path, model, arguments[name], lr_scheduler_type="constant")
        made.train()
        assert isinstance(made.optimizer.optimizer, torch.optim.Adam)
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_a_compiled_network_takes_the_same_steps(tmp_path):
    found = []
    for option in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        args = D3Config(str(tmp_path), learning_rate=0.01, overwrite_output_dir=True, **FAST, **option)
        made = D3Trainer(tiny_resnet(), args, SAMPLES)
        made.train()
        made.save_model()
        found.append(load_classifier(tmp_path).state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


def test_metrics_of_ones_own(tmp_path):
    seen = {}

    def metrics(prediction):
        seen.update(predictions=prediction.predictions, inputs=prediction.inputs, losses=prediction.losses)
        return {"right": float((prediction.predictions == prediction.label_ids).mean())}

    arguments = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1), "compute_metrics": metrics}
    made = trainer(tmp_path, arguments=arguments, include_for_metrics=["inputs", "loss"], metric_for_best_model="right")
    found = made.evaluate()
    assert seen["predictions"].shape == (16,) and seen["inputs"].shape == (16, 3, 16, 16) and len(seen["losses"]) == 16
    del arguments["compute_metrics"]
    assert trainer(tmp_path, arguments=arguments).evaluate()["eval_accuracy"] == found["eval_right"]
    assert "eval_accuracy" not in trainer(tmp_path, arguments={"compute_metrics": None}).evaluate()


def test_hidden_states_beside_the_logits(tmp_path):
    model = tiny_vit()
    plain = trainer(tmp_path, model).evaluate()["eval_accuracy"]
    made = trainer(tmp_path, model, eval_strategy="steps", eval_steps=1)
    model.config.output_hidden_states = True  # by hand; what it was is settled when the trainer is made
    assert made.evaluate()["eval_accuracy"] == plain
    assert len(made.predict(SAMPLES).predictions) == 2
    made.train(ignore_keys_for_eval=["hidden_states"])
    assert isinstance(made.predict(SAMPLES, ignore_keys=["hidden_states"]).predictions, np.ndarray)


def test_the_loss_of_a_batch_by_hand(tmp_path):
    made = trainer(tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    labels = batch["labels"].clone()
    loss, outputs = made.compute_loss(made.model, dict(batch), return_outputs=True)
    torch.testing.assert_close(loss, F.cross_entropy(outputs.logits, labels))
    torch.testing.assert_close(made.compute_loss(made.model, dict(batch)), loss)


class Heard(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(state.global_step)

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.events.append("predicted")


def test_callbacks_and_evaluation_at_the_start(tmp_path):
    heard = Heard()
    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 20, "learning_rate": 3.0} | SGD
    made = trainer(tmp_path, arguments={"callbacks": [heard, EarlyStoppingCallback(2)]}, **(options | best))
    made.train()
    made.predict(SAMPLES)
    steps = made.state.global_step
    assert heard.events == [*range(steps + 1), "predicted"] and steps == made.state.best_global_step + 2 < 20


def test_saving_elsewhere(tmp_path):
    made = trainer(tmp_path / "run")
    made.train()
    made.save_model(str(tmp_path / "elsewhere"))
    assert torch.equal(weights(load_classifier(tmp_path / "elsewhere")), weights(made.model))
    assert not (tmp_path / "run").exists()


def test_saving_does_not_replace_the_suspicious_model(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path / "suspicious")
    PROCESSOR.save_pretrained(tmp_path / "suspicious")
    made = trainer(tmp_path / "run", load_classifier(tmp_path / "suspicious"))
    made.train()
    with pytest.raises(ValueError, match="is where the suspicious model lies, which must stay"):
        made.save_model(str(tmp_path / "suspicious"))
    assert torch.equal(weights(load_classifier(tmp_path / "suspicious")), weights(model))
