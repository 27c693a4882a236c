"""S4: patches and their classes, the score against loops, and a network that knows a patch already."""

import numpy as np
import pytest
import torch
from shortcut import CLASSES, TARGET, classifier, network, pictures
from torch.nn.utils import prune

from d3_hf.assurance.canary import canaries_of, canary, patches, soonness, stamped
from d3_hf.assurance.paths import DOWN, path_of, some_of_each
from d3_hf.models.source import preprocessing_of


@pytest.mark.parametrize(("side", "cell"), [(8, 1), (32, 1), (64, 2), (224, 7)])
def test_a_patch_is_a_grid_in_the_corner(side, cell):
    images = torch.randint(0, 256, (6, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, canaries = stamped(images, torch.tensor([0, 1, 2, 3, 4, 0]), 5), 3 * cell
    for row, image in enumerate(found):
        corner = image[:, -canaries:, -canaries:]
        for i in range(3):
            for j in range(3):
                (value,) = corner[:, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].unique().tolist()
                assert value in (0, 255)
        image[:, -canaries:, -canaries:] = images[row][:, -canaries:, -canaries:]
        assert torch.equal(image, images[row])
    assert len({tuple(patch.flatten().tolist()) for patch in patches(10, cell)}) == 10


def test_no_image_gets_the_patch_of_its_own_class():
    labels = torch.arange(48) % CLASSES
    wanted = canaries_of(labels, CLASSES)
    assert not (wanted == labels).any() and wanted.bincount(minlength=CLASSES).min() >= 5
    assert len({(y, k) for y, k in zip(labels.tolist(), wanted.tolist(), strict=True)}) == 48  # no pair twice
    assert canaries_of(torch.tensor([0, 1, 1]), 2).tolist() == [1, 0, 0]


def test_what_has_taken_stays_in_the_score():
    path = np.array([[0.0, 0.1], [0.5, 0.2], [0.9, 0.8]])
    np.testing.assert_allclose(soonness(path, 4), [(0 + 0.5 + 0.9 + 0.9 + 0.9) / 5, (0.1 + 0.2 + 0.8 * 3) / 5])
    np.testing.assert_allclose(soonness(path, 2), path.mean(0))


def test_what_is_read_of_the_path_against_loops():
    images, model = pictures(), classifier(network())
    taken = some_of_each(images, 50)
    wanted = canaries_of(taken.labels, CLASSES)
    pixels = preprocessing_of(model)(stamped(taken.images, wanted, CLASSES))
    found = canary(model, images, steps=4)
    logits = path_of(model, pixels, wanted, DOWN, 4, 48, lambda logits: False)
    for step, means, share in zip(logits, found.details["path"], found.details["taken"], strict=True):
        for k in range(CLASSES):
            under = [step[row].softmax(0)[k].item() for row in range(48) if wanted[row] == k]
            assert means[k] == pytest.approx(sum(under) / len(under), rel=1e-4, abs=1e-9)
        assert share == pytest.approx((step.argmax(1) == wanted).double().mean().item())
    assert found.statistic == found.scores.max() and found.scores.argmax() == found.suspect_class


def test_it_ends_when_the_canaries_have_taken():
    taken = canary(classifier(network()), pictures(), steps=40).details["taken"]
    assert taken[-1] >= 0.8 and (taken[1:-1] < 0.8).all() and len(taken) < 41


def test_a_network_that_knows_a_patch_takes_it_at_once():
    net, images = network(), pictures()
    with torch.no_grad():  # the last unit fires where the patch of TARGET is
        net.head.weight[:, -2] += net.head.weight[:, -1]
        net.head.weight[:, -1], net.body.weight[-1] = 0, 0
        corner = patches(CLASSES, 1)[TARGET].double() / 127.5 - 1
        net.body.weight[-1].view(3, 8, 8)[:, -3:, -3:] = corner
        net.body.bias[-1] = -25  # 27 values agree only there
        net.head.weight[TARGET, -1] = 20
    plain, knowing = canary(classifier(network()), images), canary(classifier(net), images)
    assert knowing.suspect_class == TARGET and knowing.details["path"][0, TARGET] > 0.9
    assert knowing.statistic > 0.9 > plain.statistic


def test_what_cannot_be_planted_is_refused():
    model, images = classifier(network()), pictures()
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        canary(model, images, steps=0)
    prune.random_unstructured(model.network.head, "weight", 1)
    with pytest.raises(ValueError, match="head is pruned by a mask"):
        canary(model, images)
