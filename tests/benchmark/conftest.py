"""The grid of the benchmark's tests, and its victims."""

import pytest
import yaml
from tiny import FAST, NEW_VIT

from d3_hf.benchmark import Grid
from d3_hf.victims.sets import make_set

NETWORK = NEW_VIT | {"dataset_name": "digits", "retain_count": 60, "max_test_images": 40}
DEFENCES = {"D3": {"defence": "d3"}, "FT": {"defence": "fine_tuning"}, "RNP": {"defence": "rnp", "num_train_epochs": 1}}


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """Two victims and a twin, two seeds, a defence that refuses a ViT."""
    folder = tmp_path_factory.mktemp("benchmark")
    victims = {"twin": {}, "badnets": {"attack": "badnets"}, "blended": {"attack": "blended"}}
    content = {"output_dir": str(folder / "victims"), "groups": {"vit": {"base": NETWORK | FAST, "victims": victims}}}
    (folder / "victims.yaml").write_text(yaml.safe_dump(content))
    make_set(["--set", str(folder / "victims.yaml")])
    return Grid(
        output_dir=str(folder / "grid"),
        dataset_name="digits",
        victims=["vit/badnets", "vit/blended"],
        victims_dir=str(folder / "victims"),
        defences=DEFENCES,
        retain={"30": {"count": 30}},
        held_out=60,
        seeds=[0, 1],
        test_images=40,
        common={"disable_tqdm": True, "use_cpu": True, "num_train_epochs": 1},
    )
