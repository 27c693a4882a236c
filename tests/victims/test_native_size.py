"""Victims whose batches are poisoned anew, on a model whose processor enlarges the images: trigger first, then the resize."""

import json

import pytest
import torch
from tiny import CLASSES, FAST, SIZE, tiny_vit
from torchvision.transforms.functional import to_pil_image
from transformers import ViTImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from d3_hf.attacks import InputAware, WaNet, from_description, load_attack
from d3_hf.data.images import RawImages
from d3_hf.victims.plan import VictimPlan
from d3_hf.victims.train import VictimConfig, VictimTrainer, train_victim

CPU = torch.device("cpu")
NATIVE, BATCH = 8, 8  # pixels, images
NAMES = [f"LABEL_{label}" for label in range(CLASSES)]


def enlarging_vit():
    """Its processor enlarges bicubically, as DINOv2's does: on floats that overshoots, on grey levels it is cut off."""
    model = tiny_vit()
    size = {"height": SIZE, "width": SIZE}
    model.image_processor = ViTImageProcessor(size=size, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model


def raw_images(count=32):
    pixels = torch.randint(0, 256, (count, 3, NATIVE, NATIVE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return RawImages(pixels, torch.arange(count) % CLASSES, NAMES)


def config(folder, **options):
    options = {"crop_padding": 1, "horizontal_flip": True, "per_device_train_batch_size": BATCH} | options
    return VictimConfig(output_dir=str(folder), **FAST, **options)


class Watching(VictimTrainer):
    """Keeps every batch as it was before the poisoner and as the model takes it."""

    def training_batch(self, inputs):
        self.seen = getattr(self, "seen", [])
        after = super().training_batch(inputs)
        self.seen.append((inputs["pixel_values"], after["pixel_values"]))
        return after


def watched(attack, train, folder, ratio):
    plan = VictimPlan(attack=attack, poisoner=attack.poisoner(ratio, CLASSES, 0, CPU))
    trainer = Watching(enlarging_vit(), config(folder), train, plan)
    trainer.train()
    assert len(trainer.seen) == 2 and all(before.shape == (BATCH, 3, NATIVE, NATIVE) for before, _ in trainer.seen)
    return trainer


def test_poisoned_pixels_are_those_that_measuring_sees(tmp_path):
    train, attack = raw_images(), WaNet(strength=4, cross_ratio=0)
    train.images = list(train.images)  # of one size all the same
    trainer = watched(attack, train, tmp_path, ratio=1)
    for before, after in trainer.seen:
        for image, found in zip(before, after, strict=True):
            triggered = attack.trigger(image)
            assert not torch.equal(triggered, image)
            assert torch.equal(found, trainer.preprocessing(triggered[None])[0])
            expected = trainer.processing_class(to_pil_image(triggered), return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_loss_reach_the_attacks_own_network_through_the_resize(tmp_path):
    train = raw_images()
    attack = InputAware(mask_steps=1, lambda_div=0).fit(train, None, seed=0)  # no penalty: the loss alone trains the patterns
    trainer = watched(attack, train, tmp_path, ratio=0.25)
    weights = [name for name in attack.learned if name.startswith("pattern") and name.endswith("weight")]
    assert any(not torch.equal(attack.learned[name], trainer.attack.learned[name]) for name in weights)
    for before, after in trainer.seen:  # two poisoned images, two crossed ones, the rest
        assert not torch.equal(after[:4], trainer.preprocessing(before[:4]))
        assert torch.equal(after[4:], trainer.preprocessing(before[4:]))


@pytest.mark.parametrize("name", ["wanet", "bpp", "input_aware"])
def test_a_victim_is_trained_measured_and_written(name, tmp_path):
    train = raw_images()
    attack = from_description({"name": name} | ({"mask_steps": 1} if name == "input_aware" else {}))
    trainer = train_victim(enlarging_vit(), train, train, attack, config(tmp_path))
    assert json.loads((tmp_path / "victim.json").read_text())["measured"]["victim"]["asr_n"] > 0
    assert torch.equal(load_attack(tmp_path).trigger(train.images), trainer.attack.trigger(train.images))


def test_images_of_unequal_sizes_are_refused(tmp_path):
    train = raw_images()
    train.images = [*train.images[1:], torch.zeros((3, NATIVE, NATIVE + 1), dtype=torch.uint8)]
    with pytest.raises(ValueError, match="poisoned at the images' own size, but there are images of 8x8 and 8x9: resize them"):
        train_victim(enlarging_vit(), train, train, WaNet(), config(tmp_path))


def test_an_attack_that_would_get_no_gradient_is_refused_before_the_training(tmp_path):
    model, train = tiny_vit(), raw_images()
    model.image_processor = TimmWrapperImageProcessor(
        {"input_size": (3, SIZE, SIZE), "interpolation": "lanczos", "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}
    )
    attack = InputAware(mask_steps=1).fit(train, None, seed=0)
    plan = VictimPlan(attack=attack, poisoner=attack.poisoner(0.25, CLASSES, 0, CPU))
    with pytest.raises(ValueError, match="no gradient passes the checkpoint's image processor"):
        VictimTrainer(model, config(tmp_path), train, plan)
