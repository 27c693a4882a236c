"""The files beside a manifest: which may lie there, that no run leaves those of another, that all evidence goes up."""

import pytest
from every_defence import NETWORKS
from launched_defences import run
from safetensors.torch import save_file
from tiny import FAST, NEW_VIT, tiny_samples, tiny_vit
from tiny_trained import weights

from d3_hf import attacks
from d3_hf.defenses import DEFENCES, defence
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.models import new_model
from d3_hf.publishing.hub import published_files, push_folder
from d3_hf.publishing.manifest import MANIFEST, MODEL_FILES, PICTURES, PUBLISHED, VICTIM_FILE
from d3_hf.training.trainer import PurifyTrainer
from d3_hf.victims import train
from d3_hf.victims.sets import make_victim

WRITE_MORE = [name for name in DEFENCES if defence(name)[1].write_files is not PurifyTrainer.write_files]


def names_in(folder):
    return {file.name for file in folder.iterdir() if file.is_file()}


def test_a_run_that_overwrites_leaves_no_file_of_the_run_before(tmp_path):
    (tmp_path / "used").mkdir()
    for pattern in MODEL_FILES:
        (tmp_path / "used" / pattern.replace("*", "00001")).write_text("of another model")
    (tmp_path / "used" / "notes.txt").write_text("the user's own")
    for name in ("new", "used"):
        # timm's processor is in config.json: no preprocessor_config.json takes the old one's place.
        model = new_model(["a", "b", "c"], "resnet20_cifar", [0.5] * 3, [0.5] * 3, 16)
        args = FineTuningConfig(str(tmp_path / name), overwrite_output_dir=True, **FAST)
        trainer = FineTuningTrainer(model, args, tiny_samples())
        trainer.train()
        trainer.save_model()
    assert names_in(tmp_path / "used") == names_in(tmp_path / "new") | {"notes.txt"}
    assert "of another model" not in "".join(f.read_text() for f in (tmp_path / "used").iterdir() if f.suffix != ".safetensors")


def test_a_victim_in_place_of_a_purified_model_is_not_pushed_as_one(tmp_path):
    trainer = D3Trainer(tiny_vit(), D3Config(str(tmp_path), **FAST), tiny_samples())
    trainer.train()
    trainer.save_model()
    images = {"dataset_name": "digits", "retain_count": 60, "max_test_images": 40}
    make_victim([], NEW_VIT | images | FAST | {"attack": "badnets", "output_dir": str(tmp_path), "overwrite_output_dir": True})
    with pytest.raises(FileNotFoundError, match=f"holds no {MANIFEST}: it is no folder of a purified model"):
        push_folder(tmp_path, "me/model")


@pytest.mark.parametrize("name", WRITE_MORE)
def test_all_that_a_defence_adds_goes_up(name, tmp_path):
    make = NETWORKS[name]
    save_file(weights(make), tmp_path / f"{make.__name__}.safetensors")
    trainer = run(tmp_path, name, 8)
    trainer.save_model()
    folder = tmp_path / "run"
    assert {file.name for file in published_files(folder)} == names_in(folder)
    added = {name for name in names_in(folder) if name.endswith(".safetensors")} - {"model.safetensors"}
    assert all(name in (folder / MANIFEST).read_text() for name in added)


def test_of_a_victim_its_record_and_its_attack_stay_at_home():
    at_home = {train.VICTIM_FILE, attacks.ATTACK_FILE, attacks.LEARNED_FILE, "processor_config.json"}
    assert set(MODEL_FILES) - set(PUBLISHED) - set(PICTURES) == at_home and train.VICTIM_FILE == VICTIM_FILE
