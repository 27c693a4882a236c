"""Untrained networks of either library: what is refused."""

import pytest
from networks import NAMES, NORM

from d3_hf.models import new_model


@pytest.mark.parametrize("architecture", ["vit", "resnet20_cifar"])
@pytest.mark.parametrize(
    ("names", "norm", "message"),
    [
        (["a", "b", "a"], NORM, "label_names must differ from each other; got a, b, a"),
        (["a"], NORM, "a classifier has at least 2 classes; got num_labels=1"),
        (NAMES, NORM | {"image_mean": [125.0] * 3}, r"image_mean must be three numbers in \[0, 1\]"),
    ],
)
def test_a_new_network_of_either_library_refuses_alike(architecture, names, norm, message):
    with pytest.raises(ValueError, match=message):
        new_model(names, architecture, **norm, image_size=32)
