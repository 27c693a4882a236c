"""`PurifyTrainer`: the whole of what every defence shares on top of `transformers.Trainer`, in the order in which it happens.

Images as they are come in (decoded once, augmented by batch); one clean loss over the whole accumulated window;
`optimizer_step` after every step of the optimizer; exact resuming; manifest and card beside the model, never a pickle.
"""

import functools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from ..data import retain
from ..data.preprocessing import Preprocessing
from ..data.samples import Collator
from ..evaluation.metrics import compute_metrics
from ..models.batch_norm import batch_norms
from ..models.source import image_processor_of, source_of
from ..publishing import hub, manifest
from . import reference
from .averaging import WeightAverage
from .checkpoints import check_output
from .config import PurifyConfig
from .contract import Defence
from .distillation import Teacher
from .durable import load_weights
from .images import (
    check_evaluation,
    check_same_images,
    check_samples,
    evaluation_images,
    prediction_images,
    training_images,
)
from .lifecycle import Lifecycle
from .loop_needs import expect_unused_parameters, leaves_one_image, loading, training_loader
from .mixing import CutMix, excess_cross_entropy
from .placement.choose import placement_of
from .published import PublishingTrainer
from .sam import at_highest_loss, running_statistics_kept
from .schedule import resolved, rule_said
from .unsupported import refuse_additions, refuse_unsupported


