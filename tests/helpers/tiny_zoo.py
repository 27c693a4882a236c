"""A zoo of tiny networks on digits, and the file of its grid."""

import yaml
from tiny import FAST, NEW_VIT

from d3_hf.assurance.head_rows import head_rows
from d3_hf.assurance.latent_shift import latent_shift
from d3_hf.victims.sets import make_set

QUICK = {"head_rows": head_rows, "latent_shift": latent_shift}  # signals that train nothing
NETWORK = NEW_VIT | FAST | {"dataset_name": "digits", "retain_count": 60, "max_test_images": 40}
CALIBRATE = {"twin-1": {"seed": 1}, "twin-2": {"seed": 2}}
JUDGE = {
    "twin-3": {"seed": 4},
    "badnets-2": {"seed": 5, "attack": {"name": "badnets", "target_label": 4}},
    "all_to_all-1": {"seed": 6, "attack": {"name": "badnets", "label_map": "all-to-all"}},
}


def make_zoo(folder):
    """Make the models in ``folder / "victims"``; returns ``folder / "zoo.yaml"``."""
    groups = {"zoo-calibrate": CALIBRATE, "zoo-judge": JUDGE, "spare": {"twin-9": {}}}
    content = {name: {"base": NETWORK, "victims": victims} for name, victims in groups.items()}
    content = {"output_dir": str(folder / "victims"), "groups": content}
    (folder / "set.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    make_set(["--set", str(folder / "set.yaml"), "--only", "zoo-*"])
    content = {"output_dir": str(folder / "out"), "dataset_name": "digits", "set": str(folder / "set.yaml")}
    content |= {"victims_dir": str(folder / "victims"), "held_out": 60, "seeds": [0]}
    content |= {"retain": {"80 images": {"count": 80}}}
    (folder / "zoo.yaml").write_text(yaml.safe_dump(content))
    return folder / "zoo.yaml"
