"""Full disks, unwritable folders, damaged checkpoints, folders of other runs: one line, and nothing good is lost."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from places import RECIPES
from tiny import tiny_samples, tiny_vit
from transformers import modeling_utils

from d3_hf import load_classifier
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.files import atomic_folder, sha256
from d3_hf.models.load import Source
from d3_hf.publishing import hub
from d3_hf.publishing.manifest import arguments_of, public_name, source_facts
from d3_hf.training.checkpoints import checkpoints_in, find_damage

OPTIONS = dict(max_steps=4, per_device_train_batch_size=4, epsilon=0.5, learning_rate=0.05, use_cpu=True, disable_tqdm=True)
SAVING = dict(save_strategy="steps", save_steps=2)


def trainer(folder, model=None, **options):
    return D3Trainer(model or tiny_vit(), D3Config(str(folder), **(OPTIONS | options)), tiny_samples(18))


def contents(folder):
    return {str(f.relative_to(folder)): sha256(f) for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def one_line(error):
    return "\n" not in str(error.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints 2 and 4, and its model."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = trainer(folder, **SAVING)
    run.train()
    run.save_model()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, without the model: as when it was killed at the end."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=lambda where, names: [n for n in names if "README" in n]))


# Checkpoints ---------------------------------------------------------------------------------------------------------------


def truncate(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def flip(checkpoint):
    file = checkpoint / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damaging", "message"),
    [
        (truncate, "model.safetensors is not as it was written"),
        (flip, "optimizer.pt is not as it was written"),
        (lambda checkpoint: (checkpoint / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda checkpoint: (checkpoint / "purification.json").unlink(), "purification.json is missing"),
        (lambda checkpoint: (checkpoint / "whole.json").unlink(), "no whole.json"),
        (lambda checkpoint: (checkpoint / "whole.json").write_text("{"), "whole.json is no JSON"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_damaged_checkpoints_are_refused(run, damaging, message):
    good = contents(run / "checkpoint-2")
    damaging(run / "checkpoint-4")
    with pytest.raises(ValueError, match=message) as refused:
        trainer(run, **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert one_line(refused) and f"go on with --resume_from_checkpoint {run / 'checkpoint-2'}" in str(refused.value)
    assert contents(run / "checkpoint-2") == good


def test_no_whole_checkpoint_at_all(run):
    for checkpoint in checkpoints_in(run):
        truncate(checkpoint)
    with pytest.raises(ValueError, match="run it again from the beginning"):
        trainer(run, **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    with pytest.raises(ValueError, match="holds no whole checkpoint: leave resume_from_checkpoint out"):
        trainer(run, **SAVING).train(resume_from_checkpoint=True)


def test_another_reference_leaves_the_checkpoint_alone(run):
    before = contents(run)
    with pytest.raises(ValueError, match="checkpoint-4 belongs to a run from another model") as refused:
        trainer(run, tiny_vit(seed=1), **SAVING).train(resume_from_checkpoint=True)
    assert one_line(refused) and contents(run) == before


# Full disks ----------------------------------------------------------------------------------------------------------------


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_for_torch(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")  # on a full tmpfs


class FillsUp(D3Trainer):
    """The disk is full from the fourth step on."""

    def optimizer_step(self):
        super().optimizer_step()
        if self.state.global_step == 3:
            self.fill()


def limit(size):
    """No file may grow further: the writers meet a real error, whatever they are written in."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    yield
    limit(before)


@pytest.mark.parametrize("size", [0, 500, 8192, no_space, no_space_for_torch])
def test_full_disk_in_a_checkpoint(tmp_path, monkeypatch, unlimited, size):
    args = D3Config(str(tmp_path / "run"), **(OPTIONS | SAVING))
    run = FillsUp(tiny_vit(), args, tiny_samples(18))
    run.fill = (lambda: monkeypatch.setattr(torch, "save", size)) if callable(size) else lambda: limit(size)
    with pytest.raises(OSError, match="could not be written") as full:
        run.train()
    limit(-1)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert one_line(full) and str(full.value).startswith(f"{tmp_path / 'run' / 'checkpoint-4'} could not be written")
    assert str(full.value).endswith(f"go on with --resume_from_checkpoint {checkpoint}")
    assert find_damage(checkpoint) is None and [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def test_full_disk_at_the_end_keeps_the_old_model(finished, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(folder)
    again = trainer(folder, overwrite_output_dir=True)
    monkeypatch.setattr(modeling_utils, "safe_save_file", no_space)
    with pytest.raises(OSError, match=r"could not be written \(.*No space left.*\): nothing of it was kept") as full:
        again.save_model()
    assert one_line(full) and contents(folder) == before


@pytest.mark.parametrize("instant", range(5))
def test_a_folder_never_holds_half_of_one_model_and_half_of_another(finished, tmp_path, monkeypatch, instant):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an older, sharded model")
    calls = []

    def stop(*paths):
        calls.append(paths)
        if len(calls) > instant:
            raise SystemExit("killed")
        return rename(*paths)

    rename = os.replace
    again = trainer(folder, tiny_vit(seed=1), overwrite_output_dir=True)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(SystemExit):
        again.save_model()
    assert not (folder / "purification.json").exists()
    with pytest.raises(FileNotFoundError) if instant < 4 else monkeypatch.context():
        load_classifier(folder)  # no weights, or the new model's


def test_an_atomic_folder_writes_nothing_when_its_body_fails(tmp_path):
    (tmp_path / "last").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path, "last", [], str) as beside:
        (beside / "last").write_text("new")
        _ = 1 / 0
    assert (tmp_path / "last").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


# Folders -------------------------------------------------------------------------------------------------------------------


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match="cannot be made: .*file is a file"):
            trainer(folder)


