"""Triggers byte by byte against slow references, and what poisoning touches and leaves alone."""

import hashlib
import math
from fractions import Fraction

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from d3_hf.attacks import SIG, BadNets, Blended, poison, poison_dataset, select_poisoned
from d3_hf.attacks.blended import cartoon, noise
from d3_hf.data.images import RawImages
from d3_hf.data.labels import retain_indices

# DATA.md of the NAD victims: rows and columns counted from the bottom-right pixel.
NAD_WHITE = {(-1, -1), (-1, -3), (-2, -2), (-3, -1)}
NAD_BLACK = {(-1, -2), (-2, -1), (-2, -3), (-3, -2), (-3, -3)}
ALL = [BadNets(), BadNets(pattern="checker"), Blended(), Blended(pattern="noise"), SIG()]
IDS = ["badnets", "badnets-checker", "blended", "blended-noise", "sig"]


def pixels(count: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def raw_images(count: int = 200, classes: int = 10, size: int = 16) -> RawImages:
    labels = torch.arange(count) % classes
    return RawImages(images=pixels(count, size, size), labels=labels, class_names=[str(c) for c in range(classes)])


def lit_badnets(pattern: str, from_bottom: int, from_right: int) -> bool:
    """Whether a patch pixel is lit, counted from its bottom-right pixel (0, 0)."""
    if pattern == "solid":
        return True
    if pattern == "checker":
        return (from_bottom + from_right) % 2 == 0
    return (-1 - from_bottom, -1 - from_right) in NAD_WHITE


def slow_badnets(image: np.ndarray, attack: BadNets, scale: int, top: int, left: int) -> np.ndarray:
    result = image.copy()
    side = attack.size * scale
    for row in range(side):
        for column in range(side):
            lit = lit_badnets(attack.pattern, (side - 1 - row) // scale, (side - 1 - column) // scale)
            for channel in range(3):
                result[channel, top + row, left + column] = attack.color[channel] if lit else 0
    return result


@pytest.mark.parametrize(
    ("attack", "height", "width", "scale", "top", "left"),
    [
        (BadNets(), 32, 32, 1, 29, 29),
        (BadNets(), 64, 64, 2, 58, 58),
        (BadNets(), 224, 224, 7, 203, 203),
        (BadNets(), 8, 8, 1, 5, 5),
        (BadNets(), 80, 140, 3, 71, 131),  # 80 / 32 = 2.5 rounds up; the shorter side decides
        (BadNets(pattern="checker", size=4), 32, 32, 1, 28, 28),
        (BadNets(pattern="checker", size=5, color=(255, 0, 10)), 64, 64, 2, 54, 54),
        (BadNets(pattern="nad_grid"), 32, 32, 1, 29, 29),
        (BadNets(pattern="nad_grid"), 224, 224, 7, 203, 203),
        (BadNets(size=2, position="top-left", margin=1), 32, 32, 1, 1, 1),
        (BadNets(size=2, position="top-right", margin=(3, 5)), 64, 64, 2, 6, 50),
        (BadNets(size=2, position="bottom-left", margin=(0, 4)), 32, 40, 1, 30, 4),
        (BadNets(size=16, image_size=224), 224, 224, 1, 208, 208),
        (BadNets(size=32, color=(1, 2, 3)), 32, 32, 1, 0, 0),
    ],
)
def test_badnets_bytes(attack, height, width, scale, top, left):
    images = pixels(2, height, width)
    expected = np.stack([slow_badnets(image, attack, scale, top, left) for image in images.numpy()])
    assert np.array_equal(attack.trigger(images).numpy(), expected)


def test_nad_grid_is_the_published_one():
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    triggered = BadNets(pattern="nad_grid", target_label=5).trigger(grey)
    for row in range(-32, 0):
        for column in range(-32, 0):
            place = (row, column)
            expected = 255 if place in NAD_WHITE else 0 if place in NAD_BLACK else 128
            assert triggered[:, row, column].tolist() == [expected] * 3


@pytest.mark.parametrize("pattern", ["cartoon", "noise"])
@pytest.mark.parametrize("alpha", ["0.1", "0.2", "0.25", "0.3", "1"])
def test_blended_bytes(pattern, alpha):
    image = pixels(1, 20, 32)[0]
    picture = (cartoon if pattern == "cartoon" else noise)(3, 20, 32)
    expected = np.zeros((3, 20, 32), dtype=np.uint8)
    for channel in range(3):
        for row in range(20):
            for column in range(32):
                x, z = int(image[channel, row, column]), int(picture[channel, row, column])
                expected[channel, row, column] = round((1 - Fraction(alpha)) * x + Fraction(alpha) * z)
    triggered = Blended(pattern=pattern, alpha=float(alpha), seed=3).trigger(image)
    assert np.array_equal(triggered.numpy(), expected)


def test_blended_noise_is_the_top_byte_of_the_raw_stream():
    draws = np.random.PCG64([*b"noise", 5]).random_raw(3 * 4 * 6).tolist()
    expected = [draw // 2**56 for draw in draws]
    assert noise(5, 4, 6).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("draw", "digest"),
    [
        (cartoon, "4c51ca81dff3d48b"),
        (noise, "e47afc701f6b3e39"),
    ],
)
def test_pictures_are_the_same_bytes_on_every_machine(draw, digest):
    assert hashlib.sha256(draw(0, 32, 32).numpy().tobytes()).hexdigest()[:16] == digest


def test_cartoon_is_the_same_picture_at_every_size():
    small, large = cartoon(0, 32, 32).float(), cartoon(0, 224, 224).float()
    shrunk = torch.nn.functional.avg_pool2d(large, 7)
    difference = (small - shrunk).abs()  # averages over cells against values at their centres: not equal at edges
    assert difference.mean() < 1 and difference.max() < 16
    assert small.flatten(1).std(dim=1).min() > 20  # a picture, not a flat colour
    neighbours = (small[:, :, 1:] - small[:, :, :-1]).abs().mean()
    assert neighbours < 12 and noise(0, 32, 32).float().diff(dim=2).abs().mean() > 60


@pytest.mark.parametrize("width", [8, 32, 224])
def test_sig_bytes(width):
    images = pixels(2, 8, width)
    expected = images.numpy().astype(int)
    for column in range(width):
        expected[..., column] += round(40 * math.sin(2 * math.pi * column * 6 / width))
    assert np.array_equal(SIG().trigger(images).numpy(), expected.clip(0, 255))


def test_sig_has_the_periods_it_promises():
    grey = torch.full((3, 4, 224), 128, dtype=torch.uint8)
    residual = SIG(frequency=6).trigger(grey)[0, 0].float() - 128
    assert torch.fft.rfft(residual).abs().argmax() == 6
    assert residual.max() == 40 and residual.min() == -40


@pytest.mark.parametrize("attack", ALL, ids=IDS)
@pytest.mark.parametrize("size", [32, 224])
def test_trigger_is_pure_and_the_same_alone_and_in_a_batch(attack, size):
    images = pixels(3, size, size)
    before = images.clone()
    triggered = attack.trigger(images)
    assert torch.equal(images, before)
    assert triggered.dtype == torch.uint8 and triggered.shape == images.shape
    assert triggered.data_ptr() != images.data_ptr()
    for image, expected in zip(images, triggered, strict=True):
        assert torch.equal(attack.trigger(image), expected)
    assert torch.equal(attack.trigger(images[:0]), images[:0])
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(attack.trigger(strided), triggered)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attack", ALL, ids=IDS)
def test_gpu_gives_the_same_bytes(attack):
    images = pixels(3, 224, 224)
    assert torch.equal(attack.trigger(images.cuda()).cpu(), attack.trigger(images))


@pytest.mark.parametrize(("total", "ratio"), [(1000, 0.1), (997, 0.1), (1003, 0.005), (50, 1.0), (50_000, 0.01)])
def test_dirty_label_selects_exactly_the_ratio(total, ratio):
    labels = torch.arange(total) % 10
    chosen = select_poisoned(BadNets(), labels, ratio, seed=0)
    assert chosen.dtype == torch.int64
    assert len(chosen) == len(chosen.unique()) == round(ratio * total)
    assert torch.equal(chosen, chosen.sort().values) and 0 <= chosen[0] and chosen[-1] < total


def test_dirty_label_selection_is_uniform_over_classes_and_places():
    labels = torch.arange(50_000) % 10
    statistics = []
    for seed in range(20):
        chosen = select_poisoned(Blended(target_label=3), labels, 0.1, seed)
        by_class = labels[chosen].bincount(minlength=10).double()
        by_place = (chosen // 5000).bincount(minlength=10).double()
        statistics += [((counts - 500) ** 2 / 500).sum().item() for counts in (by_class, by_place)]
    # Chi-square with 9 degrees of freedom, times 0.9 for drawing without replacement: mean 8.1, 99.99 % below 30.
    assert max(statistics) < 34
    assert 6.5 < np.mean(statistics) < 9.7


def test_selection_is_the_same_on_every_machine():
    labels = torch.arange(40) % 10
    assert select_poisoned(BadNets(), labels, 0.2, seed=0).tolist() == [0, 1, 11, 13, 25, 31, 35, 36]
    assert select_poisoned(SIG(target_label=2), labels, 0.05, seed=0).tolist() == [2, 32]


def test_selection_depends_on_the_seed_and_grows_with_the_ratio():
    labels = torch.arange(1000) % 10
    few, many, other = (
        select_poisoned(BadNets(), labels, ratio, seed).tolist() for ratio, seed in [(0.1, 0), (0.3, 0), (0.1, 1)]
    )
    assert set(few) < set(many)
    assert few != other and len(set(few) & set(other)) < 30  # 10 expected


def test_selection_shares_nothing_with_a_retain_set_of_the_same_seed():
    labels = torch.arange(10_000) % 10
    poisoned = set(select_poisoned(BadNets(), labels, 0.1, seed=0).tolist())
    retained = retain_indices(labels.numpy(), [str(c) for c in range(10)], fraction=0.05, seed=0)
    assert 25 < len(poisoned & set(retained.tolist())) < 75  # 50 expected, standard deviation 6.5


def test_clean_label_selects_target_images_only_and_can_take_them_all():
    labels = torch.arange(1000) % 10
    some = select_poisoned(SIG(target_label=7), labels, 0.04, seed=0)
    assert len(some) == 40 and (labels[some] == 7).all()
    every = select_poisoned(SIG(target_label=7), labels, 0.1, seed=0)
    assert torch.equal(every, (labels == 7).nonzero().flatten())


def test_the_largest_ratio_that_a_refusal_names_works():
    labels = torch.cat([torch.zeros(37, dtype=torch.int64), torch.ones(963, dtype=torch.int64)])
    with pytest.raises(ValueError, match="sig .*of class 0 only.*largest possible ratio is 0.037$"):
        select_poisoned(SIG(), labels, 0.0376, seed=0)
    assert len(select_poisoned(SIG(), labels, 0.037, seed=0)) == 37


@pytest.mark.parametrize("attack", [BadNets(target_label=4), Blended(target_label=4)])
def test_dirty_label_poison_touches_the_chosen_rows_only(attack):
    images = raw_images()
    pixels_before, labels_before = images.images.clone(), images.labels.clone()
    poisoned, indices = poison(images, attack, 0.1, seed=1)
    assert torch.equal(images.images, pixels_before) and torch.equal(images.labels, labels_before)
    assert torch.equal(indices, select_poisoned(attack, images.labels, 0.1, seed=1)) and len(indices) == 20
    rest = torch.ones(200, dtype=torch.bool)
    rest[indices] = False
    assert torch.equal(poisoned.images[rest], pixels_before[rest])
    assert torch.equal(poisoned.labels[rest], labels_before[rest])
    assert torch.equal(poisoned.images[indices], attack.trigger(pixels_before[indices]))
    assert (poisoned.labels[indices] == 4).all()
    assert poisoned.class_names == images.class_names


def test_clean_label_poison_keeps_every_label():
    images = raw_images()
    poisoned, indices = poison(images, SIG(target_label=4), 0.05, seed=1)
    assert len(indices) == 10 and (images.labels[indices] == 4).all()
    assert torch.equal(poisoned.labels, images.labels)
    changed = (poisoned.images != images.images).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, indices)


def test_poison_in_portions_equals_poison_at_once():
    images = raw_images(600, size=8)
    poisoned, indices = poison(images, Blended(), 1.0, seed=0)
    assert len(indices) == 600
    assert torch.equal(poisoned.images, Blended().trigger(images.images))


def test_poison_images_of_different_sizes():
    sizes = [(16, 16), (32, 48), (64, 64), (20, 32)] * 5
    mixed = [pixels(1, *size, seed=i)[0] for i, size in enumerate(sizes)]
    images = RawImages(images=mixed, labels=torch.arange(20) % 4, class_names=list("abcd"))
    poisoned, indices = poison(images, Blended(target_label=1), 0.5, seed=0)
    for index, (before, after) in enumerate(zip(mixed, poisoned.images, strict=True)):
        chosen = index in indices.tolist()
        assert torch.equal(after, Blended(target_label=1).trigger(before) if chosen else before)
        assert poisoned.labels[index] == (1 if chosen else index % 4)


def hf_images(count: int = 40) -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[str(c) for c in range(10)]),
            "index": datasets.Value("int64"),
        }
    )
    images = [Image.fromarray(image) for image in pixels(count).permute(0, 2, 3, 1).numpy()]
    columns = {"image": images, "label": [i % 10 for i in range(count)], "index": list(range(count))}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("attack", [BadNets(target_label=2), SIG(target_label=2)])
