"""The contract of a defence: what it says of itself, and what it may override.

A new defence is one file: a module docstring with paper, formula, cost and what differs from the authors' code; a configuration
that extends `PurifyConfig`, its options with ``help`` and ``range`` or ``choices`` in their metadata; a trainer that extends
`PurifyTrainer` and overrides, of the methods here, those that it needs; and its line in `d3_hf.defenses.DEFENCES`. Further it
may override `PurifyTrainer.compute_loss`, `check_moved` and `facts`, and `resume_state` with `load_resume_state` if something
besides weights, optimizer and random numbers must survive an interruption. It never touches checkpoints, manifests or copies of
the first weights. `d3_hf/defenses/linear_probing.py` is the smallest example.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.training_images import TrainingImages
from .config import PurifyConfig


class Defence:
    """The names and the hooks of a defence, all of plain fine-tuning; `PurifyTrainer` calls them in this order.

    Attributes:
        method: What tables and cards call it.
        paper: Address of its paper.
        additions: Of ``cutmix``, ``distillation``, ``average_last`` and ``sam_rho``, those that its loss and steps fit.
        runs_sharded: Whether it runs under FSDP2, where `PurifyTrainer.model` holds shards of which it must know.
        streams: Whether it takes a retain set that is read while the model trains: it looks at batches only.
        amsgrad: Whether AdamW, where ``optim`` asks for it, keeps the AMSGrad maximum; the Trainer has no option for it.
        trains_encoders: Whether it is for encoders, without labels, in place of classifiers; see `encoders.EncoderTrainer`.
        clean_weight: Of the cross-entropy in the objective, and so of the distillation.
        log_names: What `sample_statistics` sums up.
        images_class: What holds a retain set in memory.
    """

    args: PurifyConfig

    method = "fine-tuning"
    paper: str | None = None
    additions: tuple[str, ...] = ()
    runs_sharded = False
    streams = False
    amsgrad = False
    trains_encoders = False
    clean_weight: float | Tensor = 1.0
    log_names: tuple[str, ...] = ("clean_loss",)
    images_class = TrainingImages

    @property
    def sam_rho(self) -> float:
        """Size of the neighbourhood whose highest loss is minimised; 0: that of the weights themselves is."""
        return self.args.sam_rho

    @property
    def compared_layer(self) -> str | None:
        """Name of the layer whose input is compared with the suspicious model's, see `Teacher`; None: nothing is."""
        return None

    def prepare(self) -> None:
        """Find what is trained, freeze the rest, refuse what cannot work; called once, at the end of the constructor."""

    def start(self) -> None:
        """What is done once, before the first step; not when the weights come from a checkpoint."""

    def announce(self, resumed: bool) -> None:
        """Say what is going to happen: weights and state are final, from a checkpoint if ``resumed``."""

    def training_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Change a micro-batch before it is normalised and trained on; it stays as it is here."""
        return inputs

    def sample_loss(self, cross_entropy: Tensor) -> Tensor:
        """Map each image's cross-entropy (B,) in nats to its share of the training loss; the identity here."""
        return cross_entropy

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Complete the gradient once per update: all micro-batches are in and reduced, nothing is clipped yet.

        Args:
            window_loss: Scalar, the mean over the window of what `sample_loss` returned; over this process's images, scaled
                so that its mean over processes is the global one.

        Returns:
            Scalar tensor: the objective of this update, which the log reports as ``objective``.
        """
        return window_loss

    def optimizer_step(self) -> None:
        """What follows each step of the optimizer, once per update on every process, before the schedule's step: a projection.

        It must be idempotent, because a loss scaler may have skipped the step.
        """

    def constrain(self) -> None:
        """Bring weights that were replaced by their average back onto the defence's constraint set; here there is none."""

    def finish(self) -> None:
        """Called when training ends, before `check_moved`."""

    @property
    def is_classifier(self) -> bool:
        """Whether the parameters are, between two updates, those of a classifier; a defence may keep others in their place."""
        return True

    def sample_statistics(self, cross_entropy: Tensor) -> list[Tensor]:
        """Sums over the images for `log_names`, in their order, as scalars on the device."""
        return [cross_entropy.sum()]

    def step_statistics(self) -> dict[str, float]:
        """Further values for the log, read at logging steps only."""
        return {}

    def write_own_files(self, folder: Path) -> None:
        """Write files of the defence's own into a model's folder; weights are there, the manifest comes after."""
