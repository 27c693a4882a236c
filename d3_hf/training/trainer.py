"""`PurifyTrainer`: what every defence shares on top of `transformers.Trainer`.

It accepts images as they are (a `datasets.Dataset` with an Image column is decoded once and augmented by batch), keeps
BatchNorm as the configuration says, computes one clean loss over the whole accumulated window, offers `optimizer_step` as a
method to override, resumes exactly, and writes no pickle next to the purified model.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback

from ..data import retain as inputs
from ..data.augmentation import Augmentation
from ..data.preprocessing import Preprocessing
from ..data.streaming import StreamedImages
from ..data.training_images import TrainingImages
from ..evaluation.metrics import compute_metrics as accuracy_metrics
from ..publishing.manifest import MANIFEST
from .averaging import WeightAverage
from .checkpoints import check_output
from .config import PurifyConfig
from .distillation import Teacher
from .placement.fsdp import placement_of
from .publishing import PublishingTrainer
from .sam import at_highest_loss, running_statistics_kept
from .supported import refuse_unsupported


class _RouteOptimizerStep(TrainerCallback):
    """Calls the trainer back at the first moment when model, optimizer and resumed state are final."""

    def __init__(self, trainer: "PurifyTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.check_same_images()
        self.trainer.route_optimizer_step()
        self.trainer.begin_purification(resumed=state.global_step > 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate hands the epoch to the sampler and not to the data set, which draws its crops by it.
        if isinstance(self.trainer.train_dataset, TrainingImages):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.placement.read()
        self.trainer.end_purification()


class PurifyTrainer(PublishingTrainer):
    """A `Trainer` that fine-tunes a classifier on a few trusted images; the defences subclass it.

    Args:
        model: A `PreTrainedModel` image classifier; `load_classifier` makes one of any source.
        args: The defence's configuration.
        train_dataset: The retain set: a `datasets.Dataset` with one Image and one ClassLabel column; a
            `datasets.IterableDataset` with these, read while the model trains (see `StreamedImages`; needs ``max_steps``); or a
            dataset that yields ``pixel_values`` and ``labels`` ready for the model.
        eval_dataset: Images to measure ACC on, in either form; optional.
        processing_class: The checkpoint's image processor. Default: the one `load_classifier` left on the model.
        kwargs: Further arguments of `Trainer`.

    Raises:
        OSError: ``output_dir`` cannot be written.
        ValueError: ``output_dir`` holds another run's results (see `check_output`); the images' labels are not the model's; no
            image processor is known; the run would use `nn.DataParallel`, FSDP or DeepSpeed where `placement_of` refuses it, a
            PEFT model or `model_init`, or push checkpoints to the Hub; a training batch has no tensor ``labels``; one of
            `Additions` does not fit the defence or the images.
        FloatingPointError: The clean loss of a step is NaN or infinite.

    Attributes:
        plain: The model as whole, ordinary tensors: ``model`` itself, or on shards a copy, complete before and after the
            training.
    """

    # Our loss is normalised over the whole window: the Trainer must not divide it by the number of micro-batches again.
    loss_is_scaled_for_ga = True
    manifest_name = MANIFEST
    images_class = TrainingImages
    # Of distillation, average_last and sam_rho, those that the defence's loss and steps fit: named by each defence for itself.
    additions: tuple[str, ...] = ()
    runs_sharded = False  # under FSDP2 and ZeRO, where `model` holds shards of which a defence must know
    streams = False  # takes a retain set that is read while the model trains: the defence looks at batches only
    clean_weight: float | Tensor = 1.0  # of the cross-entropy in the objective, and so of the distillation
    method = "fine-tuning"
    paper: str | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        args: PurifyConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs,
    ):
        refuse_unsupported(model, args, kwargs)
        check_output(args, getattr(model, "source", None))
        if unfit := [n for n in ("distillation", "average_last", "sam_rho") if getattr(args, n) and n not in self.additions]:
            raise ValueError(f"{type(self).__name__} does not take {' and '.join(unfit)}: D3 and fine-tuning do")
        processing_class = processing_class or getattr(model, "image_processor", None)
        if processing_class is None:
            raise ValueError(
                f"no image processor for {type(model).__name__}: load it with d3_hf.load_classifier or pass processing_class="
            )
        self.preprocessing = Preprocessing.from_processor(processing_class)
        self.retain_indices = inputs.column(train_dataset, "index")
        self.data_source: str | None = None
        self.measured: dict[str, Any] = {}
        self.results: dict[str, Any] | None = None
        seed = args.seed if args.data_seed is None else args.data_seed
        mean_color = tuple(min(max(round(255 * mean), 0), 255) for mean in self.preprocessing.mean)
        augmentation = Augmentation(args.crop_padding, args.horizontal_flip, seed, args.cutout, mean_color)
        kwargs.setdefault("compute_metrics", accuracy_metrics)
        kwargs.setdefault("data_collator", inputs.collate)
        folder_is_new = not Path(args.output_dir).exists()
        super().__init__(
            model=model,
            args=args,
            train_dataset=inputs.training_images(train_dataset, type(self), model, args, self.preprocessing, augmentation),
            eval_dataset=inputs.evaluation_images(eval_dataset, type(self), model, self.preprocessing),
            processing_class=processing_class,
            compute_loss_func=self.clean_loss,
            **kwargs,
        )
        if folder_is_new and args.should_save:
            Path(args.output_dir).rmdir()  # the Trainer makes it at once; here it comes with the first file
        self.placement = placement_of(self, model)
        self.plain = self.placement.plain
        images = getattr(self.train_dataset, "augmentation", None)
        if args.cutout and (images is None or images.cutout != args.cutout):
            raise ValueError("cutout is for images that the trainer augments: pass the retain set as a datasets.Dataset")
        self.sam_rho = args.sam_rho
        self.distiller = Teacher(self.plain) if args.distillation else None
        self.average = WeightAverage(self) if args.average_last else None
        if self.distiller:
            self.log_names = (*self.log_names, "distillation_loss")
        if self.average:
            self.add_callback(self.average)
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if args.batch_norm == "frozen":
            for module in self._batch_norms:
                module.requires_grad_(False)
        self.add_callback(_RouteOptimizerStep(self))

    # What a defence overrides ------------------------------------------------------------------------------------------

    def sample_loss(self, cross_entropy: Tensor) -> Tensor:
        """Map each image's cross-entropy (B,) in nats to its share of the training loss; the identity here."""
        return cross_entropy

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Complete the gradient once per update: all micro-batches are in and reduced, nothing is clipped yet.

        Args:
            window_loss: Scalar, the mean over the window of what `sample_loss` returned; over this process's images, scaled
                so that its mean over processes is the global one.

        Returns:
            Scalar tensor: the objective of this update, which the log reports as ``loss``.
        """
        return window_loss

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies the loss by: to scale what `finish_gradient` adds, since gradients are unscaled after it."""
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    def optimizer_step(self, step) -> Any:
        """One update: `step()` runs the optimizer. Override to act before or after it.

        Called exactly once per update on every process, with final (reduced, clipped) gradients. It must call ``step()``
        exactly once; what follows must be idempotent, because the step is a no-op when a loss scaler skips it.

        Args:
            step: Callable without arguments.

        Returns:
            What ``step()`` returned.
        """
        return step()

    @property
    def is_classifier(self) -> bool:
        """Whether the parameters are, between two updates, those of a classifier; a defence may keep others in their place."""
        return True

    def begin_purification(self, resumed: bool) -> None:
        """Called when training begins; ``resumed`` says that the weights came from a checkpoint."""

    def end_purification(self) -> None:
        """Called when training ends."""

    def constrain(self) -> None:
        """Bring weights that were replaced by their average back onto the defence's constraint set; here there is none."""

    # The loss ----------------------------------------------------------------------------------------------------------

    def clean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy against the labels: this micro-batch's share of the window's mean, or the plain mean in evaluation.

        Args:
            outputs: The model's output with ``logits`` (B, C).
            labels: int64 (B,).
            num_items_in_batch: Images in the whole window over all processes; ``None`` in evaluation.

        Returns:
            Scalar tensor.
        """
        if not self.model.training:
            return F.cross_entropy(outputs.logits.float(), labels)
        if labels is None or num_items_in_batch is None:
            raise ValueError(f"{type(self).__name__} needs a tensor column `labels` in every training batch")
        cross_entropy = F.cross_entropy(outputs.logits.float(), labels, reduction="none")
        losses, further = self.sample_loss(cross_entropy), []
        if self.distiller:
            divergences = self.distiller.losses(outputs.logits)
            losses = losses + self.clean_weight * self.args.distillation * divergences
            further = [divergences.detach().sum()]
        self._remember(cross_entropy.detach(), further)
        return losses.sum() / num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The clean loss; BatchNorm is put in the configured mode first, since `training_step` resets it each time."""
        if self.model.training and self.distiller:
            with self.accelerator.autocast():
                self.distiller.look(inputs["pixel_values"])
        if self.model.training and self.args.batch_norm != "train":
            for module in self._batch_norms:
                module.eval()
        if not self.model.training:
            num_items_in_batch = None  # with a count the Trainer would multiply the plain mean by the number of processes
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def compute_loss_context_manager(self):
        """As the base class; in bf16 on a CPU attention is not fused, since that backward pass is 2 to 7 times as slow."""
        contexts = super().compute_loss_context_manager()
        if self.args.bf16 and self.args.device.type == "cpu":
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        return contexts

    def evaluation_loop(self, *args, **kwargs):
        """As the base class; the model is left as it was."""
        with self.placement.evaluating(self):
            return super().evaluation_loop(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Accumulate one micro-batch; on the last of a window finish the gradient and return the window's objective."""
        backward = functools.partial(super().training_step, model, inputs, num_items_in_batch)
        share = self._sharpness_aware(backward) if self.sam_rho else backward()
        self._window_loss += share
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(share)
        # One host sync per update, in place of the Trainer's own NaN filter. NaN > epsilon is False: unchecked, a diverged
        # run would look like a satisfied constraint.
        if not torch.isfinite(self._window_loss):
            raise FloatingPointError(
                f"the clean loss is {self._window_loss.item()} at step {self.state.global_step}: the run diverged; nothing was "
                "saved. Lower learning_rate, or check the images and the checkpoint for NaN"
            )
        objective = self.finish_gradient(self._window_loss).detach()
        self._window_loss = torch.zeros_like(share)
        return objective

    def _sharpness_aware(self, backward: Callable[[], Tensor]) -> Tensor:
        """A pass at the weights says where the loss is highest within ``sam_rho``, a pass there leaves the gradient."""
        backward()
        sums = self._sums.clone()
        with at_highest_loss(self.model, self.sam_rho), running_statistics_kept(self._batch_norms):
            share = backward()
        self._sums = sums  # the log counts every image once, at the weights themselves
        return share

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = self.preprocessing.normalize(inputs["pixel_values"])
        return inputs

    def check_same_images(self) -> None:
        """Raise a ValueError in every process if they hold different images: each draws its share of one common order."""
        images = self.train_dataset
        if self.args.world_size > 1:
            known = isinstance(images, TrainingImages | StreamedImages)
            found = gather_object([images.fingerprint() if known else len(images)])
            if len(set(found)) > 1:
                raise ValueError("the processes hold different retain sets: give all of them the same images, count and seed")

    # The step ----------------------------------------------------------------------------------------------------------

    def route_optimizer_step(self) -> None:
        """Send `self.optimizer.step` through `optimizer_step`, once, however often `train` is called.

        Runs after the scheduler exists: torch's scheduler wraps `step` as a bound method and marks it; `wraps` keeps the mark.
        """
        self._window_loss = torch.zeros((), device=self.args.device)
        self._sums = torch.zeros(len(self.log_names) + 1, device=self.args.device)
        if getattr(self.optimizer.step, "is_routed", False):
            return
        step = self.optimizer.step

        @functools.wraps(step)
        def routed(*args, **kwargs):
            return self.optimizer_step(functools.partial(step, *args, **kwargs))

        routed.is_routed = True
        self.optimizer.step = routed

    # The log -----------------------------------------------------------------------------------------------------------

    log_names: tuple[str, ...] = ("clean_loss",)

    def sample_statistics(self, cross_entropy: Tensor) -> list[Tensor]:
        """Sums over the images for `log_names`, in their order, as scalars on the device."""
        return [cross_entropy.sum()]

    def _remember(self, cross_entropy: Tensor, further: list[Tensor]) -> None:
        count = torch.full_like(cross_entropy[0], len(cross_entropy))
        self._sums += torch.stack([*self.sample_statistics(cross_entropy), *further, count])

    def step_statistics(self) -> dict[str, float]:
        """Further values for the log, read at logging steps only."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of `log_names` over the images since the last report, and `step_statistics`."""
        if "loss" in logs:
            *sums, count = self.accelerator.reduce(self._sums, "sum").tolist()
            self._sums.zero_()
            logs |= {name: total / count for name, total in zip(self.log_names, sums, strict=True)}
            logs |= self.step_statistics()
        super().log(logs, start_time)

    # Saving and loading ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.average:
            raise ValueError("average_last cannot resume: the checkpoint does not hold the mean; run it from the beginning")
        if self.distiller:
            self.distiller.check(Path(resume_from_checkpoint) / self.manifest_name)
        folder, file = Path(resume_from_checkpoint), self.placement.optimizer_file
        if any(folder.glob("optimizer.*")) and not (folder / file).exists():
            raise ValueError(f"{folder} holds no {file}: with FSDP resume what FSDP began, without it what was begun without")
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_weights(self, folder: Path) -> None:
        super()._load_weights(folder)
        self.placement.write()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.placement.saving_optimizer(self, Path(output_dir)):
            super()._save_optimizer_and_scheduler(output_dir)

    def get_train_dataloader(self) -> DataLoader:
        """As the base class; a stream shares itself out among the processes."""
        images = self.train_dataset
        if isinstance(images, StreamedImages):
            return images.loader(self.args, self.data_collator)
        return super().get_train_dataloader()
