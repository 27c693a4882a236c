"""Pretraining an encoder without labels by SimCLR, on images of which some may be poisoned."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..data.collages import Collages
from ..data.images import RawImages
from ..data.views import view
from ..models.kinds import encode
from ..training.encoder_losses import nt_xent
from .encoder_trainers import EncoderVictimConfig, EncoderVictimTrainer
from .plan import VictimPlan

PROJECTION = 128  # numbers that the loss compares: SimCLR
PROJECTOR = "projector."  # what names of its weights begin with in a checkpoint


class SimCLRTrainer(EncoderVictimTrainer):
    """SimCLR (Chen et al., ICML 2020, arXiv 2002.05709): NT-Xent of two views of each image, behind a projector.

    ``min NT-Xent(g(f(v1)), g(f(v2)))``. The projector g is a training's alone: checkpoints hold it, to go on from, and what is
    saved at the end does not. Losses compare the images of a micro-batch in one process. See `EncoderVictimTrainer` for the
    arguments; the schedule is that of CTRL's victims (authors' code): SGD at 0.06 over 800 epochs in batches of 512.
    """

    log_names = ("pretraining_loss",)
    own_schedule: ClassVar[dict[str, Any]] = {
        "learning_rate": 0.06,
        "num_train_epochs": 800,
        "per_device_train_batch_size": 512,
        "batch_norm": "train",
    }

    def __init__(self, model: PreTrainedModel, args: EncoderVictimConfig, train_dataset: RawImages, plan: VictimPlan, **kwargs):
        if plan.attack and plan.attack.reshapes:
            self.images_class = Collages
        super().__init__(model, args, train_dataset, plan, **kwargs)

    def prepare(self) -> None:
        """Make the projector, by the run's seed alone."""
        super().prepare()
        with torch.no_grad():
            image = torch.zeros(1, 3, *self.preprocessing.size, device=next(self.before.parameters()).device)
            width = encode(self.before, image).shape[1]
        self.projector = new_projector(width, self.args.seed).to(self.args.device)

    def training_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Two views of each image, the first ones of all before the second ones."""
        inputs = Trainer._prepare_inputs(self, dict(inputs))
        images, extents, generator = inputs["pixel_values"], inputs.get("extents"), self.generator()
        views = [view(images, generator, extents, self.preprocessing.size) for _ in range(2)]
        return {"pixel_values": self.preprocessing.normalize(torch.cat(views)), "labels": inputs["labels"]}

    def image_losses(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """NT-Xent of the projections; of an image's two views the mean."""
        losses = nt_xent(*self.projector(features.float()).chunk(2), self.args.temperature)
        return losses, [losses]

    # The projector is no part of the model, so that nothing has to be taken out of it. What the Trainer does for a model's
    # weights is done here for the projector's.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the base class, with the projector's weights; as there, only matrices decay."""
        if self.optimizer is None:
            super().create_optimizer(model)
            matrices = [weight for weight in self.projector.parameters() if weight.ndim > 1]
            others = [weight for weight in self.projector.parameters() if weight.ndim <= 1]
            self.optimizer.add_param_group({"params": matrices, "weight_decay": self.args.weight_decay})
            self.optimizer.add_param_group({"params": others, "weight_decay": 0.0})
        return self.optimizer

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Average the projector's gradient over the processes, as DDP does the encoder's."""
        if self.args.world_size > 1:
            for weight in self.projector.parameters():
                weight.grad = self.accelerator.reduce(weight.grad, "mean")
        return window_loss

    def optimizer_step(self) -> None:
        """Forget the projector's gradient."""
        self.projector.zero_grad()

    def resume_state(self) -> dict[str, Any]:
        """Adds the projector."""
        return super().resume_state() | {PROJECTOR + name: tensor for name, tensor in self.projector.state_dict().items()}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on with the projector; see the base class."""
        super().load_resume_state(state)
        weights = {name.removeprefix(PROJECTOR): value for name, value in state.items() if name.startswith(PROJECTOR)}
        self.projector.load_state_dict(weights)


def new_projector(width: int, seed: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear from features (B, width) to projections (B, `PROJECTION`), as large inside as outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, PROJECTION))