class PurifyTrainer(Defence, PublishingTrainer):
    """A `Trainer` that fine-tunes a classifier on a few trusted images; the defences subclass it, see `contract`.

    Args:
        model: A `PreTrainedModel` image classifier; `load_classifier` makes one of any source.
        args: The defence's configuration.
        train_dataset: The retain set: a `datasets.Dataset` with one Image and one ClassLabel column, or any other data set of
            pictures and labels (see `data.samples`); a `datasets.IterableDataset` with these, read while the model trains (see
            `StreamedImages`; needs ``max_steps``); or a data set that yields ``pixel_values`` and ``labels`` ready for the
            model, by its columns, by its transform or as pairs.
        eval_dataset: Images to measure ACC on, in any form but a stream, or a dict of these by name; optional. `evaluate` and
            `predict` take the same.
        processing_class: The checkpoint's image processor. Default: the one `load_classifier` left on the model.
        data_source: What the retain set was loaded from, as ``uoft-cs/cifar10`` or a path, for manifest and card.
        kwargs: Further arguments of `Trainer`.

    Raises:
        OSError: ``output_dir`` cannot be written.
        ValueError: ``output_dir`` holds another run's results (see `check_output`); the images' labels are not the model's; no
            image processor is known, or the network cannot be trained on what it gives (see `leaves_one_image`); the run would
            use FSDP or DeepSpeed where `placement_of` refuses it, a PEFT model or `model_init`, or push checkpoints to the Hub;
            a data set is of no form that is known here; a training batch has no tensor ``labels``; an addition (see
            `Defence.additions`) does not fit the defence, or ``cutout`` the images; an argument or an option of `Trainer`
            cannot be honoured (see `refuse_unsupported`).
        FloatingPointError: The clean loss of a step is NaN or infinite.
        RuntimeError: After training, when no trained weight has moved.

    Attributes:
        plain: The model as whole, ordinary tensors: ``model`` itself, or on shards a copy, complete before and after the
            training.
        in_training_step: Whether a loss that is computed now is trained on.
        batch_number: Number of the micro-batch in the whole run, to draw by: a resumed run repeats it.
        schedule: What the network's rule settled, see `schedule.resolved`.
        reference_sha256: Fingerprint of the model as it was handed over, by which a resumed run knows it.
        report: What is known of the run besides, see `record`.
        earlier, execution: Manifest of the checkpoint that the run went on from, if any; how it is executed, by `Lifecycle`.
    """

    # Our loss is normalised over the whole window: the Trainer must not divide it by the number of micro-batches again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: PurifyConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        data_source: str | None = None,
        **kwargs,
    ):
        self._check(model, args, kwargs)
        count = len(train_dataset) if train_dataset is not None and has_length(train_dataset) else None
        args, self.schedule = resolved(args, model, count, "cutmix" in self.additions)
        self.data_source, self.earlier = data_source, None
        self.in_training_step, self.batch_number = False, 0
        processing_class = processing_class or image_processor_of(model)
        if processing_class is None:
            raise ValueError(
                f"no image processor for {type(model).__name__}: load it with d3_hf.load_classifier or pass processing_class="
            )
        self.preprocessing = Preprocessing.from_processor(processing_class)
        self.retain_indices = retain.column(train_dataset, "index")
        kwargs.setdefault("compute_metrics", compute_metrics)
        check_evaluation(args, eval_dataset, kwargs["compute_metrics"] is compute_metrics)
        images = training_images(train_dataset, self, model.config, args, self.preprocessing)
        measured_on = evaluation_images(eval_dataset, model.config, self.preprocessing)
        own = kwargs.pop("data_collator", None)
        collator = own if isinstance(own, Collator) else Collator(model.config.num_labels, own)
        for name, found in (("train_dataset", images), ("eval_dataset", measured_on)):
            check_samples(found, collator, self.preprocessing, name)
        folder_is_new = not Path(args.output_dir).exists()
        super().__init__(
            model,
            args,
            collator,
            images,
            measured_on,
            processing_class,
            compute_loss_func=self.clean_loss,
            **kwargs,
        )
        self.label_names = ["labels"]  # of every batch, whatever the network calls its own
        if folder_is_new and args.should_save:
            Path(args.output_dir).rmdir()  # the Trainer makes it at once; here it comes with the first file
        self.placement = placement_of(self, model, self.runs_sharded)
        self.plain = self.placement.plain
        # Before anything moves: the additions and the defence change weights, or keep copies of them.
        self._handed_over = reference.fingerprints(self.plain.state_dict())
        self.reference_sha256 = reference.fingerprint_of(self._handed_over)
        self._add(args)
        self.batch_norms = batch_norms(model)
        if args.batch_norm == "frozen":
            nn.ModuleList(self.batch_norms).requires_grad_(False)
        self.add_callback(Lifecycle(self))
        self.prepare()
        self.drops_last = leaves_one_image(self)
        expect_unused_parameters(self)

    def _check(self, model: nn.Module, args: PurifyConfig, kwargs: dict[str, Any]) -> None:
        if not isinstance(args, PurifyConfig):
            wanted = type(self).__name__.replace("Trainer", "Config")
            raise ValueError(f"args is a {type(args).__name__}, which lacks the defence's options: pass a {wanted}")
        refuse_unsupported(model, args, kwargs, self.trains_encoders)
        check_output(args, source_of(model))
        refuse_additions(self, args)

    def _add(self, args: PurifyConfig) -> None:
        self.suspect = Teacher(self.plain, self.compared_layer) if args.distillation or self.compared_layer else None
        self.mixing = CutMix(self.plain.config.num_labels, args.cutmix, args.seed, args.process_index) if args.cutmix else None
        self.average = None
        if args.distillation:
            self.log_names = (*self.log_names, "distillation_loss")
        if args.average_last:
            batches = functools.partial(self.retain_batches, "Re-estimating BatchNorm", augmented=True)
            self.average = WeightAverage(self.model, self.constrain, batches)
            self.add_callback(self.average)

    # What a defence uses -----------------------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies the loss by: to scale what `finish_gradient` adds, since gradients are unscaled after it."""
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    def retain_batches(
        self, purpose: str | None, augmented: bool = False, batches: int | list[list[int]] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the retain set as the model takes it, every image to every process; see `data.retain.retain_batches`."""
        is_silent = purpose is None or self.args.disable_tqdm or not self.is_world_process_zero()
        size = self.args.per_device_train_batch_size if batches is None else batches
        found = retain.retain_batches(self.train_dataset, size, self.data_collator, purpose, augmented, is_silent)
        return (self._prepare_inputs(batch) for batch in found)

    # The beginning and the end -----------------------------------------------------------------------------------------

    def begin(self, resumed: bool) -> None:
        """Called when model, optimizer and, from a checkpoint, all state are final."""
        check_same_images(self.train_dataset, self.args)
        self._window_loss = torch.zeros((), device=self.args.device)
        self._sums = torch.zeros(len(self.log_names) + 1, device=self.args.device)
        self._micro_batches = 0  # of this window so far
        if not resumed:
            self.start()
        # A resumed run may have no step left to take: it is compared with what it once began with.
        self._started = {name: self._handed_over[name] for name in self._trained()} if resumed else self._trained()
        if self.schedule:
            self.accelerator.print(rule_said(self.schedule))
        self.announce(resumed)

    def end(self) -> None:
        """Called when training has ended."""
        self.placement.read()
        self.finish()
        self.check_moved()

    def check_moved(self) -> None:
        """Raise a RuntimeError if nothing that was trained has changed: nothing unchanged is handed out as purified."""
        if self._trained() == self._started:
            raise RuntimeError("no weight changed: the model is not purified. Check learning_rate and num_train_epochs")

    def _trained(self) -> dict[str, str]:
        return reference.fingerprints({name: p for name, p in self.plain.named_parameters() if p.requires_grad})

    # The loss ----------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`clean_loss` of a micro-batch; BatchNorm is put in the configured mode first, since `training_step` resets it."""
        if not self.in_training_step:
            num_items_in_batch = None  # with a count the Trainer would multiply the plain mean by the number of processes
        elif self.args.batch_norm != "train":
            for module in self.batch_norms:
                module.eval()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def clean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy against the labels: this micro-batch's share of the window's mean, or the plain mean in evaluation.

        Args:
            outputs: The model's output with ``logits`` (B, C).
            labels: int64 (B,); with CutMix while training float (B, C).
            num_items_in_batch: Images in the whole window over all processes; ``None`` in evaluation.

        Returns:
            Scalar tensor.
        """
        if not self.in_training_step:
            return F.cross_entropy(outputs.logits.float(), labels)
        if labels is None or num_items_in_batch is None or labels.ndim != (2 if self.mixing else 1):
            raise ValueError(f"{type(self).__name__} needs a tensor column `labels` in every training batch, int64 (B,)")
        cross_entropy = excess_cross_entropy(outputs.logits.float(), labels)
        losses, sums = self.sample_loss(cross_entropy), self.sample_statistics(cross_entropy.detach())
        if self.args.distillation:
            divergences = self.suspect.losses(outputs.logits)
            losses = losses + self.clean_weight * self.args.distillation * divergences
            sums = [*sums, divergences.detach().sum()]
        self._sums += torch.stack([*sums, torch.full_like(cross_entropy[0], len(cross_entropy)).detach()])
        return losses.sum() / num_items_in_batch

    def compute_loss_context_manager(self):
        """As the base class; in bf16 on a CPU attention is not fused, since that backward pass is 2 to 7 times as slow."""
        contexts = super().compute_loss_context_manager()
        if self.args.bf16 and self.args.device.type == "cpu":
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        return contexts

    def evaluation_loop(self, *args, **kwargs):
        """As the base class; the model is left as it was."""
        with self.placement.evaluating():
            return super().evaluation_loop(*args, **kwargs)

    # The step ----------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Accumulate one micro-batch; on the last of a window finish the gradient and return the window's objective."""
        self.batch_number = self.state.global_step * self.args.gradient_accumulation_steps + self._micro_batches
        self._micro_batches = 0 if self.accelerator.sync_gradients else self._micro_batches + 1
        inputs = self._prepare_inputs(self.training_batch(inputs))
        if self.mixing:
            inputs |= self.mixing(inputs["pixel_values"], inputs["labels"], self.batch_number)
        if self.suspect:
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                self.suspect.look(inputs["pixel_values"])
        share = self._backward(model, inputs, num_items_in_batch)
        self._window_loss += share
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(share)
        # One host sync per update, in place of the Trainer's own NaN filter: NaN > epsilon is False, a satisfied constraint.
        if not torch.isfinite(self._window_loss):
            raise FloatingPointError(
                f"the clean loss is {self._window_loss.item()} at step {self.state.global_step}: the run diverged; nothing was "
                "saved. Lower learning_rate, or check the images and the checkpoint for NaN"
            )
        objective = self.finish_gradient(self._window_loss).detach()
        self._window_loss = torch.zeros_like(share)
        return objective

    def _backward(self, model, inputs: dict[str, Any], num_items_in_batch) -> Tensor:
        """Forward and backward pass of a micro-batch; with SAM the gradient is that where the loss is highest nearby."""
        step = functools.partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        self.in_training_step = True
        try:
            if not self.sam_rho:
                return step(inputs)
            step(dict(inputs))  # the Trainer takes the labels out
            sums = self._sums.clone()
            with at_highest_loss(self.model, self.sam_rho), running_statistics_kept(self.batch_norms):
                share = step(inputs)
            self._sums = sums  # the log counts every image once, at the weights themselves
            return share
        finally:
            self.in_training_step = False

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "pixel_values" not in inputs:
            raise ValueError(f"the collator must make batches of pixel_values and labels; found {', '.join(inputs)}")
        if inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = self.preprocessing.normalize(inputs["pixel_values"])
        return inputs

    def hyperparameter_search(self, *args, **kwargs):
        """Not here: it makes a new model for every trial, by ``model_init``."""
        raise ValueError("hyperparameter_search makes models by model_init: try options in runs of their own (d3-hf benchmark)")

    def get_train_dataloader(self) -> DataLoader:
        """As the base class, see `training_loader`."""
        return training_loader(self, super().get_train_dataloader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the base class; a data set is taken in every form that the constructor takes, and no image is left out."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            return self._loader_of(evaluation_images(eval_dataset, self.model.config, self.preprocessing))
        with loading(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`, also of images without labels."""
        return self._loader_of(prediction_images(test_dataset, self.model.config, self.preprocessing))

    def _loader_of(self, images: Any) -> DataLoader:
        with loading(self.args):
            return super().get_test_dataloader(images)  # of evaluation it would keep the first, with persistent workers

    def get_optimizer_cls_and_kwargs(self, args, model=None) -> tuple[Any, dict[str, Any]]:
        """As the base class, with the defence's ``amsgrad``."""
        kind, options = super().get_optimizer_cls_and_kwargs(args, model)
        return kind, options | ({"amsgrad": True} if self.amsgrad and kind is torch.optim.AdamW else {})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Call the objective so; add the means of `log_names` over the images since the last report, and `step_statistics`."""
        if "loss" in logs:
            *sums, count = self.accelerator.reduce(self._sums, "sum").tolist()
            self._sums.zero_()
            logs |= {name: total / count for name, total in zip(self.log_names, sums, strict=True)} | self.step_statistics()
        named = {"loss": "objective", "train_loss": "train_objective"}  # it may fall below zero, which no loss does
        super().log({named.get(name, name): value for name, value in logs.items()}, start_time)

    # Checkpoints -------------------------------------------------------------------------------------------------------

    def resume_state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides weights and optimizer. A defence adds to it; see `load_resume_state`."""
        return {"reference_sha256": self.reference_sha256, "distilled": bool(self.args.distillation)}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Go on from what `resume_state` returned; tensors are on the CPU.

        Raises:
            ValueError: The checkpoint is of a run from another model, or with other additions.
        """
        if self.average:
            raise ValueError("does not hold the mean of average_last: run it from the beginning")
        if state["reference_sha256"] != self.reference_sha256:
            raise ValueError("belongs to a run from another model: resume with the suspicious model that the run began with")
        if state["distilled"] != bool(self.args.distillation):
            raise ValueError("belongs to a run with another distillation: resume with the options that the run began with")

    def load_weights(self, folder: Path) -> None:
        """Load a checkpoint's weights into the model, wherever it lies."""
        load_weights(self.plain, folder)
        self.placement.write()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, file = Path(resume_from_checkpoint), self.placement.optimizer_file
        if any(folder.glob("optimizer.*")) and not (folder / file).exists():
            raise ValueError(f"{folder} holds no {file}: with FSDP resume what FSDP began, without it what was begun without")
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.earlier = manifest.read_earlier(folder / self.manifest_name, self.args)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.placement.optimizer_saved(Path(output_dir))

    # The record -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def source_checks(self) -> dict[str, Any] | None:  # asked once
        """What scanners say of the source, see `hub.source_checks`."""
        source = source_of(self.plain)
        return hub.source_checks(asdict(source)) if source else None

    def facts(self) -> dict[str, Any]:
        """The manifest: everything needed to repeat the run and all that the card says of it; JSON-able."""
        added = {"teacher_sha256": self.suspect.sha256} if self.args.distillation else {}
        added |= {"averaged_epochs": self.average.snapshots} if self.average else {}
        return added | manifest.facts_of(self)
