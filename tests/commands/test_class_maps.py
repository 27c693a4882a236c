"""A model that counts its classes otherwise than the data set: found before the training, and put right by a class map."""

import json
import re

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from pictures import encoded
from tiny import tiny_vit
from torch import nn

from d3_hf import FineTuningConfig, FineTuningTrainer, RawImages, load_classifier, load_images, map_classes, purify
from d3_hf.commands.purify import run

CLASSES = 12
AS_TEXT = sorted(map(str, range(CLASSES)))  # as the folders of whoever trained the model were sorted


class ByGrey(nn.Module):
    """Knows every class, images of one grey level, under the number of its name among names sorted as text."""

    def __init__(self):
        super().__init__()
        self.head, grey = nn.Linear(1, CLASSES), torch.tensor([20 * int(name) / 255 for name in AS_TEXT])
        self.head.weight.data, self.head.bias.data = 2 * grey[:, None], -grey.square()  # the nearest grey level

    def forward(self, pixels):
        return self.head(pixels.mean((1, 2, 3))[:, None])


def split(each, names) -> Dataset:
    labels = [label for label in range(len(names)) for _ in range(each)]
    rows = [{"bytes": encoded(torch.full((8, 8, 3), 20 * label, dtype=torch.uint8).numpy()), "path": None} for label in labels]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": rows, "label": labels}, features=features)


def trainer_of(images, folder):
    model = load_classifier(ByGrey(), image_mean=[0] * 3, image_std=[1] * 3, image_size=8)
    args = FineTuningConfig(str(folder), max_steps=1, use_cpu=True, disable_tqdm=True, learning_rate=1e-4)
    return FineTuningTrainer(model=model, args=args, train_dataset=images["train"])


def test_an_order_that_only_predictions_show_is_refused_with_the_map_that_fits(tmp_path):
    names = [str(number) for number in range(CLASSES)]
    images = load_images(DatasetDict(train=split(3, names), test=split(2, names)))
    trainer = trainer_of(images, tmp_path / "out")
    with pytest.raises(ValueError, match=r"gives 16.7 % of 24 .* and would give 100.0 % if .*--class_map FILE.json") as refused:
        purify(trainer, RawImages.from_dataset(images["test"]))
    assert trainer.state.global_step == 0 and not (tmp_path / "out" / "model.safetensors").exists()
    class_map = json.loads(re.search(r"\{.*\}", str(refused.value))[0])
    assert class_map == {name: AS_TEXT.index(name) for name in names}
    images = map_classes(images, trainer.model.config, class_map)
    report = purify(trainer_of(images, tmp_path / "out"), RawImages.from_dataset(images["test"]))
    assert report.results["accuracy_before"] == 1


def test_the_images_measured_on_have_the_models_classes(tmp_path):
    names = [f"LABEL_{number}" for number in range(CLASSES)]
    trainer = trainer_of(load_images(DatasetDict(train=split(3, names))), tmp_path)
    other = load_images(split(2, [*names, "more"]))
    with pytest.raises(ValueError, match="the dataset has 13 classes"):
        purify(trainer, RawImages.from_dataset(other["train"]))


@pytest.mark.parametrize("class_map", ["names", '{"cat": "feline", "dog": 2, "frog": 1}'])
def test_the_command_line_takes_a_class_map(class_map, tmp_path):
    theirs = ["feline", "frog", "dog"] if class_map.startswith("{") else ["Dog", "Frog", "Cat"]
    model = tiny_vit()
    model.config.id2label, model.config.label2id = dict(enumerate(theirs)), {name: number for number, name in enumerate(theirs)}
    model.save_pretrained(tmp_path / "model")
    model.image_processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, each in (("train", 8), ("test", 3)):
        split(each, ["cat", "dog", "frog"]).to_parquet(tmp_path / "data" / f"{name}.parquet")
    argv = ["--defence", "fine_tuning", "--retain_count", "12", "--max_steps", "1", "--use_cpu", "--max_accuracy_drop", "1"]
    for option, place in (("model_name_or_path", "model"), ("dataset_name", "data"), ("output_dir", "out")):
        argv += [f"--{option}", str(tmp_path / place)]
    with pytest.raises(ValueError, match="--class_map (names|FILE.json)"):
        run(argv)
    if class_map.startswith("{"):
        (tmp_path / "map.json").write_text(class_map)
        class_map = str(tmp_path / "map.json")
    assert run([*argv, "--class_map", class_map])["accuracy_after_n"] == 9


def test_manifest_and_card_say_which_configuration(tmp_path):
    for name in ("small", "large"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part, each in (("train", 8), ("test", 3)):
            split(each, ["cat", "dog", "frog"]).to_parquet(tmp_path / "data" / name / f"{part}.parquet")
    entries = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("small", "large"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    model = tiny_vit()
    for part in (model, model.image_processor):
        part.save_pretrained(tmp_path / "model")
    argv = ["--defence", "fine_tuning", "--retain_count", "12", "--max_steps", "1", "--use_cpu", "--max_accuracy_drop", "1"]
    for option, place in (("model_name_or_path", "model"), ("dataset_name", "data"), ("output_dir", "out")):
        argv += [f"--{option}", str(tmp_path / place)]
    run([*argv, "--dataset_config", "large"])
    measured = json.loads((tmp_path / "out" / "purification.json").read_text())["measured"]
    assert (measured["data"], measured["configuration"], measured["split"]) == ("data", "large", "test")
    assert "Images: data, configuration large (test)." in (tmp_path / "out" / "README.md").read_text()
