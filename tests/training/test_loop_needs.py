"""Networks whose last feature map is one pixel, where BatchNorm cannot normalise one image alone."""

import pytest
import torch
from every_defence import OPTIONS
from networks import Net
from tiny import FAST, SIZE, tiny_resnet, tiny_samples, tiny_vit, with_processor
from torch import nn
from transformers import CLIPConfig, CLIPForImageClassification

from d3_hf.data.images import RawImages
from d3_hf.data.retain import rows_of_batches
from d3_hf.defenses import defence
from d3_hf.defenses.shared.staged import StagedTrainer
from d3_hf.models import load_classifier
from d3_hf.training.config import PurifyConfig
from d3_hf.training.loop_needs import expect_unused_parameters, leaves_one_image

NAMES, NORM = ["a", "b", "c"], {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class OnePixel(nn.Module):
    """Stages of 8x8, 4x4 and 1x1 pixels with BatchNorm in each."""

    def __init__(self):
        super().__init__()
        self.one, self.one_norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.two, self.two_norm = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.three, self.three_norm = nn.Conv2d(8, 8, 4), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.one_norm(self.one(x)).relu()
        x = self.two_norm(self.two(x)).relu()
        return self.head(self.three_norm(self.three(x)).relu().flatten(1))


def model(kind=OnePixel):
    torch.manual_seed(0)
    return load_classifier(kind(), label_names=NAMES, image_size=16, **NORM)


def pictures(count):
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 60, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[torch.arange(count), labels] += 180
    return RawImages(pixels, labels, NAMES)


def trainer(name, folder, count=9, **options):
    config_class, trainer_class = defence(name)
    options = {"disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 8} | OPTIONS.get(name, {}) | options
    return trainer_class(model(), config_class(str(folder), **options), pictures(count))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("d3", {}),
        ("fine_tuning", {"gradient_accumulation_steps": 2}),
        ("fine_tuning", {"average_last": 0.9, "num_train_epochs": 3}),
        ("sau", {"batch_norm": "train"}),
        ("ibau", {}),
        ("nad", {}),
        ("tsbd", {"count": 11, "unlearn_accuracy": 0.9}),
        ("ft_sam", {}),
    ],
)
def test_a_last_batch_of_one_image_is_no_end(name, options, tmp_path, capsys):
    run = trainer(name, tmp_path, **options)
    run.train()
    assert run.state.global_step > 0
    leaves_one = run.args.batch_norm == "train" and len(run.train_dataset) == 9
    assert run.drops_last == leaves_one and ("9 images in batches of 8 leave one" in capsys.readouterr().out) == leaves_one
    assert not run.args.dataloader_drop_last


def test_every_other_image_is_trained_on(tmp_path):
    seen = [batch["labels"].shape[0] for batch in trainer("d3", tmp_path, count=17).get_train_dataloader()]
    assert seen == [8, 8]
    seen = [batch["labels"].shape[0] for batch in trainer("d3", tmp_path, count=18).get_train_dataloader()]
    assert seen == [8, 8, 2]


def test_where_one_image_can_be_normalised_none_is_left_out(tmp_path):
    config_class, trainer_class = defence("d3")
    args = config_class(str(tmp_path), per_device_train_batch_size=8, **FAST)
    net = load_classifier(Net(classes=3), label_names=NAMES, image_size=16, **NORM)
    run = trainer_class(net, args, pictures(9))
    assert [len(batch["labels"]) for batch in run.get_train_dataloader()] == [8, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size is 1: give more, or set batch_norm to eval"),
        ({"count": 1}, "there is 1 image: give more"),
    ],
)
def test_batches_that_are_all_of_one_image_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"cannot normalise one image of 16x16 pixels alone, and {message}"):
        trainer("fine_tuning", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    trainer("fine_tuning", tmp_path / "run", batch_norm="eval", **options)


@pytest.mark.parametrize(("even", "leaves"), [(True, False), (False, True)])
def test_several_processes_fill_the_last_batch_up(even, leaves, tmp_path, monkeypatch):
    run = trainer("fine_tuning", tmp_path, accelerator_config={"even_batches": even})
    assert run.drops_last
    monkeypatch.setattr(PurifyConfig, "world_size", 2)
    assert leaves_one_image(run) == leaves


@pytest.mark.parametrize(("count", "size"), [(9, 8), (8, 8), (1, 8), (3, 1), (17, 4), (5, 2)])
def test_rows_come_once_and_never_alone(count, size):
    rows = rows_of_batches(count, size)
    assert sum(rows, []) == list(range(count))
    assert all(1 < len(batch) <= size + 1 for batch in rows) or size == 1 or count == 1


@pytest.mark.parametrize(("tune", "size"), [(5, 2), (3, 2), (4, 3), (7, 128), (9, 4)])
def test_tuning_images_never_come_alone(tune, size):
    run = StagedTrainer.__new__(StagedTrainer)
    run.tune, run.args = list(range(tune)), type("Args", (), {"per_device_train_batch_size": size})()
    assert min(len(chunk) for chunk in torch.arange(tune).tensor_split(run.tune_batches_per_epoch())) > 1


def clip():
    layers = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = CLIPConfig(vision_config=layers | dict(image_size=SIZE, patch_size=8), text_config=layers | dict(vocab_size=9))
    config.num_labels = 3
    return with_processor(CLIPForImageClassification(config))


@pytest.mark.parametrize(("make", "unused"), [(clip, True), (tiny_vit, False), (tiny_resnet, False)])
def test_ddp_looks_for_unused_parameters_where_there_are_some(make, unused, tmp_path, monkeypatch):
    config_class, trainer_class = defence("fine_tuning")
    run = trainer_class(make(), config_class(str(tmp_path), **FAST), tiny_samples())
    assert run.accelerator.ddp_handler.find_unused_parameters is False  # one process has no use for it
    monkeypatch.setattr(PurifyConfig, "world_size", 2)
    expect_unused_parameters(run)
    assert run.accelerator.ddp_handler.find_unused_parameters == run.args.ddp_find_unused_parameters == unused
