"""Resuming: after SIGKILL anywhere, after Ctrl-C, from the last whole checkpoint; always the uninterrupted run's weights."""

import contextlib
import json
import os
import random
import shutil
import signal
from pathlib import Path

import killed
import pytest
import torch
from tiny import tiny_samples, tiny_vit
from transformers.trainer_utils import rotate_checkpoints

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.errors import Terminated
from d3_hf.training.checkpoints import find_damage, last_whole_checkpoint, outdated

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
def uninterrupted(tmp_path_factory):
    """Folders of runs by one and by two processes that nobody kills."""
    root = tmp_path_factory.mktemp("uninterrupted")
    for processes in (1, 2):
        assert killed.attempt(root / str(processes), processes=processes)
    return {processes: root / str(processes) for processes in (1, 2)}


KINDS = [killed.FORWARD, killed.UPDATED, killed.HALF_WRITTEN, "open", "os.rename", "os.rmdir"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_each_kind_of_instant_ends_as_the_uninterrupted_one(uninterrupted, tmp_path, kind):
    instants = [number for number, what in enumerate(killed.ticks_of(uninterrupted[1]), 1) if what == kind]
    (left,) = killed.kill_and_resume(tmp_path / "run", [instants[len(instants) // 2]])
    assert kind != killed.HALF_WRITTEN or left["writing"]
    assert killed.weights_of(tmp_path / "run") == killed.weights_of(uninterrupted[1])


def test_a_kill_while_an_old_checkpoint_goes_leaves_none_half_removed(uninterrupted, tmp_path):
    ticks = enumerate(killed.ticks_of(uninterrupted[1]), 1)
    for instant in [number for number, what in ticks if what == "os.rmdir"]:
        assert not killed.attempt(tmp_path / str(instant), instant)
        assert killed.look(tmp_path / str(instant))["checkpoints"] > 0


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("best", [None, "checkpoint-2", "checkpoint-7"])
def test_the_trainers_own_choice_of_checkpoints_goes(unfinished, limit, best):
    best = best and str(unfinished / best)
    before = set(unfinished.glob("checkpoint-*"))
    found = set(outdated(unfinished, limit, best))
    rotate_checkpoints(str(unfinished), limit, best, use_mtime=True)
    assert found == before - set(unfinished.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 4)])
def test_runs_killed_anywhere_end_as_the_uninterrupted_one(uninterrupted, tmp_path, processes, kills):
    """Every fourth one is killed twice."""
    draw = random.Random(processes)
    ticks = [len(killed.ticks_of(uninterrupted[processes], rank)) for rank in range(processes)]
    for number in range(kills):
        victim, folder = number % processes, tmp_path / str(number)
        instants = [draw.randint(1, ticks[victim]), *([draw.randint(1, ticks[victim] // 2)] if number % 4 == 1 else [])]
        assert killed.kill_and_resume(folder, instants, victim, processes)
        assert killed.weights_of(folder) == killed.weights_of(uninterrupted[processes]), instants


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
    assert last_whole_checkpoint(unfinished) == unfinished / "checkpoint-4"
    resumed = trainer(unfinished)
    resumed.train(resume_from_checkpoint=asked)
    assert (
        find_damage(unfinished / "checkpoint-6") is None and find_damage(unfinished / "checkpoint-7") is None
    )  # written again
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


@pytest.mark.parametrize("place", ["./run", "run//", "."])
def test_the_best_checkpoint_is_found_again_wherever_the_folder_is_said_to_be(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(save_total_limit=1, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, max_steps=4)
    args = D3Config(place, **(OPTIONS | options | dict(metric_for_best_model="accuracy")))
    run = D3Trainer(tiny_vit(), args, tiny_samples(18), tiny_samples(12, seed=1))
    run.train()
    assert ".partial" not in run.state.best_model_checkpoint and find_damage(Path(run.state.best_model_checkpoint)) is None


@pytest.fixture
def interruptible():
    """A shell that starts the tests in the background lets them ignore Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


class Interrupted(D3Trainer):
    """Presses Ctrl-C in the middle of the third step."""

    def optimizer_step(self):
        super().optimizer_step()
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, interruptible):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer(tmp_path, Interrupted).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert str(stopped.value) == (
        f"at step 3: the last whole checkpoint is {checkpoint}: go on with --resume_from_checkpoint {checkpoint}"
    )
    assert signal.getsignal(signal.SIGINT) is before and find_damage(checkpoint) is None
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


@pytest.fixture
def terminable():
    """What the command line makes of SIGTERM."""

    def terminate(number, frame):
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    yield terminate
    signal.signal(signal.SIGTERM, previous)


class TerminatedInside(D3Trainer):
    """Gets SIGTERM in the middle of the third step."""

    def optimizer_step(self):
        super().optimizer_step()
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)


def test_sigterm_saves_and_goes_to_whoever_listened(whole, tmp_path, terminable):
    with pytest.raises(Terminated, match="^at step 3: the last whole checkpoint is .*checkpoint-3: go on with --resume_from"):
        trainer(tmp_path, TerminatedInside).train()
    assert signal.getsignal(signal.SIGTERM) is terminable and find_damage(tmp_path / "checkpoint-3") is None
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint="true")
    assert_same(resumed, whole)


def test_sigterm_without_checkpoints_stops_at_once(tmp_path, terminable):
    with pytest.raises(Terminated, match="at step 2: nothing was saved, since save_strategy is 'no'"):
        trainer(tmp_path, TerminatedInside, save_strategy="no").train()
    assert list(tmp_path.iterdir()) == []


def test_sigterm_that_nobody_else_waits_for_ends_the_process_once_it_has_saved(tmp_path):
    run = trainer(tmp_path, TerminatedInside)
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)  # the threads of the parent are not here
        with contextlib.suppress(BaseException):
            run.train()
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("asked", [True, "true"])
def test_a_job_that_was_put_back_before_its_first_checkpoint_begins_from_the_start(whole, tmp_path, asked, capsys):
    requeued = trainer(tmp_path / "run")
    requeued.train(resume_from_checkpoint=asked)
    assert f"{tmp_path / 'run'} holds no checkpoint yet: the run begins from the start" in capsys.readouterr().out
    assert_same(requeued, whole)


class InterruptedBefore(D3Trainer):
    """Presses Ctrl-C in what comes before the first step, which takes some methods minutes."""

    def start(self):
        super().start()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


def test_ctrl_c_before_the_first_step_stops_at_once(tmp_path, interruptible):
    with pytest.raises(
        KeyboardInterrupt, match="at step 0: there is no whole checkpoint in .*: run it again from the beginning"
    ):
        trainer(tmp_path, InterruptedBefore).train()
