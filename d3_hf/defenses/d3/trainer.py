"""D3, Distance-Driven Detoxification: move selected weights as far from their poisoned start as the clean loss allows.

Wei, Liu, Zha: "Backdoor Mitigation by Distance-Driven Detoxification", ICCV 2025, arXiv 2411.09585. The paper and the
authors' released ``defense/d3.py`` differ; each option below says which of the two it follows. The objective is

    min over theta, theta_s in S:   -d(theta_s, theta_init_s) + lambda * max(0, L_clean(theta) - epsilon)

Cost: one forward and one backward pass per update, as plain fine-tuning; the active set adds a forward pass without graph and
saves most of the backward ones. The defender owns a few labelled images without triggers, nothing else. It works on every
network whose head, or other selected weights, can be found.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.features import recorded_input
from ...models.head import NoOneHead, find_head
from ...training.features import cut_off, feature_distances
from ...training.reference import UNMOVED
from ...training.trainer import PurifyTrainer
from ..shared import geometry
from ..shared.base_start import BaseStart, between
from ..shared.selection import select_weights
from .active_set import ActiveSet, Inexact, forward_active, trained_apart
from .config import D3Config as D3Config


class D3Trainer(PurifyTrainer):
    """Trainer of D3; see `PurifyTrainer` for the arguments and `D3Config` for the objective.

    One update: `compute_loss` gives the share of ``lambda * max(0, CE - epsilon)``, the backward pass its gradient,
    `finish_gradient` subtracts that of the distance, the optimizer steps, and `optimizer_step` projects onto S.

    The reference theta_init is the model as it is handed over: build the trainer from the suspicious model, also when
    resuming from a checkpoint of an interrupted run.

    Raises:
        ValueError: The selection fails (see `select_weights`), a checkpoint belongs to another reference, or ``active_set`` is
            True where it would not be exact.
        RuntimeError: After training, when no selected weight has moved.

    Attributes:
        segments: The selected weights theta_s.
        references: Their values theta_init_s.
        radii: The norms of these.
        epsilon: In nats; measured when training begins if the configuration gives none.
        multiplier: lambda as it is now; a tensor under dual ascent.
        beginning: Where the body starts; None without a base.
        active_set: None where every image is trained on.
    """

    method = "D3"
    paper = "https://arxiv.org/abs/2411.09585"
    log_names = ("clean_loss", "active_fraction")
    additions = ("cutmix", "distillation", "average_last", "sam_rho")
    runs_sharded = True
    streams = True

    @functools.cached_property
    def compared_layer(self) -> str | None:
        """The head, whose input is the features, where their distance counts."""
        return None if self.args.distance == "weights" else find_head(self.plain, self.preprocessing.size)

    def prepare(self) -> None:
        """Select theta_s, keep theta_init_s, and find out whether inactive images may be left out."""
        if self.compared_layer:
            self.log_names = (*self.log_names, "feature_distance")
        try:
            self.segments = select_weights(self.plain, self.args.target_modules, self.preprocessing.size)
        except NoOneHead as reason:
            raise ValueError(f"{reason}; name those that D3 is to move: --target_modules NAME NAME") from None
        self.selected = list(dict.fromkeys(segment.parameter for segment in self.segments))  # a fused one once
        with torch.no_grad():
            self.references = [weight.clone() for weight in self.weights()]
            self.radii = geometry.norms(self.references)
        args, self.beginning = self.args, None
        if args.base_model:
            self.beginning = BaseStart(self.plain, args.base_model, self.preprocessing.size, args.base_revision, args.keep)
        if args.sam_rho and not args.has_whole_gradients:  # which the network's rule may have brought
            raise ValueError(
                "D3 takes sharpness-aware steps on this network, which need whole, unscaled gradients: leave "
                "gradient_accumulation_steps at 1 and fp16 off, or set sam_rho to 0"
            )
        self.epsilon = args.epsilon
        self._begin_lambda(args.lambda_clean)
        self.active_set = self._active_set()

    def weights(self) -> list[Tensor]:
        """The selected weights ``W_k`` as detached views that share memory with the plain model."""
        return [segment.of(segment.parameter.detach()) for segment in self.segments]

    # The objective -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of ``lambda * max(0, CE - epsilon)``, see `sample_loss`.

        Where it pays, only the images above epsilon go through the network with a graph: the others have no gradient. The
        distance is not here: its gradient, known in closed form, joins once per update in `finish_gradient`.
        """
        if self.in_training_step and self.active_set and self.active_set.pays():
            model = functools.partial(forward_active, model, self.model, inputs["labels"], self.epsilon)
        if not (self.in_training_step and self.compared_layer):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with recorded_input(self.model.get_submodule(self.compared_layer)) as self._features:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def sample_loss(self, cross_entropy: Tensor) -> Tensor:
        """lambda times what the image adds to hinge and distance of features."""
        losses = self._hinges(cross_entropy)
        if self.compared_layer:
            self._distances = feature_distances(self._features.pop(), self.suspect.features)
            losses = losses - self.args.feature_weight * cut_off(self._distances, self.args.feature_threshold)
        return self.clean_weight * losses

    def _hinges(self, cross_entropy: Tensor) -> Tensor:
        """The hinge per sample; else the loss: the batch hinge gates it in `finish_gradient`."""
        if self.args.dual_rate:
            losses = cross_entropy.detach()
            self._window += torch.stack([losses.sum(), torch.full_like(losses[0], len(losses))])
            return cross_entropy - self.epsilon
        if self.active_set:
            self.active_set.see(cross_entropy.detach() > self.epsilon)
        return torch.relu(cross_entropy - self.epsilon) if self.args.hinge == "sample" else cross_entropy

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Gate the clean gradient (batch hinge), subtract the gradient of the distance, return the objective.

        The gradient of D is known in closed form, so autograd never sees the distance and the backward pass is that of
        plain fine-tuning.
        """
        if self.active_set:
            self.active_set.end_window(self.accelerator)
        if self.args.hinge == "batch":
            window_loss = torch.relu(self.accelerator.reduce(window_loss, "mean") - self.clean_weight * self.epsilon)
            if not window_loss > 0:  # every process sees the same number, so all take the same branch
                self.placement.zero_gradients()
        if self.args.distance == "features":
            if self.args.dual_rate:
                self._ascend()
            return window_loss
        weights = self.weights()
        coefficient = -self.distance_weight * self.loss_scale
        with self.placement.gradients(self.selected):
            gradients = [segment.of(segment.parameter.grad) for segment in self.segments]
            if not self.args.dual_rate:
                lengths = geometry.add_distance_gradient(gradients, weights, self.references, coefficient)
                return window_loss - self.distance_weight * sum(lengths)
            directions = [torch.zeros_like(weight) for weight in weights]  # apart: a coefficient on the device scales them
            lengths = geometry.add_distance_gradient(directions, weights, self.references, 1.0)
            torch._foreach_add_(gradients, torch._foreach_mul(directions, coefficient))
        objective = window_loss - self.distance_weight * sum(lengths)
        self._ascend()
        return objective

    def optimizer_step(self) -> None:
        """After the optimizer's step, the projection of the selected weights onto S."""
        self.placement.read(self.selected)
        geometry.project(self.weights(), self.radii, self.args.projection)
        self.placement.write(self.selected)

    def constrain(self) -> None:
        """The projection, of weights that were replaced by their average."""
        self.optimizer_step()

    # lambda, epsilon and the active set --------------------------------------------------------------------------------

    def _begin_lambda(self, value: float) -> None:
        self._window = torch.zeros(2, device=self.args.device)  # sum of the cross-entropies, and of how many images
        self._set_lambda(torch.tensor(float(value), device=self.args.device) if self.args.dual_rate else value)

    def _set_lambda(self, value: float | Tensor) -> None:
        self.multiplier = value
        scale = value + 1 if self.args.dual_rate or (self.args.scale_objective and value > 1) else 1.0
        self.clean_weight, self.distance_weight = value / scale, 1 / scale

    def _ascend(self) -> None:
        """One step of lambda along the constraint's violation over the window of all processes, without waiting for it."""
        total, count = self.accelerator.reduce(self._window, "sum")
        self._set_lambda(torch.relu(self.multiplier + self.args.dual_rate * (total / count - self.epsilon)))
        self._window = torch.zeros_like(self._window)

    @torch.no_grad()
    def _mean_loss(self) -> float:
        """Mean cross-entropy of the model on the retain set, evaluation mode, not augmented; the same in all processes."""
        self.plain.eval()
        sums = torch.zeros(2, device=self.args.device)
        for batch in self.retain_batches("D3: epsilon"):
            logits = self.plain(pixel_values=batch["pixel_values"]).logits.float()
            loss = F.cross_entropy(logits, batch["labels"], reduction="sum")
            sums += torch.stack([loss, torch.full_like(loss, len(logits))])
        return self.accelerator.reduce(sums[0] / sums[1], "mean").item()

    def _active_set(self) -> ActiveSet | None:
        """None where the step is to be dense."""
        args = self.args
        if args.active_set is False:
            return None
        try:
            if args.dual_rate:
                raise Inexact("the Lagrangian has a gradient for every image")
            if args.hinge != "sample":
                raise Inexact("the batch hinge gives all images the same weight")
            if self.plain is not self.model:
                raise Inexact("on shards every process must take every pass, also one without active images")
            if args.distillation or self.compared_layer:
                raise Inexact("distillation and the distance of features have a gradient for every image")
            if args.activation_checkpointing or self.model.is_activation_checkpointing:
                raise Inexact("activation checkpointing runs the network again as it is")
            if args.sam_rho:
                raise Inexact("SAM looks for the highest loss of all images")
            if args.cutmix:
                raise Inexact("with CutMix most images are above epsilon")
            if args.torch_compile:
                raise Inexact("torch.compile would compile anew for another number of images")
            if args.batch_norm == "train" and self.batch_norms:
                raise Inexact("BatchNorm couples the images of a batch: set batch_norm to eval or frozen")
            return ActiveSet(trained_apart(self.model, self.batch_norms, self.preprocessing.size), args.device)
        except Inexact as reason:
            if args.active_set:
                raise ValueError(f"active_set does not fit: {reason}") from None
            return None

    # The beginning and the end -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Measure epsilon if it is not given; then the warm start, and with a base the body between the two."""
        if self.epsilon is None:
            self.epsilon = self._mean_loss()
            self.accelerator.print(f"D3: epsilon is the suspicious model's mean loss on the retain set, {self.epsilon:.4g}")
        self._begin_lambda(self.args.lambda_clean)
        if self.active_set:
            self.active_set.begin(1.0)
        if self.beginning:
            self.beginning.place(self.plain)
        for weight, start in zip(self.weights(), self._warm_starts(), strict=True):
            weight.copy_(start)
        self.placement.write(None if self.beginning else self.selected)

    def _warm_starts(self) -> list[Tensor]:
        """Of the selected weights: drawn about the suspicious ones, but of those that a base has between the two."""
        generator = torch.Generator().manual_seed(self.args.seed)
        names = {id(parameter): name for name, parameter in self.plain.named_parameters()}
        base, starts = self.beginning.base.weights if self.beginning else {}, []
        for segment, reference in zip(self.segments, self.references, strict=True):
            if (name := names[id(segment.parameter)]) in base:
                starts += between([segment.of(base[name]).to(reference)], [reference], self.args.keep)
            else:
                starts.append(geometry.warm_start(reference.cpu(), self.args.warm_start, generator).to(reference))
        return starts

    def announce(self, resumed: bool) -> None:
        """Say what will move."""
        relative = self.relative_distances()
        names = ", ".join(segment.name for segment in self.segments)
        weights = "weight" if len(self.segments) == 1 else "weights"
        if self.beginning:
            self.accelerator.print(f"D3 {self.beginning.said(resumed)}")
        self.accelerator.print(
            f"D3 moves {len(self.segments)} {weights} ({names}); "
            f"{'resumed' if resumed else self.args.warm_start + ' start'} at relative distance "
            f"{sum(relative.values()) / len(relative):.3f} of at most 2 on the sphere"
        )

    def finish(self) -> None:
        """Say how far the weights moved."""
        for name, distance in self.relative_distances().items():
            self.accelerator.print(f"D3 moved {name} to relative distance {distance:.3f}")

    def check_moved(self) -> None:
        """Raise if no selected weight moved, from its warm start as well as from its reference."""
        starts = self._warm_starts()
        geometry.project(starts, self.radii, self.args.projection)  # the near start lies beside S
        moved = [(w - s).norm() / r for w, s, r in zip(self.weights(), starts, self.radii, strict=True)]
        if not min(max(moved), max(self.relative_distances().values())) > UNMOVED:
            raise RuntimeError(
                "no selected weight moved: the model is not purified. Check learning_rate, num_train_epochs and warm_start"
            )

    # What the log, the manifest and a checkpoint hold ------------------------------------------------------------------

    def relative_distances(self) -> dict[str, float]:
        """``||W_k - W_k^0|| / ||W_k^0||`` per selected weight: 0 at the start, at most 2 on the sphere."""
        lengths = geometry.distances(self.weights(), self.references)
        ratios = torch.stack(lengths) / torch.stack(self.radii)
        return {segment.name: ratio for segment, ratio in zip(self.segments, ratios.tolist(), strict=True)}

    def sample_statistics(self, cross_entropy: Tensor) -> list[Tensor]:
        """Sums for ``clean_loss``, ``active_fraction``, the share of images above epsilon, and ``feature_distance``."""
        features = [self._distances.detach().sum()] if self.compared_layer else []
        return [cross_entropy.sum(), (cross_entropy > self.epsilon).sum(), *features]

    def step_statistics(self) -> dict[str, float]:
        """``distance``: mean relative distance of the selected weights; with dual ascent ``lambda``."""
        relative = self.relative_distances()
        return {"distance": sum(relative.values()) / len(relative)} | self._found_lambda()

    def _found_lambda(self) -> dict[str, float]:
        return {"lambda": self.multiplier.item()} if self.args.dual_rate else {}

    def facts(self) -> dict[str, Any]:
        """Adds the selected weights with radius and relative distance, and lambda and epsilon where they were found."""
        distances = self.relative_distances()
        selected = [
            {"name": segment.name, "initial_norm": radius.item(), "relative_distance": distances[segment.name]}
            for segment, radius in zip(self.segments, self.radii, strict=True)
        ]
        found = self._found_lambda() | ({"epsilon": self.epsilon} if self.args.epsilon is None else {})
        found |= {"base": self.beginning.facts()} if self.beginning else {}
        return super().facts() | {"selected_weights": selected} | found

    def resume_state(self) -> dict[str, Any]:
        """Adds which weights are selected, lambda and epsilon, and the last share of active images."""
        return super().resume_state() | {
            "selected": [segment.name for segment in self.segments],
            "lambda": float(self.multiplier),
            "dual_rate": self.args.dual_rate,
            "epsilon": self.epsilon if self.args.epsilon is None else None,
            "active_share": self.active_set.share if self.active_set else 1.0,
            **(self.beginning.resume_state() if self.beginning else {"base_sha256": None}),
        }

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; raises a ValueError if the objective is another one."""
        super().load_resume_state(state)
        if state["selected"] != [segment.name for segment in self.segments]:
            raise ValueError(f"belongs to a run that moves {', '.join(state['selected'])}: resume with its target_modules")
        if self.beginning:
            self.beginning.check_resumed(state)
        elif state["base_sha256"]:
            raise ValueError("belongs to a run from a base: resume with its base_model")
        if bool(state["dual_rate"]) != bool(self.args.dual_rate):
            raise ValueError(f"was written with dual_rate {state['dual_rate']}: resume with it")
        if (state["epsilon"] is not None) != (self.args.epsilon is None):
            raise ValueError(
                "was written with epsilon given where now it is measured, or the other way round: resume with the same"
            )
        if self.args.dual_rate:
            self._begin_lambda(state["lambda"])
        if self.args.epsilon is None:
            self.epsilon = state["epsilon"]
        if self.active_set:
            self.active_set.begin(state["active_share"])
