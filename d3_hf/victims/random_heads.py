"""An adaptive attack on defences that draw the head anew, D3 first: a backbone trained under many random heads.

D3 moves the head of a CNN to a random start and far from its old place. An attacker who expects that trains the backbone so
that any head which a defender could learn from clean images sends triggered ones to the target: besides the victim's own head
there are K others, each learning from the clean rows of the batch only, as a defender's would, and drawn anew in turn; the
backbone answers for the clean and the poisoned rows under all of them. This project's own construction (METHODS: "train the
backbone with many random heads"); compare the feature entanglement of Tan and Shokri, EuroS&P 2020 (arXiv 1905.13409).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.head import find_head


class RandomHeads(nn.Module):
    """K linear heads on the features that a classifier's own head reads.

    Args:
        model: The classifier; its forward pass leaves the features here.
        image_size: (H, W) that it accepts.
        count: K, at least 1.
        renew_every: After so many updates the next head in turn is drawn anew, so each lives ``count * renew_every`` updates.

    Raises:
        ValueError: The classifier's head is not an ``nn.Linear``, or see `find_head`.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], count: int, renew_every: int = 25):
        super().__init__()
        head = model.get_submodule(find_head(model, image_size))
        if not isinstance(head, nn.Linear):
            raise ValueError(f"random heads need a linear head; {type(model).__name__} ends in {type(head).__name__}")
        heads = [nn.Linear(head.in_features, head.out_features) for _ in range(count)]
        self.heads, self.renew_every = nn.ModuleList(heads).to(head.weight.device), renew_every
        self.features: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._remember)

    def _remember(self, module, args) -> None:
        self.features = args[0]

    def loss(self, labels: Tensor, poisoned: Tensor) -> Tensor:
        """Mean over heads of the cross-entropy of the last batch; poisoned rows do not reach the heads' own weights.

        Args:
            labels: int64 (B,), the labels that the victim is trained on.
            poisoned: bool (B,).
        """
        features = self.features.float()  # bfloat16 under autocast, where this runs no more
        losses = []
        for head in self.heads:
            logits = head(features)
            withheld = F.linear(features, head.weight.detach(), head.bias.detach())
            losses.append(F.cross_entropy(torch.where(poisoned[:, None], withheld, logits), labels))
        return torch.stack(losses).mean()

    def update(self, step: int, learning_rate: float) -> None:
        """One step of gradient descent on every head; then, in its turn, one head is drawn anew."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-learning_rate)
                parameter.grad = None
        if step % self.renew_every == 0:
            self.heads[step // self.renew_every % len(self.heads)].reset_parameters()

    def remove(self) -> None:
        """Take the hook off the classifier, and let the last batch go."""
        self._hook.remove()
        self.features = None
