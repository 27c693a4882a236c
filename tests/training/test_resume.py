"""Resuming: after SIGKILL anywhere, after Ctrl-C, from the last whole checkpoint; always the uninterrupted run's weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import HELPERS
from tiny import tiny_samples, tiny_vit

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.training.checkpoints import damage, last_whole

OPTIONS = dict(
    max_steps=7, save_strategy="steps", save_steps=2, per_device_train_batch_size=4, epsilon=0.5, learning_rate=0.05,
    use_cpu=True, disable_tqdm=True,
)  # fmt: skip


def trainer(folder, kind=D3Trainer, **options):
    return kind(tiny_vit(), D3Config(str(folder), **(OPTIONS | options)), tiny_samples(18))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with checkpoints at 2, 4, 6 and 7."""
    run = trainer(tmp_path_factory.mktemp("whole") / "run")
    run.train()
    return run


@pytest.fixture
def unfinished(whole, tmp_path):
    """A copy of that run's folder."""
    return Path(shutil.copytree(whole.args.output_dir, tmp_path / "run"))


def assert_same(one, other):
    for (name, got), want in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HELPERS / "killed.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=HELPERS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(("name", "kills"), [("single", 20), ("ddp", 2)])
def test_killed_runs_end_as_the_uninterrupted_one(killed, name, kills):
    report = killed[name]
    assert report["resumed"] == [report["whole"]] * kills
    assert len(report["deaths"]) >= kills


def test_many_were_killed_while_writing(killed):
    writing = [death["writing"] for death in killed["single"]["deaths"]]
    assert sum(writing) >= 8 and not all(writing)


def test_resuming_at_the_last_step_takes_no_further_one(whole, unfinished):
    resumed = trainer(unfinished)
    resumed.train(resume_from_checkpoint=str(unfinished / "checkpoint-7"))
    assert resumed.state.global_step == 7
    assert_same(resumed, whole)


@pytest.mark.parametrize("asked", [True, "true"])
def test_true_is_the_last_whole_one(whole, unfinished, asked):
    for number, keep in ((7, 100), (6, 0)):
        file = unfinished / f"checkpoint-{number}" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
    assert last_whole(unfinished) == unfinished / "checkpoint-4"
    resumed = trainer(unfinished)
    resumed.train(resume_from_checkpoint=asked)
    assert damage(unfinished / "checkpoint-6") is None and damage(unfinished / "checkpoint-7") is None  # written again
    assert_same(resumed, whole)


def test_nothing_partial_stays_and_old_checkpoints_go(tmp_path):
    options = dict(save_total_limit=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    args = D3Config(str(tmp_path), **(OPTIONS | options | dict(metric_for_best_model="accuracy", max_steps=6)))
    run = D3Trainer(tiny_vit(), args, tiny_samples(18), tiny_samples(12, seed=1))
    run.train()
    names = {path.name for path in tmp_path.iterdir()}
    assert "checkpoint-6" in names and len(names) == 2 and ".partial" not in names
    assert Path(run.state.best_model_checkpoint).parent == tmp_path
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == run.state.best_model_checkpoint


@pytest.fixture
def interruptible():
    """A shell that starts the tests in the background lets them ignore Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


class Interrupted(D3Trainer):
    """Presses Ctrl-C in the middle of the third step."""

    def optimizer_step(self, step):
        result = super().optimizer_step(step)
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return result


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, interruptible):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer(tmp_path, Interrupted).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert str(stopped.value) == (
        f"at step 3: the last whole checkpoint is {checkpoint}: go on with --resume_from_checkpoint {checkpoint}"
    )
    assert signal.getsignal(signal.SIGINT) is before and damage(checkpoint) is None
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_ctrl_c_in_the_last_step_is_not_lost(whole, tmp_path, interruptible):
    with pytest.raises(KeyboardInterrupt, match="checkpoint-3"):
        trainer(tmp_path, Interrupted, max_steps=3).train()


def test_ctrl_c_without_checkpoints_says_that_nothing_was_saved(tmp_path, interruptible):
    with pytest.raises(KeyboardInterrupt, match="at step 2: nothing was saved, since save_strategy is 'no'"):
        trainer(tmp_path, Interrupted, save_strategy="no").train()
    assert list(tmp_path.iterdir()) == []
