"""A Trainer that a kill, a full disk, Ctrl-C or SIGTERM costs nothing but the steps since its last checkpoint."""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import SAFE_WEIGHTS_NAME

from ..files import PARTIAL, atomic_folder, disk_errors, flush
from .checkpoints import advise_resuming, begins_anew, checkpoints_in, move_away, outdated, seal, to_resume_from
from .state import read_state, write_state

STATE = "trainer_state.json"


class DurableTrainer(Trainer):
    """A `Trainer` whose files appear whole, which resumes from whole checkpoints only and saves one when it is interrupted.

    A subclass says what the files are (`write_files`) and what else a run must remember (`resume_state`, `load_resume_state`).

    Attributes:
        is_writing_checkpoint: Whether what is saved now is a checkpoint's.
    """

    last_file = "config.json"  # of a model's folder: removed first and written last
    replaced_files: tuple[str, ...] = ("model*.safetensors", "model*.safetensors.index.json")
    is_writing_checkpoint = False

    # What a subclass overrides -----------------------------------------------------------------------------------------

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Write the model and what belongs to it into a folder; called by the process that saves."""
        self.model.save_pretrained(folder, state_dict=state_dict)

    def load_weights(self, folder: Path) -> None:
        """Load a checkpoint exactly: the Trainer's own skips, with a warning, every key renamed since (all of ViT's)."""
        load_weights(self.model, folder)

    def resume_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond weights, optimizer, schedule and random state: tensors and JSON-able values."""
        return {}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Go on from what `resume_state` returned, its tensors on the CPU; called before the weights are loaded.

        Raises:
            ValueError: The run cannot go on from there; the message goes on after the checkpoint's name.
        """

    # Training ----------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As the base class.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last whole one in ``output_dir``, which begins anew
                where there is none yet: a job that was put back into the queue says so whether it had begun or not.
            trial: See `Trainer.train`.
            ignore_keys_for_eval: See `Trainer.train`.

        Raises:
            ValueError: The checkpoint is damaged; or there are checkpoints in ``output_dir`` and the run neither resumes nor
                overwrites.
            OSError: A checkpoint cannot be written; those before it stay.
            KeyboardInterrupt: After Ctrl-C, with a message that says how to go on; where there are checkpoints and one process,
                once the step is done and saved. So it is with SIGTERM, which then goes to whoever listened for it before.
        """
        output_dir = Path(self.args.output_dir)
        checkpoint = to_resume_from(self.asked_checkpoint(resume_from_checkpoint), output_dir)
        if checkpoint is None and self.state.global_step == 0:
            self._clear(checkpoints_in(output_dir))
        callback = _SaveWhenInterrupted(self)
        self.add_callback(callback)
        try:
            result = super().train(checkpoint, trial, ignore_keys_for_eval)
            if callback.asked:  # after the last step
                callback.stop()
            return result
        except KeyboardInterrupt as stop:
            raise type(stop)(f"at step {self.state.global_step}: {self._how_to_go_on()}") from None
        finally:
            callback.stop_listening()
            self.remove_callback(callback)

    def asked_checkpoint(self, asked: str | bool | None) -> str | bool | None:
        """What is asked to go on from; None, and a line, where that is the last checkpoint of a folder without any."""
        if not begins_anew(asked, Path(self.args.output_dir)):
            return asked
        self.accelerator.print(f"{self.args.output_dir} holds no checkpoint yet: the run begins from the start")
        return None

    def _clear(self, old: list[Path]) -> None:
        if old and not self.args.overwrite_output_dir:
            raise ValueError(
                f"output_dir {self.args.output_dir} holds {old[0].name} of another run: go on with it by "
                "--resume_from_checkpoint true, or add --overwrite_output_dir to begin anew"
            )
        if self.args.should_save and old:
            beside = Path(self.args.output_dir) / PARTIAL
            shutil.rmtree(beside, ignore_errors=True)  # what a killed run left
            move_away(old, beside)
            shutil.rmtree(beside)

    def _how_to_go_on(self) -> str:
        if self.args.save_strategy == SaveStrategy.NO:
            return "nothing was saved, since save_strategy is 'no'"
        return advise_resuming(Path(self.args.output_dir))

    def _run_epoch(self, *args, **kwargs) -> None:
        # Resumed from the checkpoint of its last step, the Trainer would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # Saving ------------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.is_writing_checkpoint:  # it is renamed as a whole
            folder.mkdir(parents=True, exist_ok=True)
            self.write_files(folder, state_dict)
        else:
            with atomic_folder(folder, self.last_file, self.replaced_files, lambda: advise_resuming(folder)) as beside:
                self.write_files(beside, state_dict)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self.is_writing_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        output_dir = Path(self._get_output_dir(trial))
        beside, name = output_dir / PARTIAL, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)  # what a killed run left
        self.accelerator.wait_for_everyone()
        self.is_writing_checkpoint = True
        try:
            with disk_errors(output_dir / name, lambda: advise_resuming(output_dir)):
                super()._save_checkpoint(model, trial)
                best = self.state.best_model_checkpoint
                if best is not None and Path(best) == beside / name:
                    self.state.best_model_checkpoint = str(output_dir / name)
                self.accelerator.wait_for_everyone()  # each process has written its random state
                if self.args.should_save:
                    self.state.save_to_json(str(beside / name / STATE))
                    write_state(self.resume_state(), beside / name)
                    seal(beside / name)
                    if (output_dir / name).exists():
                        os.replace(output_dir / name, beside / "old")
                    os.replace(beside / name, output_dir / name)
                    flush(output_dir)
                    best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
                    move_away(outdated(output_dir, limit, best), beside)
        finally:
            self.is_writing_checkpoint = False
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    # Loading -----------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        state = read_state(folder)
        try:
            self.load_resume_state(state)
        except ValueError as fault:
            raise ValueError(f"{folder} {fault}") from None
        self.load_weights(folder)

    def _load_best_model(self) -> None:
        self.load_weights(Path(self.state.best_model_checkpoint))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint into a model, every one of them."""
    state = load_file(folder / SAFE_WEIGHTS_NAME)
    if state.keys() != model.state_dict().keys():
        state = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True).state_dict()
    model.load_state_dict(state, strict=True)


class _SaveWhenInterrupted(TrainerCallback):
    """On Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops; a second one stops at once.

    Several processes are interrupted at different steps and cannot save together: there, where there are no checkpoints, and
    before the first step, which may be minutes away, the first one stops at once.
    """

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer
        self.asked: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}  # handlers

    def on_step_begin(self, args, state, control, **kwargs):
        saves = args.save_strategy != SaveStrategy.NO and args.world_size == 1
        if saves and not (self._previous or self.asked) and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number, frame) -> None:
        self.asked = number
        self.stop_listening()
        print("Interrupted: the step is finished and saved first; once more stops at once")

    def stop_listening(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not one of Python's
        self._previous = {}

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            self.trainer._save_checkpoint(self.trainer.model)
            self.stop()

    def stop(self) -> NoReturn:
        """Hand the signal on to whoever listened before, as a rule by raising; SIGTERM to nobody ends the process."""
        signal.raise_signal(self.asked)
        raise KeyboardInterrupt
