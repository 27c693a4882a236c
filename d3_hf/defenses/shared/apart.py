"""Training another model, before a defence's own training, on its retain set and schedule."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ...training.trainer import PurifyTrainer

Kind = TypeVar("Kind", bound=PurifyTrainer)


@contextmanager
def trainer_apart(trainer: PurifyTrainer, kind: type[Kind], model: nn.Module, epochs: float) -> Iterator[Kind]:
    """Inside, a trainer that saves, measures, reports and pushes nothing, and has a folder of its own.

    Args:
        trainer: Whose images, processor and options, but for the number of passes, it has.
        kind: What trains.
        model: What is trained, in place.
        epochs: Passes over the retain set.
    """
    args = copy.copy(trainer.args)  # making new ones would reset the state of the accelerator, which is running
    args.num_train_epochs, args.max_steps = epochs, -1
    args.save_strategy, args.eval_strategy, args.report_to = SaveStrategy.NO, IntervalStrategy.NO, []
    args.push_to_hub = args.eval_on_start = args.load_best_model_at_end = False
    images, processor = trainer.train_dataset, trainer.processing_class
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved; in the other's it would find that one's checkpoints
        args.output_dir = folder
        yield kind(model, args, images, None, processor, data_collator=trainer.data_collator)