def test_unwritable_folder(tmp_path, monkeypatch):
    # By the permission that the system reports: root may write everywhere.
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(PermissionError, match="cannot be written: no permission in") as refused:
        trainer(tmp_path / "run")
    assert one_line(refused) and not (tmp_path / "run").exists()


def test_read_only_source(tmp_path):
    source = tmp_path / "source"
    tiny_vit().save_pretrained(source), tiny_vit().image_processor.save_pretrained(source)
    before = contents(source)
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    run = trainer(tmp_path / "run", load_classifier(source), **SAVING)
    run.train()
    run.save_model()
    source.chmod(0o755)
    assert contents(source) == before and (tmp_path / "run" / "purification.json").is_file()


@pytest.mark.parametrize("place", ["", "rejected"])
def test_the_source_is_not_overwritten(tmp_path, place):
    source = tmp_path / place
    tiny_vit().save_pretrained(source), tiny_vit().image_processor.save_pretrained(source)
    with pytest.raises(ValueError, match="is where the suspicious model lies, which must stay"):
        trainer(tmp_path, load_classifier(source), overwrite_output_dir=True)


def test_results_of_another_run_are_refused(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds the results of another run \(purification.json\).*--overwrite_output_dir"):
        trainer(folder)
    with pytest.raises(ValueError, match="holds the results of another run"):
        trainer(folder, resume_from_checkpoint="false")
    (folder / "purification.json").rename(folder / "victim.json")
    with pytest.raises(ValueError, match=r"another run \(victim.json\)"):
        trainer(folder)
    (folder / "victim.json").rename(folder / "purification.json")
    assert contents(folder) == before
    trainer(folder, resume_from_checkpoint="true")  # goes on with its own
    for checkpoint in checkpoints_in(folder):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="holds the results of another run"):  # it would begin anew
        trainer(folder, resume_from_checkpoint="true")


def test_overwriting_replaces_results_and_checkpoints(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    args = FineTuningConfig(str(folder), max_steps=1, use_cpu=True, disable_tqdm=True, overwrite_output_dir=True)
    run = FineTuningTrainer(tiny_vit(), args, tiny_samples(8))
    run.train()
    run.save_model()
    assert checkpoints_in(folder) == [] and json.loads((folder / "purification.json").read_text())["method"] == "FT"
    assert run.train() and run.save_model() is None  # its own results


def test_checkpoints_of_another_run_are_refused(run):
    before = contents(run)
    with pytest.raises(ValueError, match="holds checkpoint-4 of another run: go on with it by --resume_from_checkpoint true"):
        trainer(run).train()
    assert contents(run) == before


def test_places_are_no_arguments():
    args = D3Config("x", overwrite_output_dir=True, push_to_hub=True, hub_create_pr=True, use_cpu=True)
    assert arguments_of(args) == arguments_of(D3Config("y", use_cpu=True))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        *(("me/model", "me/model"), ("digits", "digits"), ("cosine", "cosine"), ("", "")),
        *(("a/images", "images"), ("./a/images/", "images"), ("a/..", "run"), (".", "run")),
        *(("/home/me/weights.pth", "weights.pth"), ("~/weights.pth", "weights.pth")),
    ],
)
def test_what_is_published_names_no_folder_of_this_machine(tmp_path, monkeypatch, place, name):
    (tmp_path / "run" / "a" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert public_name(place) == name
    model = tiny_vit()
    for kind in ("folder", "file", "module"):
        model.source = Source(kind, place, sha256={"model.safetensors": "0" * 64})
        assert source_facts(model) == {"kind": kind, "name": name, "revision": None, "sha256": model.source.sha256}
    args = D3Config("x", use_cpu=True)
    args.deepspeed = place
    assert arguments_of(args).get("deepspeed", "") == name


def test_a_pickled_source_is_scanned_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "pickle_scan", lambda files: {"scanned": [str(file) for file in files]})
    model = tiny_vit()
    model.source = Source("file", str(tmp_path / "weights.pth"), sha256={"weights.pth": "0" * 64})
    args = FineTuningConfig(str(tmp_path / "run"), use_cpu=True)
    facts = FineTuningTrainer(model, args, tiny_samples(8)).facts()
    assert facts["source_checks"] == {"pickle_scan": {"scanned": [str(tmp_path / "weights.pth")]}}
    assert facts["source"]["name"] == "weights.pth"


def test_fire_drills_can_be_repeated():
    drills = list((RECIPES / "configs").glob("fire_drill*.yaml"))
    assert len(drills) == 4 and all(yaml.safe_load(file.read_text())["overwrite_output_dir"] is True for file in drills)
