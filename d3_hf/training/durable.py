"""A Trainer that a kill, a full disk or Ctrl-C costs nothing but the steps since its last checkpoint."""

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from ..publishing.manifest import REJECTED
from .checkpoints import (
    PARTIAL,
    checkpoints_in,
    flush,
    last_named,
    one_line,
    replace_text,
    results_in,
    seal,
    to_resume_from,
    whole,
)
from .placement.fsdp import InPlace

STATE = "trainer_state.json"


class DurableTrainer(Trainer):
    """A `Trainer` whose files appear whole, which resumes from whole checkpoints only and saves one when it is interrupted.

    A subclass says what the files are: `write_files`, `facts` and `card`.
    """

    manifest_name: str
    plain: nn.Module  # the model as whole, ordinary tensors
    placement: InPlace
    _writing = False  # a checkpoint, which goes into PARTIAL first

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As the base class.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last whole one in ``output_dir``.
            trial: See `Trainer.train`.
            ignore_keys_for_eval: See `Trainer.train`.

        Raises:
            ValueError: The checkpoint is damaged; or there are checkpoints in ``output_dir`` and the run neither resumes nor
                overwrites.
            OSError: A checkpoint cannot be written; those before it stay.
            KeyboardInterrupt: After Ctrl-C, with a message that says how to go on; where there are checkpoints and one process,
                once the step is done and saved.
        """
        output_dir = Path(self.args.output_dir)
        checkpoint = to_resume_from(resume_from_checkpoint, output_dir)
        if checkpoint is None and self.state.global_step == 0:
            self._clear(checkpoints_in(output_dir))
        callback = _SaveWhenInterrupted(self)
        self.add_callback(callback)
        try:
            with callback.listening():
                result = super().train(checkpoint, trial, ignore_keys_for_eval)
            if callback.asked:  # after the last step
                raise KeyboardInterrupt
            return result
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"at step {self.state.global_step}: {self._how_to_go_on()}") from None
        finally:
            self.remove_callback(callback)

    def _clear(self, old: list[Path]) -> None:
        if old and not self.args.overwrite_output_dir:
            raise ValueError(
                f"output_dir {self.args.output_dir} holds {old[0].name} of another run: go on with it by "
                "--resume_from_checkpoint true, or add --overwrite_output_dir to begin anew"
            )
        if self.args.should_save:
            for path in old:
                shutil.rmtree(path)

    def _how_to_go_on(self) -> str:
        if self.args.save_strategy == SaveStrategy.NO:
            return "nothing was saved, since save_strategy is 'no'"
        return last_named(Path(self.args.output_dir))

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None) -> tuple:
        loaded = None if self.placement.resumes else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, loaded)
        self.placement.begin(self, max_steps, resume_from_checkpoint)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the base class."""
        with self.placement.saving(self):
            super().save_model(output_dir, _internal_call)

    def _run_epoch(self, *args, **kwargs) -> None:
        # Resumed from the checkpoint of its last step, the Trainer would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._writing else folder

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        output_dir = Path(self._get_output_dir(trial))
        beside, name = output_dir / PARTIAL, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)  # what a killed run left
        self.accelerator.wait_for_everyone()
        self._writing = True
        try:
            with one_line(output_dir / name, output_dir):
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(beside / name):
                    self.state.best_model_checkpoint = str(output_dir / name)
                self.accelerator.wait_for_everyone()  # each process has written its random state
                if self.args.should_save:
                    self.state.save_to_json(str(beside / name / STATE))
                    seal(beside / name)
                    if (output_dir / name).exists():
                        os.replace(output_dir / name, beside / "old")
                    os.replace(beside / name, output_dir / name)
                    flush(output_dir, files=False)
        finally:
            self._writing = False
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        with whole(folder, self.manifest_name) as beside:
            self.write_files(beside, state_dict)
            (beside / self.manifest_name).write_text(json.dumps(self.facts(), indent=2) + "\n")
            if folder == Path(self.args.output_dir):
                self.card().save(beside / "README.md")
        if folder == Path(self.args.output_dir) and results_in(folder / REJECTED):  # of an earlier run, see `check_output`
            shutil.rmtree(folder / REJECTED)

    def create_model_card(self, model_name: str | None = None, **kwargs) -> None:
        """Write ``README.md``. Arguments other than the title are not used."""
        replace_text(Path(self.args.output_dir) / "README.md", str(self.card(model_name)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, folder: Path) -> None:
        """Load a checkpoint exactly: the Trainer's own skips, with a warning, every key renamed since (all of ViT's)."""
        state = load_file(folder / SAFE_WEIGHTS_NAME)
        if state.keys() != self.plain.state_dict().keys():
            fresh = type(self.plain).from_pretrained(folder, dtype=self.plain.dtype, local_files_only=True)
            state = fresh.state_dict()
        self.plain.load_state_dict(state, strict=True)


class _SaveWhenInterrupted(TrainerCallback):
    """On Ctrl-C finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at once.

    Several processes are interrupted at different steps and cannot save together: there, and where there are no checkpoints,
    Ctrl-C stops at once.
    """

    def __init__(self, trainer: DurableTrainer):
        self.trainer, self.asked = trainer, False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        args = self.trainer.args
        if (
            args.save_strategy == SaveStrategy.NO
            or args.world_size > 1
            or threading.current_thread() is not threading.main_thread()
        ):
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def ask(number, frame):
            self.asked = True
            signal.signal(signal.SIGINT, previous)
            print("Interrupted: the step is finished and saved first; once more stops at once")

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            self.trainer._save_checkpoint(self.trainer.model)
            raise KeyboardInterrupt