def test_poison_dataset_equals_poison_and_is_lossless(attack):
    dataset = hf_images()
    poisoned, indices = poison_dataset(dataset, attack, 0.1, seed=3)
    images = RawImages(images=pixels(40), labels=torch.arange(40) % 10, class_names=[str(c) for c in range(10)])
    expected, expected_indices = poison(images, attack, 0.1, seed=3)
    assert torch.equal(indices, expected_indices) and len(indices) == 4
    found = np.stack([np.array(image) for image in poisoned["image"]]).transpose(0, 3, 1, 2)
    assert np.array_equal(found, expected.images.numpy())
    assert poisoned["label"][:] == expected.labels.tolist()
    assert poisoned["index"][:] == list(range(40))
    assert poisoned.features == dataset.features
    assert dataset["label"][:] == images.labels.tolist()


def test_poison_dataset_leaves_the_bytes_of_other_rows_and_replaces_files(tmp_path):
    Image.fromarray(pixels(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.jpg", quality=50)
    Image.fromarray(pixels(1)[0, 0].numpy()).save(tmp_path / "grey.png")
    files = [str(tmp_path / name) for name in ("photo.jpg", "grey.png")] * 10
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.Dataset.from_dict({"image": files, "label": [0, 1] * 10}, features=features)
    poisoned, indices = poison_dataset(dataset, BadNets(target_label=1), 0.5, seed=0)
    stored = poisoned.cast_column("image", datasets.Image(decode=False))["image"][:]
    for index in range(20):
        clean = torch.from_numpy(np.array(Image.open(files[index]).convert("RGB"))).permute(2, 0, 1)
        if index in indices.tolist():
            found = torch.from_numpy(np.array(poisoned[index]["image"])).permute(2, 0, 1)
            assert torch.equal(found, BadNets().trigger(clean))
            assert poisoned[index]["label"] == 1
        else:
            assert stored[index] == {"bytes": None, "path": files[index]}
            assert poisoned[index]["label"] == index % 2


def test_poison_dataset_ignores_a_transform_on_the_dataset():
    dataset = hf_images().with_transform(lambda batch: {"nothing": [0] * len(batch["label"])})
    poisoned, indices = poison_dataset(dataset, BadNets(), 0.5, seed=0)
    assert {poisoned[i]["label"] for i in indices.tolist()} == {0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: poison(raw_images(), BadNets(), 0.0, 0), r"ratio must lie in \(0, 1\]; got 0.0"),
        (lambda: poison(raw_images(), BadNets(), 1.01, 0), r"ratio must lie in \(0, 1\]; got 1.01"),
        (lambda: poison(raw_images(), BadNets(), -0.1, 0), r"ratio must lie in \(0, 1\]"),
        (lambda: poison(raw_images(), BadNets(), 0.002, 0), "ratio 0.002 of 200 images poisons none"),
        (lambda: poison(raw_images(), BadNets(), 0.1, -1), "seed must be an integer at least 0"),
        (lambda: poison(raw_images(), BadNets(target_label=10), 0.1, 0), "target_label 10 is out of range.*0 to 9"),
        (lambda: poison_dataset(hf_images(), SIG(target_label=10), 0.1, 0), "target_label 10 is out of range"),
        (lambda: poison_dataset(hf_images().remove_columns("label"), SIG(), 0.1, 0), "no ClassLabel column 'label'"),
        (lambda: poison_dataset(hf_images().remove_columns("image"), SIG(), 0.1, 0), "no Image column 'image'"),
        (lambda: poison(raw_images(), SIG(), 0.2, 0), "asks for 40 of 200 images, the class has 20; .* ratio is 0.1$"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
