"""What the Hub reads of a card: data sets that exist, fields that are valid, a library and an example that load the model."""

import re
import subprocess
import sys

import pytest
from networks import NORM, Net
from tiny import FAST, tiny_samples, tiny_timm_vit, tiny_vit
from tiny_encoders import colours, tiny_dinov2, tiny_module, tiny_timm

from d3_hf import FineTuningConfig, FineTuningTrainer, load_classifier
from d3_hf.defenses.encoders.par import PARConfig, PARTrainer
from d3_hf.models import new_model
from d3_hf.models.kinds import is_encoder
from d3_hf.models.library import library_of
from d3_hf.publishing.card import render_card
from d3_hf.publishing.metadata import hub_data
from d3_hf.publishing.report import Report

RATES = {
    f"{key}_{when}{suffix}": value
    for key in ("accuracy", "asr", "ra", "pacc")
    for when in ("before", "after")
    for suffix, value in (("", 0.5), ("_ci95", [0.4, 0.6]), ("_n", 90))
}
TRIGGER = {"name": "badnets", "target_label": 0}


@pytest.mark.parametrize("name", ["digits", "photos", None, "", "my photos", "a/b/c"])
def test_what_is_on_this_machine_alone_is_no_data_set_of_the_hub(name):
    assert hub_data(name) is None and hub_data("uoft-cs/cifar10") == "uoft-cs/cifar10"


def card_of(tmp_path, report, data_source):
    trainer = FineTuningTrainer(tiny_vit(), FineTuningConfig(str(tmp_path), **FAST), tiny_samples(), data_source=data_source)
    trainer.record(report)
    return render_card(trainer.facts(), report.results, "purified").data.to_dict()


def test_the_index_has_one_entry_with_every_rate_its_interval_and_its_trigger(tmp_path):
    where = dict(data="them/data", configuration="small", split="test")
    found = card_of(tmp_path, Report(results=RATES, trigger=TRIGGER, n_images=90, **where), "them/data")
    ((entry,),) = [index["results"] for index in found["model-index"]]
    assert entry["task"] == {"type": "image-classification"} and found["datasets"] == ["them/data"]
    assert entry["dataset"] == {"name": "them/data", "type": "them/data", "config": "small", "split": "test"}
    accuracy, *others = entry["metrics"]
    assert accuracy == {
        "type": "accuracy",
        "value": 0.5,
        "name": "ACC after purification",
        "args": {"images": 90, "ci95": [0.4, 0.6]},
    }
    assert [metric["type"] for metric in others] == ["attack_success_rate", "robust_accuracy", "poisoned_accuracy"]
    assert all(metric["args"] == {"images": 90, "ci95": [0.4, 0.6], "trigger": TRIGGER} for metric in others)


def test_what_is_no_split_of_the_data_set_is_left_out(tmp_path):
    found = card_of(tmp_path, Report(results=RATES, trigger=TRIGGER, data="them/data", split="rest of train"), None)
    assert found["model-index"][0]["results"][0]["dataset"] == {"name": "them/data", "type": "them/data"}
    assert "datasets" not in found


def test_images_of_this_machine_make_no_index(tmp_path):
    found = card_of(tmp_path, Report(results=RATES, trigger=TRIGGER, data="photos", split="test"), "photos")
    assert not found.keys() & {"model-index", "datasets", "model_name"}


# The example ---------------------------------------------------------------------------------------------------------------

MODELS = {  # those that need d3_hf at the end: it stays imported
    "transformers": (tiny_vit, "transformers"),
    "timm": (tiny_timm_vit, "transformers"),
    "encoder": (tiny_dinov2, "transformers"),
    "encoder of timm": (tiny_timm, "transformers"),
    "own": (lambda: new_model(["a", "b", "c"], "resnet20_cifar", [0.5] * 3, [0.5] * 3, 16), "d3_hf"),
    "module": (lambda: load_classifier(Net(3), image_size=16, **NORM), "d3_hf"),
}


USED = {
    "module": "assert model.config.num_labels == 3",
    "encoder": "assert encoder(**image_processor(image, return_tensors='pt')).last_hidden_state.shape[0] == 1",
}


def trainer_of(model, folder):
    if is_encoder(model):
        return PARTrainer(model, PARConfig(str(folder), **FAST), colours(8))
    return FineTuningTrainer(model, FineTuningConfig(str(folder), **FAST), tiny_samples())


def test_a_module_that_is_an_encoder_is_loaded_as_one(tmp_path):
    text = trainer_of(tiny_module(), tmp_path).card().text
    assert 'from d3_hf import load_encoder\n\nmodel = load_encoder("path/to/this/folder", module=YourClass())' in text


def test_the_example_loads_each_kind_of_model_and_needs_no_more_than_its_library(tmp_path):
    """In a process that has not imported d3_hf until an example does."""
    code = ["import sys; from PIL import Image; from networks_of_users import YourClass; image = Image.new('RGB', (16, 16))"]
    (tmp_path / "networks_of_users.py").write_text(NETWORK)
    for name, (make, library) in MODELS.items():
        model = make()
        trainer = trainer_of(model, tmp_path / name)
        trainer.train()
        trainer.save_model()
        text = (tmp_path / name / "README.md").read_text()
        assert library_of(model) == library and f"library_name: {library}\n" in text
        (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
        assert ("d3_hf" in example) == (library == "d3_hf") and "path/to/this/folder" in example
        code.append(example.replace("path/to/this/folder", str(tmp_path / name)))
        code.append(USED[name.split()[0]] if name.split()[0] in USED else "assert len(classify(image)) == 3")
        if library == "transformers":
            code.append("assert 'd3_hf' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NETWORK = '''
from torch import nn


class YourClass(nn.Module):
    """A user's network, as `networks.Net` of three classes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)).relu().mean((2, 3)))
'''
