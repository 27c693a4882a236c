"""Every defence on two processes: both end with the same weights, most of them with those of one process."""

import pytest
import torch
from every_defence import NETWORKS
from launched_defences import run
from processes import launch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_trained import weights

from d3_hf.defenses import DEFENCES

# The others draw or count per process.
EQUAL = ("d3", "fine_tuning", "base_tuning", "linear_probing", "ft_sam", "fst", "tsc", "fine_pruning", "nad")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defences")
    for make in set(NETWORKS.values()):
        save_file(weights(make), folder / f"{make.__name__}.safetensors")
    launch("launched_defences.py", folder, timeout=300)
    return folder


@pytest.mark.parametrize("name", DEFENCES)
def test_every_defence_runs_on_two_processes(two_processes, name):
    with safe_open(two_processes / f"{name}.safetensors", "pt") as found:
        assert found.metadata() == {"processes": "2", "versions": "1"}
        together = {key: found.get_tensor(key) for key in found.keys()}
    victim = load_file(two_processes / f"{NETWORKS[name].__name__}.safetensors")
    assert any(not torch.equal(together[key], victim[key]) for key in victim)
    if name in EQUAL:
        alone = run(str(two_processes), name, 8).model.state_dict()
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
